"""Scales measured on prompts: every linear of every expert, at its own timesteps, good enough to quantise with."""

import json
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from engines.cpu.emulation import emulate
from export.checkpoint.schema import DIT_LINEARS_PER_BLOCK
from export.exporter import export_checkpoint
from export.files.safetensors_file import read_safetensors
from export.graphs.builder import BFLOAT16
from export.graphs.linear import FLOAT8_MAX
from export.graphs.taps import KEPT
from export.options import ExportOptions
from export.quantise.input_scales import read_input_scales
from export.quantise.inputs import CENTRED, crests_by_kind, read_inputs, write_inputs
from export.quantise.measure import inputs_of_zeros
from runtime.request import Request
from studies.precision.session import open_graph
from tests.export.graphs.test_dit import inputs_for, relative_l2
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS
from wan_trt.recipes.calibrate import CalibrateOptions, calibrate

TINY = SPECS["t2v-a14b-tiny"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("# two of them\nA red fox in the snow\n\n雪中的城市\n")
    return path


SMALL = Request(size=(64, 48), frames=5, steps=4)


def options(prompts, request=SMALL, **more):
    return CalibrateOptions(prompts, request, **more)


@pytest.fixture(scope="module")
def bf16_bundle(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("bf16") / "onnx"
    export_checkpoint(tiny_checkpoint, folder, ExportOptions(Precision.BF16))
    return folder


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, bf16_bundle, prompts):
    out = tmp_path_factory.mktemp("scales") / "scales.json"
    return out, calibrate(bf16_bundle, out, options(prompts, means=out.with_name("means")))


def test_every_linear_of_both_experts_is_covered(calibrated):
    out, calibration = calibrated
    expected = {f"blocks.{layer}.{name}" for layer in range(TINY.dit.layers) for name in DIT_LINEARS_PER_BLOCK}
    scales = read_input_scales(out, TINY)
    assert {expert: set(part) for expert, part in scales.items()} == dict.fromkeys(TINY.experts, expected)
    assert calibration.coverage.startswith("40 linears, 2 prompts of 4 steps")


def test_each_expert_ran_its_own_steps_with_and_without_the_prompt(calibrated):
    assert calibrated[1].forwards == {"high_noise": 2 * 3 * 2, "low_noise": 2 * 1 * 2}


def test_scales_are_maxima_with_a_margin(calibrated, tiny_bundle):
    out, calibration = calibrated
    found = read_input_scales(out, TINY)["low_noise"]["blocks.1.ffn.2"]
    assert found.input * FLOAT8_MAX == pytest.approx(1.1 * calibration.inputs["low_noise"]["blocks.1.ffn.2"])
    weight = read_safetensors(tiny_bundle / "low_noise.safetensors")["blocks.1.ffn.2.weight"].read()
    assert found.weight * FLOAT8_MAX == pytest.approx(np.abs(weight).max(), rel=2**-8)


def test_a_bundle_in_float32_has_nearly_the_maxima_of_one_in_bfloat16(tmp_path, calibrated, tiny_bundle, prompts):
    exact = calibrate(tiny_bundle, tmp_path / "s.json", options(prompts))
    for expert, linears in exact.inputs.items():
        for name, largest in linears.items():
            assert calibrated[1].inputs[expert][name] == pytest.approx(largest, rel=0.05), name


@pytest.fixture(scope="module")
def error_of(tmp_path_factory, tiny_checkpoint, tiny_bundle):
    """``error_of(options)`` → relative L2 error of velocities of the high-noise expert exported so, on average."""
    calls = [inputs_for(TINY.dit, 2, 6, 8, [timestep], seed) for timestep in (900.0, 999.0) for seed in (1, 2, 3)]
    for inputs in calls:
        inputs["text"] *= np.where(np.arange(512) < 20, 0.3, 0.0)[:, None].astype(np.float32)  # as prompts are

    def velocities(bundle, emulated):
        model = ir.load(bundle / "high_noise.onnx")
        for value in model.graph.initializers.values():  # from files into memory
            value.const_value = ir.Tensor(value.const_value.numpy(), dtype=value.dtype, name=value.name)
        if emulated:
            emulate(model, BFLOAT16)
        graph = open_graph(model)
        return [graph(**inputs)[0] for inputs in calls]

    exact = velocities(tiny_bundle, False)

    def error(**options):
        folder = tmp_path_factory.mktemp("export") / "onnx"
        export_checkpoint(tiny_checkpoint, folder, ExportOptions(Precision.FP8, **options))
        return np.mean([relative_l2(*pair) for pair in zip(velocities(folder, True), exact, strict=True)])

    return error


@pytest.fixture(scope="module")
def per_token(error_of):
    return error_of()


def test_a_graph_with_measured_scales_errs_little_more_than_one_that_scales_every_token(
    calibrated, error_of, per_token
):
    assert 0.01 < error_of(input_scales=calibrated[0]) < 1.2 * per_token


def test_a_graph_with_means_of_prompts_errs_less_than_one_with_means_without_data_or_none(
    calibrated, error_of, per_token, monkeypatch
):
    found = error_of(input_means=calibrated[0].with_name("means"))
    assert 0.01 < found < per_token
    monkeypatch.setattr("export.measured.measure_inputs", lambda *_, **__: inputs_of_zeros(TINY.dit))
    assert found < 0.95 * error_of()


def test_matrices_are_rounded_for_parts_of_the_calibrated_runs(tmp_path, calibrated, tiny_checkpoint):
    """NVFP4 with the file, and with the same file without its parts of forwards, where noise takes their place."""
    known = read_inputs(calibrated[0].with_name("means"), TINY)
    parts = known["high_noise"].forwards
    assert parts.video.shape == (KEPT, 16, 2, 6, 8)  # of videos of 2 latent frames, 6 x 8
    assert 1 < parts.text.shape[1] < 512  # of the negative prompt
    files = {"prompts": known, "noise": {expert: replace(part, forwards=None) for expert, part in known.items()}}
    weights = {}
    for name, content in files.items():
        write_inputs(tmp_path / name, content)
        options = ExportOptions(Precision.NVFP4, input_means=tmp_path / name, parts=frozenset({"high_noise"}))
        bundle = export_checkpoint(tiny_checkpoint, tmp_path / f"{name}-onnx", options)
        weights[name] = read_safetensors(bundle.folder / "high_noise.safetensors")
    for leaf in ("input_mean", "bias"):
        same = (weights[name][f"blocks.1.ffn.2.{leaf}"].read() for name in files)
        assert np.array_equal(*same), leaf
    for matrix in ("self_attn.qkv", "ffn.2"):
        codes = [weights[name][f"blocks.1.{matrix}.weight"].read().view(np.uint8) for name in files]
        assert (codes[0] != codes[1]).mean() > 0.02, matrix


def test_it_tells_what_int8_would_cost(calibrated):
    _, calibration = calibrated
    for measured in calibration.measured.values():
        crests = crests_by_kind(measured)
        assert set(crests) == set(CENTRED)
        assert all(1.5 < crest < 11.5 for crest in crests.values())
    assert calibration.advice.endswith("--precision int8 needs nothing else")
    peaked = {name: replace(found, crest=14.0) for name, found in measured.items() if name.endswith("ffn.2")}
    told = replace(calibration, measured={"low_noise": measured | peaked}).advice
    assert "--keep-high-precision ffn.2=fp8 " in told


def test_what_runs_without_the_prompt_can_run_without_any_text(tmp_path, calibrated, bf16_bundle, prompts):
    without = calibrate(bf16_bundle, tmp_path / "s.json", options(prompts, replace(SMALL, negative_prompt="")))
    assert without.forwards == calibrated[1].forwards
    assert without.inputs["low_noise"] != calibrated[1].inputs["low_noise"]


def test_one_expert_has_a_file_without_parts(tmp_path, flow_of, prompts):
    calibrate(
        flow_of("ti2v-5b-tiny").bundle, tmp_path / "s.json", options(prompts, replace(SMALL, size=(64, 64), steps=1))
    )
    assert "blocks.0.attn1.to_q" in json.loads((tmp_path / "s.json").read_text())


def test_images_are_calibrated_with(tmp_path, flow_of):
    from PIL import Image

    Image.new("RGB", (90, 60), (200, 30, 60)).save(tmp_path / "red.png")
    lines = [{"prompt": "A red wall", "image": "red.png"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = calibrate(flow_of("i2v-a14b-tiny").bundle, tmp_path / "s.json", options(tmp_path / "p.jsonl"))
    assert set(found.forwards) == {"high_noise", "low_noise"}


def test_a_bundle_in_fp8_is_refused(tmp_path, tiny_checkpoint, prompts):
    export_checkpoint(tiny_checkpoint, tmp_path / "fp8", ExportOptions(Precision.FP8))
    with pytest.raises(UserError, match="high_noise in fp8"):
        calibrate(tmp_path / "fp8", tmp_path / "s.json", options(prompts))
    assert not (tmp_path / "s.json").exists()


def test_too_few_steps_for_both_experts_are_refused_before_the_work(tmp_path, tiny_bundle, prompts):
    worked = []
    with pytest.raises(UserError, match="1 steps, none by low_noise"):
        asked = options(prompts, replace(SMALL, steps=1))
        calibrate(tiny_bundle, tmp_path / "s.json", asked, lambda *progress: worked.append(progress))
    assert list(tmp_path.iterdir()) == []
    assert worked == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "no prompts"),
        ("# none\n", "no prompts"),
        ('{"prompt": "a"', "line 1"),
        ('{"image": "a.png"}', "KeyError"),
        *((f'a hen\n{{"prompt": {none}}}', "line 2: prompt") for none in ('" "', "null", "5")),
    ],
)
def test_files_without_prompts(tmp_path, tiny_bundle, content, told):
    (tmp_path / "p.txt").write_text(content)
    with pytest.raises(UserError, match=told):
        calibrate(tiny_bundle, tmp_path / "s.json", options(tmp_path / "p.txt"))


@pytest.mark.parametrize(
    ("out", "means", "told"),
    [
        ("file/s.json", "m", r"scales .*s\.json: Not a directory"),
        ("s.json", "file/m", "means .*m: Not a directory"),
        ("s", "s", "s for two outputs"),
    ],
)
def test_places_that_will_not_do_are_told_before_anything_is_built(tmp_path, tiny_bundle, prompts, out, means, told):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=told):
        calibrate(tiny_bundle, tmp_path / out, options(prompts, means=tmp_path / means))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_earlier_file_of_means_is_kept_too(tmp_path, tiny_bundle, prompts):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        calibrate(tiny_bundle, tmp_path / "s.json", options(prompts, means=tmp_path / "m"))
    assert not (tmp_path / "s.json").exists()


def test_an_earlier_file_is_kept_unless_told(tmp_path, tiny_bundle, prompts):
    (tmp_path / "s.json").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        calibrate(tiny_bundle, tmp_path / "s.json", options(prompts))
    assert (tmp_path / "s.json").read_text() == "mine"
