"""Commands that are killed at random moments: nothing half-written, nothing lost, nothing left over after the next run.

``WAN_TRT_KILLS=20`` tries more moments of each command than the few that a run of all tests has time for.
"""

import os
import random
import signal
from importlib.util import find_spec

import pytest

from tests.faults.commands import KILLED, NEED_BLOCKS, Forking, damage, fresh, make_inputs

DEFAULT_KILLS = 2
KILLS = int(os.environ.get("WAN_TRT_KILLS", DEFAULT_KILLS))


@pytest.fixture(scope="module")
def forking(tmp_path_factory):
    forking = Forking(tmp_path_factory.mktemp("forking"))
    yield forking
    forking.close()


@pytest.fixture(scope="module")
def inputs(forking, tmp_path_factory):
    return make_inputs(forking, tmp_path_factory.mktemp("inputs") / "i")


@pytest.fixture(params=[name for name, command in KILLED.items() if not command.costly or KILLS > DEFAULT_KILLS])
def tried(request, forking, inputs, tmp_path):
    """A command, the folder it writes to, one that it has written to undisturbed, and the seconds that took."""
    command, to, reference = KILLED[request.param], tmp_path / "to", tmp_path / "reference"
    if request.param in NEED_BLOCKS and inputs.blocks is None:
        pytest.skip("builds need tensorrt-rtx")
    if request.param == "mlperf" and find_spec("mlperf_loadgen") is None:
        pytest.skip("needs mlcommons-loadgen")
    to.mkdir()
    whole = forking.run(command.words(inputs, to))
    assert whole.code == 0, whole.text
    to.rename(reference)
    return command, to, reference, whole.seconds


@pytest.mark.slow
def test_kills_at_random_moments_damage_nothing(tried, forking, inputs):
    command, to, reference, seconds = tried
    words, moments = command.words(inputs, to), random.Random(str(command.outputs))
    killed, faults = 0, []
    while killed < KILLS:
        fresh(command, to, reference)
        ended = forking.run(words, kill_after_s=moments.uniform(0, seconds))
        if ended.status != signal.SIGKILL:
            assert ended.code == 0, ended.text
            continue
        killed += 1
        faults += damage(command, to, reference, ended=False)
        if (
            not command.overwrite
            and not command.piecemeal
            and any((to / output).exists() for output in command.outputs)
        ):
            fresh(command, to, reference)  # the kill came when all, or one of two, was done
        again = forking.run(words)
        if again.code != 0:
            faults.append(f"the next run fails: {again.text}")
        faults += damage(command, to, reference, ended=True)
        faults += [f"left over: {path}" for path in forking.tmp.glob("wan-trt-*")]
    assert not faults


@pytest.mark.slow
def test_ctrl_c_at_random_moments_leaves_nothing(tried, forking, inputs):
    """But what an export goes on with, and of a demo what was done."""
    command, to, reference, seconds = tried
    words, moments = command.words(inputs, to), random.Random(f"Ctrl-C {command.outputs}")
    faults = []
    for _ in range(KILLS):
        fresh(command, to, reference)
        ended = forking.run(words, kill_after_s=moments.uniform(0, seconds), kill_with=signal.SIGINT)
        if ended.code not in (0, 130) and "Aborted" not in ended.text:  # by the parser of the command line
            faults.append(f"exit code {ended.code}: {ended.text[-2000:]}")
        faults += damage(command, to, reference, ended=False)
        if not command.resumes:
            faults += [f"left over: {path}" for path in to.rglob(".*.partial")]
        faults += [f"left over: {path}" for path in forking.tmp.glob("wan-trt-*")]
    assert not faults
