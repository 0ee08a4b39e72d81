"""Commands on a disk that fails: one line and exit code 2, or all is done; and what was there before is whole.

A library between the commands and the C library (``tests/faults/failing_disk.c``) lets one call fail, or all from one
on. ``WAN_TRT_DISK_ERRORS=20`` tries more calls of each command than the few that a run of all tests has time for.
"""

import errno
import os
import random
import shutil
import subprocess

import pytest

from tests.faults.commands import COMMANDS, ROOT, Forking, damage, fresh, make_inputs
from wan22.files import remove_leftovers

TRIES = int(os.environ.get("WAN_TRT_DISK_ERRORS", "1"))
FOREVER = 10**9
# errno, whether only calls that write fail, whether all that follow fail too
KINDS = {
    "EIO": (errno.EIO, 0, False),
    "EIO from then on": (errno.EIO, 0, True),
    "ENOSPC": (errno.ENOSPC, 1, False),
    "EDQUOT from then on": (errno.EDQUOT, 1, True),
    "EROFS from then on": (errno.EROFS, 1, True),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder that lies on the failing disk, with the inputs and all outputs."""
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def forking(tmp_path_factory):
    if not shutil.which("gcc"):
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("forking")
    library, source = folder / "failing_disk.so", ROOT / "tests" / "faults" / "failing_disk.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", library, source, "-ldl"], check=True)
    forking = Forking(folder, library)
    yield forking
    forking.close()


@pytest.fixture(scope="module")
def inputs(forking, place):
    return make_inputs(forking, place / "inputs")


def disk(place, first, kind):
    """The call that fails; none where ``first`` is 0, to count them."""
    number, only_writes, for_good = KINDS[kind]
    last = FOREVER if for_good and first else first
    return {"below": str(place), "from": first, "to": last, "errno": number, "only_writes": only_writes}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "demo"])
def test_errors_of_the_disk_are_one_line_and_damage_nothing(name, forking, inputs, place):
    command = COMMANDS[name]
    if name in ("inspect", "lora apply") and inputs.blocks is None:
        pytest.skip("builds need tensorrt-rtx")
    folder = place / name.replace(" ", "_")
    to, reference = folder / "to", folder / "reference"
    to.mkdir(parents=True)
    words, chosen, faults = command.words(inputs, to), random.Random(name), []
    assert (whole := forking.run(words)).code == 0, whole.text
    to.rename(reference)
    for kind in KINDS:
        fresh(command, to, reference)
        calls = forking.run(words, **disk(place, 0, kind)).calls
        assert calls > 5
        for first in (chosen.randint(1, calls) for _ in range(TRIES)):
            fresh(command, to, reference)
            ended = forking.run(words, **disk(place, first, kind))
            remove_leftovers(to)  # what could not be removed while the disk failed
            told = f"{kind}, call {first} of {calls}: exit code {ended.code}, {ended.text[-1000:]}"
            lines = [line for line in ended.text.splitlines() if line.startswith("wan-trt:")]
            if not (ended.code == 0 or (ended.code == 2 and len(lines) == 1 and lines[0].count(" | ") == 2)):
                faults.append(told)
            faults += [f"{told}: {each}" for each in damage(command, to, reference, ended=ended.code == 0)]
    assert not faults, "\n".join(faults)
