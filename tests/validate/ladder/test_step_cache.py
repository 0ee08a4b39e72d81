"""With a step cache, engines and reference skip the same steps and agree; the report says what skipping costs."""

import json

import numpy as np
import pytest

from runtime import step_cache
from runtime.request import Request
from validate import ValidateOptions, validate
from validate.reference.listed_cache import ListedCache
from validate.report.cache_report import MEASURED
from wan22.caching import Caching
from wan22.errors import UserError

SMALL = {"size": (64, 64), "frames": 5, "steps": 12, "seed": 3}
SHORT_OF_LPIPS = {f"step_cache.{name}" for name in MEASURED if name != "lpips"}


def report_of(engines, checkpoint, folder, caching, **more):
    return validate(engines, checkpoint, folder, ValidateOptions(Request(**SMALL, cache=caching), **more))


@pytest.mark.slow
@pytest.mark.parametrize(
    "caching",
    [
        Caching(easy=True, threshold=9, first_exact=6, late_cfg="auto"),
        Caching(skip_steps=(5, 6), reuse="hold", late_cfg=(4,)),
        Caching(skip_steps=(3, 5, 6), reuse="taylor1"),
    ],
    ids=["easy", "hold", "taylor1"],
)
def test_engines_and_reference_agree_on_the_same_skipped_steps(tiny_engines, tiny_checkpoint, tmp_path, caching):
    (tmp_path / "gate.toml").write_text("[validate]\nstep_cache.skipped_steps.min = 1\nstep_cache.ssim.min = 0.9999\n")
    report = report_of(tiny_engines, tiny_checkpoint, tmp_path, caching, gate=tmp_path / "gate.toml")
    assert [row.name for row in report.failed] == []
    cache = report.cases[0].cache
    assert cache.skipped
    assert bool(cache.late) == (caching.late_cfg is not None)
    before = min(step.number for step in (*cache.skipped, *cache.late)) - 1
    assert [step.relative_l2 for step in cache.steps[:before]] == [0] * before
    assert cache.first_diverging_step.number == before + 1
    assert 0 < cache.psnr_db < 60
    assert [bool(verdict) for verdict in report.verdicts] == [True, False]
    assert cache.summary().startswith(f"step cache: {len(cache.skipped)} step")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["cases"][0]["step_cache"]["skipped"] == [step.number - 1 for step in cache.skipped]
    assert set(stored["measured"]) >= SHORT_OF_LPIPS
    page = (tmp_path / "report.html").read_text()
    assert "Step cache against the exact run" in page
    assert page.count("of the exact run") == len(cache.filmstrip.pictures)
    assert cache.summary().replace("_", "\\_") in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_a_wrong_estimate_is_found(tiny_engines, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(step_cache.STRATEGIES, "rescale", step_cache.hold)
    report = report_of(tiny_engines, tiny_checkpoint, tmp_path, Caching(skip_steps=(10,)))
    assert report.first_diverging_step.step == 11


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("reuse", ["rescale", "hold", "taylor1"])
def test_both_sides_round_by_the_same_rule(reuse, scale):
    """On the same velocities the estimates agree far below the 3e-5 that 16 bits for the change of velocity cost."""
    sigmas, random = [0.9, 0.8, 0.65, 0.5, 0.3], np.random.default_rng(0)
    caching = Caching(skip_steps=(3,), reuse=reuse, late_cfg=(2,) if scale != 1 else ())
    unguided = ["dit"] if scale == 1 else []
    ours = step_cache.StepCache(caching, sigmas, ["dit"] * 5, unguided=unguided)
    theirs = ListedCache(caching, sigmas)
    fields = [random.standard_normal((1, 4, 2, 8, 8), np.float32) for _ in range(5)]
    x, *parts = fields
    for step in range(3):
        c, u = (a + np.float32(0.1 * sigmas[step]) * b for a, b in zip(parts[:2], parts[2:], strict=True))
        assert not ours.skips(step)
        assert theirs.skipped(step, "dit", x) is None
        residual = ours.residual(step)
        assert (residual is None) == (scale == 1 or step < 2)
        synthetic = theirs.unconditional(step, c, scale) if scale != 1 else c
        velocity = c + (np.float32(scale - 1) * (c - u) if residual is None else residual)
        ours.observe(step, x, c, velocity)
        theirs.keep(step, x, c, u if synthetic is None else synthetic, scale)
    assert ours.skips(3)
    found, (conditional, unconditional) = ours.estimate(3, x), theirs.skipped(3, "dit", x)
    expected = conditional if unconditional is None else unconditional + scale * (conditional - unconditional)
    assert np.linalg.norm(found - expected) < 2e-6 * np.linalg.norm(expected)


def test_too_few_steps_are_refused_before_any_work(tiny_engines, tiny_checkpoint, tmp_path):
    options = ValidateOptions(Request(size=(64, 64), frames=5, steps=4, cache=Caching(easy=True)))
    with pytest.raises(UserError, match="a step cache with 4 steps"):
        validate(tiny_engines, tiny_checkpoint, tmp_path, options)
    assert list(tmp_path.iterdir()) == []
