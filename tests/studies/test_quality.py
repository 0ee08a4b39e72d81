"""The study of quality goes on where it stopped, and measures clips against those of float32."""

import json

import numpy as np
import pytest

from runtime.request import Request
from studies.tiny_model import quality
from studies.tiny_model.clips import random_clip
from studies.tiny_model.evaluate import Rendered
from studies.tiny_model.quality import WAYS, Way, app, measured, picture, table
from wan22.caching import Caching
from wan22.precision import Precision

FEW = (
    Way("fp32"),
    Way("fp8, calibrated", precision=Precision.FP8, means=True, request=Request(steps=4)),
    Way("10 steps, cached", request=Request(steps=10, cache=Caching(skip_steps=(5, 7)))),
)


def drawn(noise=0.0):
    """A content, and a clip of it in [-1, 1] for every way, with noise for all but float32's."""
    content, clip = random_clip("drawn", held_out=True)
    frames = np.moveaxis(clip, -1, 0)[None].astype(np.float32) / 127.5 - 1
    spread = noise * np.random.default_rng(0).standard_normal(frames.shape, dtype=np.float32)
    return content, {way.name: Rendered(frames + spread * (way.name != way.beside), 40, 1.0) for way in WAYS}


def status(*arguments):
    with pytest.raises(SystemExit) as left:
        app([str(argument) for argument in arguments])
    return left.value.code


def test_every_way_is_compared_with_a_way_and_a_clip_with_its_own():
    assert {way.beside for way in WAYS} <= {way.name for way in WAYS if way.precision == Precision.FP32}
    content, clips = drawn(noise=0.02)
    found = measured(clips, content)
    assert found["fp32"]["psnr_db"] is None
    assert found["fp32"]["ssim"] == 1
    assert found["fp8"]["psnr_db"] == pytest.approx(-20 * np.log10(0.02 / 2), abs=0.1)  # of a range of 2
    assert found["fp8"]["ssim"] < 1
    assert all(found["fp8"][part] for part in ("colour", "shape", "motion", "right"))


def test_the_picture_has_a_strip_for_every_way_and_the_table_a_row():
    content, clips = drawn()
    shown = picture(clips)
    assert shown.size == (150 + 5 * 96, 64 * len(WAYS))
    rows = table({"prompts": [{"ways": measured(clips, content)}] * 2})
    assert rows.row_count == len(WAYS)
    assert "2 prompts" in str(rows.title)


def test_a_result_of_other_ways_is_refused(tmp_path, capsys):
    (tmp_path / "quality.json").write_text('{"ways": {"fp32": "another"}, "prompts": []}')
    assert status(tmp_path) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "quality.json of other ways to render | expected a result of this version" in lines[0]


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "WAYS", FEW)
    monkeypatch.setattr(quality, "CALIBRATION_PROMPTS", 1)
    rendered, render = [], quality.render

    def interrupted(pipeline, request):
        rendered.append(request.seed)
        if len(rendered) == len(FEW) + 2:
            raise KeyboardInterrupt
        return render(pipeline, request)

    monkeypatch.setattr(quality, "render", interrupted)
    assert status(tmp_path, "--prompts", "2") == 130
    assert "1 prompt: medians" in capsys.readouterr().out
    first = json.loads((tmp_path / "quality.json").read_text())["prompts"]
    assert len(first) == 1
    assert status(tmp_path, "--prompts", "2") == 0
    both = json.loads((tmp_path / "quality.json").read_text())["prompts"]
    assert both[:1] == first
    assert [prompt["ways"]["10 steps, cached"]["forwards"] for prompt in both] == [16, 16]
    assert all(20 < prompt["ways"]["fp8, calibrated"]["psnr_db"] < 45 for prompt in both)
    assert rendered[len(FEW) + 2 :] == [1] * len(FEW)
    assert len(list((tmp_path / "strips").iterdir())) == 2
