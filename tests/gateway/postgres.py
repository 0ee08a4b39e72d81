"""A PostgreSQL of Debian's package on a socket of its own, for the time of a test."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


def programs():
    """The folder of PostgreSQL's programs; skips without one."""
    found = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    on_path = shutil.which("postgres")
    found += [Path(on_path).resolve().parent] if on_path else []
    for folder in found:
        if (folder / "initdb").is_file() and (folder / "postgres").is_file():
            return folder
    pytest.skip("needs PostgreSQL (Debian's package postgresql)")


@dataclass
class Postgres:
    folder: Path
    owner: dict  # arguments of Popen: postgres refuses to run as root
    process: subprocess.Popen | None = None

    @property
    def url(self):
        return f"postgresql://postgres@/postgres?host={self.folder}"

    def start(self):
        options = ["-D", "data", "-k", str(self.folder), "-c", "listen_addresses=", "-c", "max_connections=200"]
        with (self.folder / "log").open("ab") as log:
            command = [programs() / "postgres", *options]
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, **self.owner)
        give_up = time.monotonic() + 60
        ready = [programs() / "pg_isready", "-q", "-h", str(self.folder)]
        while subprocess.run(ready, check=False).returncode:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < give_up
            time.sleep(0.05)

    def stop(self):
        """At once, as a crash would."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait()


@contextmanager
def postgres():
    folder = Path(tempfile.mkdtemp(prefix="wan-trt-postgres-"))
    owner = {}
    if os.geteuid() == 0:
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            account = pwd.getpwnam("nobody")
        os.chown(folder, account.pw_uid, account.pw_gid)
        owner = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    server = Postgres(folder, owner)
    try:
        command = [programs() / "initdb", "-D", "data", "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, **owner)
        server.start()
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.stop()
        shutil.rmtree(folder)
