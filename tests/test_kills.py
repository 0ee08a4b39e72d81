"""Commands that are killed at random moments: nothing half-written, nothing lost, nothing left over after the next run.

``WAN_TRT_KILLS=20`` tries more moments of each command than the few that a run of all tests has time for.
"""

import os
import random

import pytest

from tests.faults.commands import COMMANDS, Forking, damage, fresh, make_inputs

KILLS = int(os.environ.get("WAN_TRT_KILLS", "2"))


@pytest.fixture(scope="module")
def forking(tmp_path_factory):
    forking = Forking(tmp_path_factory.mktemp("forking"))
    yield forking
    forking.close()


@pytest.fixture(scope="module")
def inputs(forking, tmp_path_factory):
    return make_inputs(forking, tmp_path_factory.mktemp("inputs") / "i")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_kills_at_random_moments_damage_nothing(name, forking, inputs, tmp_path, record_property):
    command = COMMANDS[name]
    if name in ("inspect", "lora apply") and inputs.external is None:
        pytest.skip("builds need tensorrt-rtx")
    to, reference = tmp_path / "to", tmp_path / "reference"
    to.mkdir()
    words, moments = command.words(inputs, to), random.Random(name)
    whole = forking.run(words)
    assert whole.code == 0, whole.text
    to.rename(reference)
    killed, faults = 0, []
    while killed < KILLS:
        fresh(command, to, reference)
        ended = forking.run(words, kill_after_s=moments.uniform(0, whole.seconds))
        if ended.status != 9:
            assert ended.code == 0, ended.text
            continue
        killed += 1
        faults += damage(command, to, reference, ended=False)
        for output in () if command.overwrite or command.piecemeal else command.outputs:
            if (to / output).exists():  # the kill came when all was done
                fresh(command, to, reference)
        again = forking.run(words)
        if again.code != 0:
            faults.append(f"the next run fails: {again.text}")
        faults += damage(command, to, reference, ended=True)
        faults += [f"left over: {path}" for path in forking.tmp.glob("wan-trt-*")]
    record_property("killed", killed)
    assert not faults
