"""A centred input is rounded more precisely, and the bias restores the mean."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from export.checkpoint.schema import dit_tensors
from export.exporter import export_checkpoint
from export.files.safetensors_file import read_safetensors
from export.graphs.builder import FLOAT
from export.graphs.dit import dit_graph
from export.graphs.linear import Quantised, coded_matrices
from export.graphs.taps import Forwards
from export.options import ExportOptions
from export.quantise.input_scales import LinearScales, largest_magnitude
from export.quantise.inputs import (
    CENTRED,
    FORWARDS,
    ExpertInputs,
    MeasuredInput,
    input_width,
    read_inputs,
    write_inputs,
)
from export.quantise.quantised_weights import QuantisedWeights
from tests.export.conftest import made_up
from tests.export.graphs.test_dit import inputs_for, relative_l2
from wan22.errors import UserError
from wan22.precision import Number, Precision
from wan22.specs import SPECS

TINY = SPECS["t2v-a14b-tiny"]
SPEC = TINY.dit
LINEARS = [f"blocks.{layer}.{kind}" for layer in range(SPEC.layers) for kind in CENTRED]
ENTERING = {"cross_attn.q": "cross_attn/LayerNormalization", "ffn.2": "ffn/Gelu"}  # the producer of the input


def means(size=1.0):
    random = np.random.default_rng(3)
    return {name: size * random.standard_normal(input_width(SPEC, name)).astype(np.float32) for name in LINEARS}


def measured(means):
    return {name: MeasuredInput(mean) for name, mean in means.items()}


def run(run_graph, weights, quantised, inputs=None):
    g = dit_graph(SPEC, FLOAT, None, quantised)
    read = QuantisedWeights(weights.__getitem__, SPEC, coded_matrices(g), None, inputs)
    return run_graph(g, {key: np.asarray(read(key)) for key in g.weights})(**inputs_for(SPEC, 2, 8, 8, [900.0]))[0]


def test_any_means_leave_what_is_computed_the_same(run_graph):
    """Small means hardly change FP8 rounding, so only a wrong bias could cause a difference."""
    weights = made_up(dit_tensors(SPEC))
    exact = run_graph(dit_graph(SPEC), weights)(**inputs_for(SPEC, 2, 8, 8, [900.0]))[0]
    centred = Quantised(centred=frozenset(CENTRED))
    without = relative_l2(run(run_graph, weights, Quantised()), exact)
    assert relative_l2(run(run_graph, weights, centred, measured(means(0.5))), exact) < 1.3 * without


def test_the_biases_bring_the_means_back():
    weights, subtracted = made_up(dit_tensors(SPEC)), means()
    keys = [f"blocks.0.{name}.weight" for name in ("self_attn.qkv", "self_attn.o", "ffn.2")]
    read = QuantisedWeights(weights.__getitem__, SPEC, dict.fromkeys(keys, Number.FP8), None, measured(subtracted))
    for linear in ("self_attn.k", "ffn.2"):
        key, entry = f"blocks.0.{linear}", f"blocks.0.{linear}".replace(".k", ".q")
        expected = weights[f"{key}.bias"] + weights[f"{key}.weight"] @ subtracted[entry]
        assert np.abs(read(f"{key}.bias") - expected).max() < 1e-4
    v, o = ("blocks.0.self_attn.v", "blocks.0.self_attn.o")
    moved = weights[f"{v}.bias"] + weights[f"{v}.weight"] @ subtracted["blocks.0.self_attn.q"]
    assert not read(f"{v}.bias").any()
    assert np.abs(read(f"{o}.input_mean") - (subtracted[o] - moved)).max() < 1e-5
    assert np.abs(read(f"{o}.bias") - weights[f"{o}.bias"] - weights[f"{o}.weight"] @ subtracted[o]).max() < 1e-4


def test_centring_pays_where_channels_are_large_for_every_token(run_graph):
    weights = made_up(dit_tensors(SPEC))
    for layer in range(SPEC.layers):
        weights[f"blocks.{layer}.norm3.bias"][[4, 70, 130]] += 30
        weights[f"blocks.{layer}.ffn.0.bias"][[9, 200]] += 30
    g = dit_graph(SPEC)
    values = {
        f"blocks.{n}.{kind}": g.graph.node(f"blocks.{n}/{node}").outputs[0]
        for n in range(SPEC.layers)
        for kind, node in ENTERING.items()
    }
    for value in values.values():
        g.graph.outputs.append(value)
    exact, *entering = run_graph(g, weights)(**inputs_for(SPEC, 2, 8, 8, [300.0], seed=5))
    found = {name: rows.mean(0) for name, rows in zip(values, entering, strict=True)}
    exact = run_graph(dit_graph(SPEC), weights)(**inputs_for(SPEC, 2, 8, 8, [900.0]))[0]
    centred = Quantised(centred=frozenset(ENTERING))
    assert relative_l2(run(run_graph, weights, centred, measured(found)), exact) < 0.8 * relative_l2(
        run(run_graph, weights, Quantised()), exact
    )


def test_what_is_written_is_read_again(tmp_path):
    inputs = {name: MeasuredInput(mean, np.exp(mean), 4.5) for name, mean in means().items()}
    scales = {name: LinearScales(1.0, 0.25) for name in LINEARS}
    parts = replace(PART, text=PART.text + 0.5)
    write_inputs(tmp_path / "m.safetensors", {"low_noise": ExpertInputs(inputs, scales, parts)})
    found = read_inputs(tmp_path / "m.safetensors", TINY)["low_noise"]
    for name, entry in inputs.items():
        assert np.array_equal(found.inputs[name].mean, entry.mean)
        assert np.array_equal(found.inputs[name].factor, entry.factor)
        assert found.inputs[name].crest == entry.crest
    assert found.weights == scales
    assert found.forwards.grid == (1, 2, 3)
    for leaf in FORWARDS:
        assert np.array_equal(getattr(found.forwards, leaf), getattr(parts, leaf)), leaf


def test_an_export_subtracts_them(tmp_path, tiny_checkpoint, tiny_bundle):
    stored = read_safetensors(tiny_bundle / "low_noise.safetensors")
    scales = {n: LinearScales(1.0, largest_magnitude(stored[f"{n}.weight"].read()) / 448) for n in LINEARS}
    write_inputs(tmp_path / "m", {"low_noise": ExpertInputs(measured(means()), scales)})
    options = ExportOptions(Precision.FP8, input_means=tmp_path / "m", keep_high_precision=frozenset({1}))
    export_checkpoint(tiny_checkpoint, tmp_path / "b", options)
    low, high = (read_safetensors(tmp_path / "b" / f"{e}_noise.safetensors") for e in ("low", "high"))
    key = "blocks.0.ffn.2"
    assert np.array_equal(low[f"{key}.input_mean"].read(), means()[key])
    expected = stored[f"{key}.bias"].read() + stored[f"{key}.weight"].read() @ means()[key]
    assert np.abs(low[f"{key}.bias"].read() - expected).max() < 1e-4
    assert high[f"{key}.input_mean"].read().any()  # measured without data
    assert not [name for name in (*high, *low) if "blocks.1" in name and name.endswith("input_mean")]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m, s: ({"blocks.9.ffn.0": m["blocks.0.ffn.0"]}, {"blocks.9.ffn.0": s["blocks.0.ffn.0"]}), r"blocks\.9"),
        (lambda m, s: ({"blocks.0.ffn.2": m["blocks.0.ffn.0"]}, s), r"blocks\.0\.ffn\.2\.input_mean \[256\]"),
        (lambda m, s: ({"blocks.0.ffn.0": m["blocks.0.ffn.0"] * np.nan}, s), "NaN"),
        (lambda m, s: (m, dict.fromkeys(s, LinearScales(1.0, 9.0))), "like the checkpoint's high_noise"),
    ],
    ids=["linear", "shape", "nan", "weights"],
)
def test_means_of_another_model_are_refused(tmp_path, tiny_checkpoint, change, told):
    inputs, scales = change(means(), {name: LinearScales(1.0, 0.01) for name in LINEARS})
    write_inputs(tmp_path / "m", {"high_noise": ExpertInputs(measured(inputs), scales)})
    with pytest.raises(UserError, match=told):
        export_checkpoint(tiny_checkpoint, tmp_path / "b", ExportOptions(Precision.FP8, input_means=tmp_path / "m"))
    assert not (tmp_path / "b").exists()


PART = Forwards(
    np.zeros((2, SPEC.in_channels, 1, 4, 6), np.float32),
    np.zeros((2, SPEC.freq_width), np.float32),
    np.zeros((2, 9, SPEC.text_width), np.float32),
)
OTHERS = "high_noise.forwards .* expected forwards of this model .* calibrate again"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"crest": 0.5}, r"blocks\.0\.ffn\.0\.crest 0\.5 \| expected 1 to 16, as rows have \| calibrate again"),
        ({"crest": 17.0}, r"crest 17 \| expected 1 to 16"),
        ({"crest": np.nan}, "crest holds NaN"),
        ({"factor": np.zeros(256, np.float32)}, "input_factor holds 0 or less"),
        ({"factor": np.ones(128, np.float32)}, r"input_factor \[128\]"),
        ({"video": PART.video[:, :3]}, OTHERS),
        ({"video": PART.video[:1]}, OTHERS),
        ({"video": PART.video[..., :5]}, OTHERS),
        ({"video": PART.video[0]}, OTHERS),
        ({"time_features": PART.time_features[:, :9]}, OTHERS),
        ({"text": PART.text[0]}, OTHERS),
        ({"text": np.zeros((2, 513, SPEC.text_width))}, OTHERS),
        ({"text": PART.text * np.nan}, r"forwards\.text holds NaN"),
    ],
)
def test_measurements_that_no_model_has_are_refused(tmp_path, change, told):
    entry = MeasuredInput(np.zeros(256, np.float32), change.get("factor"), change.get("crest", 4.0))
    parts = replace(PART, **{leaf: array for leaf, array in change.items() if leaf in FORWARDS})
    name, scales = "blocks.0.ffn.0", LinearScales(1.0, 0.01)
    write_inputs(tmp_path / "m", {"high_noise": ExpertInputs({name: entry}, {name: scales}, parts)})
    with pytest.raises(UserError, match=told):
        read_inputs(tmp_path / "m", TINY)


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        (np.ones(7), r"weight_scale \[7\] \| expected means of t2v-a14b-tiny"),
        (np.array(-1.0), "weight_scale is negative"),
        (np.array(np.nan), "weight_scale holds NaN"),
    ],
)
def test_weight_scales_that_no_matrix_has_are_refused(tmp_path, scale, told):
    name = "high_noise.blocks.0.ffn.0"
    values = {f"{name}.input_mean": np.zeros(256, np.float32), f"{name}.weight_scale": scale.astype(np.float32)}
    save_file(values, tmp_path / "m")
    with pytest.raises(UserError, match=told):
        read_inputs(tmp_path / "m", TINY)


def test_means_and_static_scales_exclude_each_other(tmp_path, tiny_checkpoint):
    options = ExportOptions(Precision.FP8, input_scales=tmp_path / "s", input_means=tmp_path / "m")
    with pytest.raises(UserError, match="leave one out"):
        export_checkpoint(tiny_checkpoint, tmp_path / "b", options)
