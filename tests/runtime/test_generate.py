"""A whole run without PyTorch, from prompt to file."""

import subprocess
import sys

import av
import numpy as np
import pytest

from runtime.generate import generate
from runtime.pipeline import Pipeline
from runtime.request import Request
from wan22.bundle import open_bundle
from wan22.errors import UserError

SMALL = Request("a lighthouse in a storm", size=(64, 48), frames=9, steps=3)


def test_writes_the_video_that_was_asked_for(tmp_path, tiny_engines):
    told = []
    result = generate(tiny_engines, SMALL, tmp_path / "out.mp4", progress=lambda *args: told.append(args))
    with av.open(str(tmp_path / "out.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 64, 48)
        assert stream.average_rate == 16
        assert sum(1 for _ in file.decode(video=0)) == 9
    assert result.latents.shape == (1, 16, 3, 6, 8)
    assert ("denoise", 3, 3, "steps") in told
    assert ("decode frames", 9, 9, "frames") in told


def test_a_seed_repeats_and_another_differs(tiny_engines, tmp_path):
    with Pipeline.open(tiny_engines) as pipeline:
        runs = [
            generate(pipeline, Request("x", size=(64, 48), frames=1, steps=2, seed=seed), tmp_path / f"{i}.png").latents
            for i, seed in enumerate((7, 7, 8))
        ]
    assert (runs[0] == runs[1]).all()
    assert np.abs(runs[0] - runs[2]).max() > 0.1


def test_both_experts_work_and_one_at_a_time_gives_the_same(tiny_engines):
    complete = None
    latents = []
    for residency, kept in (("all", 2), ("one-expert", 1), ("one-component", 1)):
        with Pipeline.open(tiny_engines, residency=residency) as pipeline:
            complete = SMALL.completed(pipeline.spec)
            steps = list(pipeline.denoise(complete))
            assert {step.expert for step in steps} == {"high_noise", "low_noise"}
            assert len({"high_noise", "low_noise"} & set(pipeline._engines)) == kept
            latents.append(steps[-1].latents)
    assert all((each == latents[0]).all() for each in latents)


def test_guidance_1_needs_no_negative_prompt(tiny_engines, monkeypatch):
    with Pipeline.open(tiny_engines) as pipeline:
        asked = []
        text = pipeline.text
        monkeypatch.setattr(pipeline, "text", lambda prompt, **k: asked.append(prompt) or text(prompt, **k))
        request = Request("x", size=(64, 48), frames=1, steps=2, guidance={"high_noise": 1, "low_noise": 1})
        list(pipeline.denoise(request.completed(pipeline.spec)))
    assert asked == ["x"]


def test_a_prompt_too_long_is_cut_with_a_warning(tiny_engines, caplog):
    with Pipeline.open(tiny_engines) as pipeline:
        tokens, _ = pipeline.encode_text("word " * 600)
    assert tokens.ids.shape == (1, 512)
    assert "prompt cut to 512 tokens" in caplog.text


def test_bad_output_is_told_before_any_work(tmp_path, tiny_engines):
    with pytest.raises(UserError, match="9 frames for"):
        generate(tiny_engines, SMALL, tmp_path / "out.png", progress=pytest.fail)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("schedule", ["official", "diffusers"])
def test_every_solver_and_schedule_ends_in_finite_latents(tiny_engines, solver, schedule):
    request = Request("x", size=(64, 48), frames=1, steps=4, solver=solver, schedule=schedule)
    with Pipeline.open(tiny_engines) as pipeline:
        *_, last = pipeline.denoise(request.completed(pipeline.spec))
    assert np.isfinite(last.latents).all()
    assert 0.05 < last.latents.std() < 20


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (Request("x", size=(60, 48)), "size 60x48"),
        (Request("x", frames=8), "8 frames"),
        (Request("x", guidance={"dit": 3.0}), "guidance for 'dit'"),
        (Request("x", guidance={"low_noise": float("nan")}), "guidance nan"),
        (Request("x", guidance={"low_noise": 1e300}), "guidance 1e.300 for low_noise .* from 0 to 100"),
        (Request("x", steps=2_000_000_000), "2000000000 steps"),
        (Request("x", frames=1_000_001), r"1000001 frames \| expected at most 4093"),
        (Request("x", size=(96000, 96000)), r"size 96000x96000 \| expected sides of at most 16384 pixels"),
    ],
)
def test_requests_that_the_model_cannot_fulfil(tiny_engines, request_, told):
    with pytest.raises(UserError, match=told):
        request_.completed(open_bundle(tiny_engines, "engines").manifest.spec)


def test_a_run_loads_neither_torch_nor_diffusers_nor_transformers(tiny_engines, tmp_path):
    code = (
        "import sys; from wan_trt.cli import app;"
        f"app(['generate', {str(tiny_engines)!r}, 'a cat', '-o', {str(tmp_path / 'o.mp4')!r}, '--size', '64x48',"
        "'--frames', '5', '--steps', '2', '--verbose'], standalone_mode=False);"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'onnx', 'export') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert "sampler overhead" in done.stdout
