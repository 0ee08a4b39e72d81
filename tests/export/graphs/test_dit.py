"""The transformer graph computes what diffusers' WanTransformer3DModel computes."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from diffusers import WanTransformer3DModel

from export.checkpoint.keys import diffusers_names, dit_config
from export.checkpoint.schema import dit_tensors
from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16, Placed
from export.graphs.dit import LatentDims, dit_graph
from export.graphs.weights_file import declare_weights
from runtime.forward_inputs import rope_tables, time_features
from tests.export.conftest import made_up
from wan22.specs import PATCH, SPECS, T2V_A14B, TEXT_TOKENS

FORBIDDEN = {"ScatterND", "ScatterElements", "NonZero", "Loop", "Scan", "If", "GatherND", "Resize"}


def inputs_for(spec, frames, height, width, timesteps, seed=1):
    rng = np.random.default_rng(seed)
    video = (frames, height, width)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    cos, sin = rope_tables(spec.head_width, frames, height // 2, width // 2)
    made = {
        "latents": normal(1, spec.out_channels, *video),
        "time_features": time_features(np.array(timesteps, np.float32), spec.freq_width),
        "text": normal(1, TEXT_TOKENS, spec.text_width),
        "rope_cos": cos,
        "rope_sin": sin,
    }
    if spec.condition_channels:
        made["condition"] = normal(1, spec.condition_channels, *video)
    return made


def reference(model, weights, inputs, timesteps):
    """The velocity of diffusers' model, built from official weights through the key map."""
    config = {k: v for k, v in dit_config(model).items() if not k.startswith("_")}
    module = WanTransformer3DModel(**config).eval()
    names = diffusers_names("dit", model)
    module.load_state_dict({names[k]: torch.from_numpy(v) for k, v in weights.items()})
    parts = [inputs[k] for k in ("latents", "condition") if k in inputs]
    latents = torch.from_numpy(np.concatenate(parts, 1))
    t = torch.tensor([timesteps[0]])
    if model.dit.time_rows == 2:
        frames, rows, columns = inputs["rope_cos"].shape[:3]
        of_frame = torch.tensor([timesteps[0], *[timesteps[1]] * (frames - 1)])
        t = of_frame.repeat_interleave(rows * columns)[None]
    with torch.no_grad():
        return module(latents, t, torch.from_numpy(inputs["text"]), return_dict=False)[0].numpy()


def relative_l2(found, expected):
    return np.linalg.norm((found - expected).ravel()) / np.linalg.norm(expected.ravel())


@pytest.mark.parametrize("name", ["t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny"])
@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 8, 4)], ids=["video", "image"])
def test_equals_diffusers_at_any_size(run_graph, name, shape):
    model = SPECS[name]
    timesteps = [0.0, 812.0] if model.dit.time_rows == 2 else [937.5]
    weights, inputs = made_up(dit_tensors(model.dit)), inputs_for(model.dit, *shape, timesteps)
    velocity = run_graph(dit_graph(model.dit), weights)(**inputs)[0]
    assert relative_l2(velocity, reference(model, weights, inputs, timesteps)) < 1e-5


def test_one_row_of_time_equals_two_equal_rows(run_graph):
    two = SPECS["ti2v-5b-tiny"].dit
    one = replace(two, time_rows=1)
    weights = made_up(dit_tensors(two))
    a = run_graph(dit_graph(two), weights)(**inputs_for(two, 3, 4, 6, [500.0, 500.0]))[0]
    b = run_graph(dit_graph(one), weights)(**inputs_for(one, 3, 4, 6, [500.0]))[0]
    assert np.abs(a - b).max() <= 1e-6


def test_float16_stays_close_to_float32(run_graph):
    spec = SPECS["t2v-a14b-tiny"].dit
    weights, inputs = made_up(dit_tensors(spec)), inputs_for(spec, 3, 4, 6, [900.0])
    full = run_graph(dit_graph(spec), weights)(**inputs)[0]
    half = run_graph(dit_graph(spec, FLOAT16), weights)(**inputs)[0]
    assert 1e-6 < relative_l2(half, full) < 5e-3


def test_fixed_shapes_stand_in_the_graph(run_graph):
    spec = SPECS["t2v-a14b-tiny"].dit
    g = dit_graph(spec, dims=LatentDims(3, 4, 6))
    inputs, outputs = g.edges()
    assert {t.name: t.dims for t in inputs}["rope_cos"] == (3, 2, 3, 64)
    assert outputs[0].dims == (1, 16, 3, 4, 6)
    run_graph(g, made_up(dit_tensors(spec)))(**inputs_for(spec, 3, 4, 6, [900.0]))


@pytest.mark.parametrize("compute", [FLOAT, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("name", ["t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny"])
def test_operators_are_those_that_compile_well(name, compute):
    spec = SPECS[name].dit
    kinds = [node.op_type for node in dit_graph(spec, compute).graph]
    assert not FORBIDDEN & set(kinds)
    assert kinds.count("Softmax") == 2 * spec.layers  # each attention in its MatMul form
    assert kinds.count("Gemm") == 8 * spec.layers + 6  # q, k and v of self-attention are one


@pytest.mark.parametrize("compute", [FLOAT, FLOAT16, BFLOAT16])
def test_onnx_accepts_the_graph(tmp_path, compute):
    g = dit_graph(SPECS["ti2v-5b-tiny"].dit, compute)
    g.bind({key: Placed("weights.bin", 0, value.size_bytes) for key, value in declare_weights([g]).items()}, tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(2**22))
    g.save(tmp_path / "dit.onnx")
    onnx.checker.check_model(tmp_path / "dit.onnx", full_check=True)


@pytest.mark.parametrize("name", ["t2v-a14b", "i2v-a14b", "ti2v-5b"])
def test_full_size_graph_declares_every_official_tensor(name):
    spec = SPECS[name].dit
    declared = {key: tuple(value.shape) for key, value in dit_graph(spec).weights.items()}
    assert declared == dit_tensors(spec)


def test_the_first_frame_of_the_5b_has_the_first_row_of_time(run_graph):
    """In a model without blocks, which mix the tokens, only those of the first latent frame see the first row."""
    spec = replace(SPECS["ti2v-5b-tiny"].dit, layers=0)
    run, inputs = run_graph(dit_graph(spec), made_up(dit_tensors(spec))), inputs_for(spec, 3, 4, 6, [500.0, 800.0])
    both, first_changed, rest_changed = (
        run(**inputs | {"time_features": time_features(np.array(times, np.float32), spec.freq_width)})[0]
        for times in ([500.0, 800.0], [100.0, 800.0], [500.0, 100.0])
    )
    changed = [(both != other).any(axis=(0, 1, 3, 4)).tolist() for other in (first_changed, rest_changed)]
    assert changed == [[True, False, False], [False, True, True]]


def test_sensitive_weights_stay_float32_in_a_bfloat16_graph():
    weights = dit_graph(SPECS["t2v-a14b-tiny"].dit, BFLOAT16).weights
    kept = {k for k, v in weights.items() if v.dtype == FLOAT}
    assert {k for k in weights if "modulation" in k or "norm" in k or "time_" in k or k.startswith("head.")} == kept
    assert weights["blocks.0.ffn.0.weight"].dtype == BFLOAT16


def test_patches_are_two_by_two():
    assert PATCH == (1, 2, 2)
    assert T2V_A14B.dit.head_width == 128
