"""Which version of the official code was compared with."""

import subprocess

from validate.reference.clone import commit_of


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_the_commit_of_a_clone_and_of_no_other(tmp_path):
    git(tmp_path, "init")
    assert commit_of(tmp_path) == ""  # nothing is committed yet
    git(tmp_path, "commit", "--allow-empty", "-m", "first")
    assert len(commit_of(tmp_path)) == 12
    (tmp_path / "unpacked").mkdir()
    assert commit_of(tmp_path / "unpacked") == ""  # the repository around it is another
