"""A model that computes NaN: commands name the tensor in one line, leave with 1, and write nothing that looks whole."""

import pytest

from wan_trt.cli import app


def told_by(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        app(list(map(str, arguments)))
    assert left.value.code == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("component", "first"),
    [
        ("text_encoder", "embeddings of the prompt"),
        ("low_noise", "velocity of low_noise in step 2 of 2 (t = "),
        ("vae_decoder", "decoded frames"),
    ],
)
def test_generate_names_the_first_tensor_that_is_not_finite(tiny_engines, with_nan, tmp_path, capsys, component, first):
    broken = with_nan(tiny_engines, component)
    before = set(tmp_path.iterdir())
    options = ["-o", tmp_path / "o.mp4", "--size", "32x32", "--frames", 5, "--steps", 2, "--shift", 1]
    line = told_by(capsys, "generate", broken, "a fox", *options)
    assert line.startswith(f"wan-trt: {first}")
    assert line.endswith("values are NaN or infinite | run wan-trt validate to find the cause")
    assert set(tmp_path.iterdir()) == before


def test_a_sweep_names_it_too(tiny_engines, with_nan, capsys):
    options = ["--size", "32x32", "--frames", 1, "--sweep", "steps", "--values", "2,3", "--whole-runs", 1]
    line = told_by(capsys, "bench", with_nan(tiny_engines, "high_noise"), *options)
    assert line.startswith("wan-trt: velocity of high_noise in step 1 of 2 (t = ")


def test_calibrate_writes_no_scales_of_it(tiny_bundle, with_nan, tmp_path, capsys):
    broken = with_nan(tiny_bundle, "low_noise")
    (tmp_path / "prompts.txt").write_text("a fox\n")
    before = set(tmp_path.iterdir())
    options = ["--prompts", tmp_path / "prompts.txt", "--steps", 4, "--size", "32x32", "--frames", 1]
    line = told_by(capsys, "calibrate", broken, tmp_path / "scales.json", *options)
    assert line.startswith("wan-trt: low_noise, blocks.0.self_attn.o: its input holds NaN or infinity | run wan-trt ")
    assert set(tmp_path.iterdir()) == before
