"""A bundle that somebody else changed, or signed, is refused."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from runtime.signature import SIGNATURE, check_signature, sign
from wan22.bundle import MANIFEST
from wan22.errors import UserError
from wan_trt.cli import app


def pem(folder: Path, name: str, algorithm: str = "ed25519") -> tuple[Path, Path]:
    """A key pair as openssl writes it."""
    private, public = folder / f"{name}.pem", folder / f"{name}.public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", algorithm, "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    return private, public


@pytest.fixture
def signed(tmp_path, tiny_bundle) -> tuple[Path, Path]:
    """A signed bundle and the public key."""
    private, public = pem(tmp_path, "key")
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    sign(folder, private)
    return folder, public


def test_openssl_accepts_the_signature(signed):
    folder, public = signed
    verify = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin"]
    files = ["-in", folder / MANIFEST, "-sigfile", folder / SIGNATURE]
    assert subprocess.run([*verify, *files], check=False, capture_output=True).returncode == 0


def test_a_manifest_with_a_new_checksum_is_still_refused(signed):
    folder, public = signed
    check_signature(folder, public)
    content = json.loads((folder / MANIFEST).read_text())
    content["command"] = "export, says a stranger"
    from wan22.bundle import _own_sha256

    content["own_sha256"] = _own_sha256(content)
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not match"):
        check_signature(folder, public)


def test_another_key_and_a_missing_signature_are_refused(signed, tmp_path):
    folder, public = signed
    with pytest.raises(UserError, match="does not match"):
        check_signature(folder, pem(tmp_path, "other")[1])
    (folder / SIGNATURE).unlink()
    with pytest.raises(UserError, match="is missing"):
        check_signature(folder, public)


def test_a_bundle_with_a_changed_file_is_not_signed(tmp_path, tiny_bundle):
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    weights = max((path for path in folder.rglob("*.safetensors")), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError):
        sign(folder, pem(tmp_path, "key")[0])
    assert not (folder / SIGNATURE).exists()


@pytest.mark.parametrize("content", [b"", b"no key", b"\x00\xff" * 40_000])
def test_files_that_hold_no_key_are_refused(signed, tmp_path, content):
    path = tmp_path / "bad.pem"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.pem"):
        check_signature(signed[0], path)
    with pytest.raises(UserError, match=r"bad\.pem"):
        sign(signed[0], path)


def test_the_other_key_of_the_pair_is_named(signed, tmp_path):
    private, public = pem(tmp_path, "pair")
    with pytest.raises(
        UserError, match=r"pair\.public\.pem: a public key \| expected an Ed25519 private key \|"
    ) as left:
        sign(signed[0], public)
    with pytest.raises(UserError, match=r"pair\.pem: a private key \| expected an Ed25519 public key \|") as right:
        check_signature(signed[0], private)
    for refused in (left, right):  # a new key there would replace the user's own
        assert "genpkey" not in str(refused.value)
    command, _ = right.value.remedy.split(", then give ")
    subprocess.run(command.split(), check=True, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "public.pem").read_bytes() == public.read_bytes()


def test_keys_of_another_kind_are_refused(signed, tmp_path):
    private, public = pem(tmp_path, "x", "x25519")
    with pytest.raises(UserError, match="Ed25519 public key"):
        check_signature(signed[0], public)
    with pytest.raises(UserError, match="Ed25519 private key"):
        sign(signed[0], private)


def test_verify_takes_the_key_and_pack_takes_the_signature_along(signed, tmp_path, capsys):
    folder, public = signed
    copy = tmp_path / "copy"
    for words in (["bundle", "pack", folder, copy], ["bundle", "verify", copy, "--key", public]):
        with pytest.raises(SystemExit) as left:
            app([str(word) for word in words])
        assert left.value.code == 0, capsys.readouterr().err
    (copy / SIGNATURE).write_bytes(b"\0" * 64)
    with pytest.raises(SystemExit) as left:
        app(["bundle", "verify", str(copy), "--key", str(public)])
    assert left.value.code == 2
    assert "does not match" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("command", ["serve", "triton"])
def test_no_server_is_made_of_engines_that_the_key_did_not_sign(command, tmp_path, tiny_engines, capsys):
    _, public = pem(tmp_path, "key")
    place = [str(tmp_path / "repository")] if command == "triton" else []
    with pytest.raises(SystemExit) as left:
        app([command, str(tiny_engines), *place, "--require-signature", str(public)])
    assert left.value.code == 2
    assert "bundle.json.sig is missing" in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()
