"""The study of what step caches cost: every cache on latents of the size that is asked for."""

import pytest

from runtime.noise import standard_normal
from studies.cache_cost import CACHES, app, cost


def test_every_cache_is_measured_beside_the_steps_of_gpus(capsys):
    with pytest.raises(SystemExit) as left:
        app(["--size", "416x240", "--frames", "5"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "416x240, 5 frames" in printed
    assert printed.count(" ms ") == len(CACHES)
    assert "h100" in printed


@pytest.mark.parametrize(
    ("name", "latents"),
    [
        ("easy, taylor1", 1.5 + 2 * 10 * 18 / (30 * 52)),
        ("easy, taylor1, late-cfg", 2.5 + 2 * 10 * 18 / (30 * 52)),
        ("magcache, late-cfg", 2),
        ("late-cfg", 1),
    ],
)
def test_the_memory_is_that_of_the_arrays(name, latents):
    noise = standard_normal((1, 16, 2, 30, 52), 0)
    seconds, held = cost(CACHES[name], noise)
    assert seconds > 0
    assert held == pytest.approx(latents * noise.nbytes)


def test_bad_input_is_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        app(["--size", "100x100"])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("python -m studies.cache_cost: ")
