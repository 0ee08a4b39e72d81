"""A transformer cut into stages computes what the whole graph computes, for all tokens or slices of them."""

import itertools
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from export.checkpoint.schema import dit_tensors
from export.graphs.blocks import stage_graphs
from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16
from export.graphs.dit import dit_graph
from export.graphs.linear import FLOAT8, Quantised, coded_matrices
from export.quantise.inputs import CENTRED, MeasuredInput, input_width
from export.quantise.quantised_weights import QuantisedWeights
from tests.export.conftest import made_up
from tests.export.graphs.test_dit import inputs_for, relative_l2
from wan22.precision import Number
from wan22.specs import SPECS

MODELS = ["t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny"]
SHAPE = (3, 10, 18)  # 135 tokens
IN_ONNX = {"float8_e4m3fn": onnx.TensorProto.FLOAT8E4M3FN}
INT8 = Quantised(linears=Number.INT8, centred=frozenset(CENTRED), smoothed=frozenset(CENTRED))
MIXED = replace(INT8, exceptions={"ffn.2": Number.FP8, "self_attn.o": Number.BF16}, smoothed=frozenset({"ffn.0"}))


def made_up_inputs(spec, quantised):
    """Means and factors for the linears that ``quantised`` centres."""
    random, found = np.random.default_rng(1), {}
    for linear in (f"blocks.{n}.{kind}" for n in range(spec.layers) for kind in quantised.centred):
        mean, factor = random.standard_normal((2, input_width(spec, linear))).astype(np.float32)
        if quantised.number(linear) is not None:
            smooth = linear.split(".", 2)[2] in quantised.smoothed
            found[linear] = MeasuredInput(0.1 * mean, np.exp2(factor) if smooth else None)
    return found


def as_value(array):
    """An array as ONNX Runtime's, also of a type that numpy knows only by ml_dtypes."""
    if (kind := IN_ONNX.get(array.dtype.name)) is None:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), kind)


class Stages:
    """The stages of a transformer on ONNX Runtime with weights ``stored`` under their official names."""

    def __init__(self, folder, spec, compute, fp8, stored):
        self.spec, self.stored, self.graphs = spec, stored, stage_graphs(spec, compute, fp8)
        self.sessions = {}
        for name, g in self.graphs.items():
            g.edges()
            g.save(folder / f"{name}.onnx")
            self.sessions[name] = ort.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])

    def weight(self, name, block):
        prefix = f"blocks.{block}."
        module, parts, leaf = name.rsplit(".", 2) if name.count(".") > 1 else ("", "", "")
        for key in (prefix + name, name):
            if key in self.stored:
                return self.stored[key]
        return np.concatenate([self.stored[f"{prefix}{module}.{part}.{leaf}"] for part in parts])

    def __call__(self, name, block=0, **inputs):
        session, feeds = self.sessions[name], {}
        for key, value in self.graphs[name].weights.items():
            array = np.asarray(self.weight(key, block)).astype(value.dtype.numpy(), copy=False)
            feeds[key] = as_value(array.reshape(tuple(value.shape)))
        for key, value in inputs.items():
            feeds[key] = as_value(value) if isinstance(value, np.ndarray) else value
        made = session.run_with_ort_values([o.name for o in session.get_outputs()], feeds)
        return dict(zip([o.name for o in session.get_outputs()], made, strict=True))

    def velocity(self, given, slices=1):
        spec, (frames, height, width) = self.spec, given["latents"].shape[2:]
        video = np.concatenate([given[name] for name in ("latents", "condition") if name in given], 1)
        grid = (frames, height // 2, 2, width // 2, 2)
        patches = video[0].reshape(-1, *grid).transpose(1, 2, 4, 0, 3, 5).reshape(-1, 4 * spec.in_channels)
        x = self("patches", patches=patches)["x"].numpy()
        for block in range(spec.layers):
            x = self.block(block, x, given, slices)
        time = self("time", time_features=given["time_features"])["time"]
        y = self("velocity", x=x, time=time, **self.first_frame(given))["patches"].numpy()
        y = y.reshape(frames, height // 2, width // 2, 1, 2, 2, spec.out_channels)
        return y.transpose(6, 0, 3, 1, 4, 2, 5).reshape(1, spec.out_channels, frames, height, width)

    def first_frame(self, given):
        frames, rows, columns = given["rope_cos"].shape[:3]
        mask = np.arange(frames * rows * columns) < rows * columns
        return {"first_frame": mask.astype(np.float32)[:, None]} if self.spec.time_rows > 1 else {}

    def block(self, block, x, given, slices=1, centred=None):
        """``x`` behind one block. ``centred`` gives the constants of FP8 attention for the inputs of ``qkv``."""
        time = self("time", time_features=given["time_features"])["time_modulation"]
        rope = {name: given[name].reshape(len(x), -1) for name in ("rope_cos", "rope_sin")}
        text = self("text_kv", block, **self("text", text=given["text"]))
        first, cuts = self.first_frame(given), np.array_split(np.arange(len(x)), slices)

        def cut(rows, arrays):
            return {name: array[rows] for name, array in arrays.items()}

        def joined(parts, name):
            parts = [part[name] for part in parts]
            return parts[0] if len(parts) == 1 else np.concatenate([part.numpy() for part in parts])

        attends = centred(block, x, {"time_modulation": time} | first | rope) if centred else {}
        parts = [self("qkv", block, x=x[r], time_modulation=time, **cut(r, rope | first), **attends) for r in cuts]
        scale = {name: value for name, value in attends.items() if name == "v_scale"}
        o = self("attend", block, **{name: joined(parts, name) for name in "qkv"}, **scale)
        pieces = [o] if slices == 1 else [cut(r, {name: value.numpy() for name, value in o.items()}) for r in cuts]
        parts = [
            self("rest", block, x=x[r], **rows, time_modulation=time, **text, **cut(r, first))
            for r, rows in zip(cuts, pieces, strict=True)
        ]
        return np.concatenate([part["x_out"].numpy() for part in parts])


def given_to(spec):
    return inputs_for(spec, *SHAPE, [0.0, 812.0] if spec.time_rows == 2 else [937.5])


@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_stages_equal_the_whole_graph(tmp_path, run_graph, name, slices):
    spec = SPECS[name].dit
    weights, given = made_up(dit_tensors(spec)), given_to(spec)
    expected = run_graph(dit_graph(spec), weights)(**given)[0]
    found = Stages(tmp_path, spec, FLOAT, None, weights).velocity(given, slices)
    assert relative_l2(found, expected) <= 1.5e-6


def quantised_blocks(run_graph, spec, quantised):
    """The stored tensors, and the residual stream before and behind every block of the whole graph."""
    weights, g = made_up(dit_tensors(spec)), dit_graph(spec, FLOAT, None, quantised)
    read = QuantisedWeights(weights.__getitem__, spec, coded_matrices(g), None, made_up_inputs(spec, quantised))
    stored = {key: np.asarray(read(key)) for key in g.weights}
    streams = [next(node for node in g.graph if node.name == "patch_embedding/Transpose").outputs[0]]
    for block in range(spec.layers):
        ends = [node for node in g.graph if node.name.startswith(f"blocks.{block}/ffn/Add")]
        streams.append(ends[-1].outputs[0])
    g.graph.outputs.extend(streams)
    return stored, run_graph(g, stored, prepack=False)(**given_to(spec))[1:]


@pytest.mark.parametrize(
    ("name", "quantised"), [*((name, Quantised()) for name in MODELS), (MODELS[0], INT8), (MODELS[2], MIXED)]
)
def test_quantised_blocks_equal_those_of_the_whole_graph(tmp_path, run_graph, name, quantised):
    spec = SPECS[name].dit
    stored, streams = quantised_blocks(run_graph, spec, quantised)
    stages = Stages(tmp_path, spec, FLOAT, quantised, stored)
    for block, (before, behind) in enumerate(itertools.pairwise(streams)):
        assert np.array_equal(stages.block(block, before, given_to(spec)), behind)


def test_fp8_attention_equals_the_whole_graphs_where_k_is_centred_and_v_scaled_alike(tmp_path, run_graph):
    spec, attending = SPECS["t2v-a14b-tiny"].dit, Quantised(self_attention=True)
    stored, streams = quantised_blocks(run_graph, spec, attending)
    (tmp_path / "wide").mkdir()
    wide = Stages(tmp_path / "wide", spec, FLOAT, Quantised(), stored)

    def centred(block, x, inputs):
        made = wide("qkv", block, x=x, **inputs)
        k, v = (made[name].numpy().reshape(len(x), -1) for name in "kv")
        return {"k_center": k.mean(0, keepdims=True), "v_scale": np.abs(v).max(0, keepdims=True) / np.float32(440)}

    stages = Stages(tmp_path, spec, FLOAT, attending, stored)
    for block, (before, behind) in enumerate(itertools.pairwise(streams)):
        assert np.array_equal(stages.block(block, before, given_to(spec), centred=centred), behind)


def array_of(value):
    """The array of a value of ONNX Runtime, which hands FP8 out as bytes."""
    array = value.numpy()
    return array.view(FLOAT8.numpy()) if "float8" in value.data_type() else array


def divided(stages, block, x, given, attends):
    """``x`` behind one block whose tokens and heads two devices divide; the first has one token more."""
    time = stages("time", time_features=given["time_features"])["time_modulation"]
    text = stages("text_kv", block, **stages("text", text=given["text"]))
    of_tokens = {name: given[name].reshape(len(x), -1) for name in ("rope_cos", "rope_sin")}
    first, rows = stages.first_frame(given), np.array_split(np.arange(len(x)), 2)
    cut = [{name: array[r] for name, array in ({"x": x} | of_tokens | first).items()} for r in rows]
    sent = [stages("qkv_of_2", block, time_modulation=time, **own, **attends) for own in cut]
    every = [{n: np.concatenate([array_of(part[n])[device] for part in sent]) for n in "qkv"} for device in range(2)]
    attended = [stages("attend_of_2", block, **each)["o_by_head"].numpy() for each in every]
    scale = {name: value for name, value in attends.items() if name == "v_scale"}
    behind = []
    for r in rows:
        joined = stages("join_of_2", block, o_by_head=np.concatenate([o[:, r] for o in attended]), **scale)
        own = {name: array[r] for name, array in ({"x": x} | first).items()}
        behind.append(stages("rest", block, **own, **joined, time_modulation=time, **text)["x_out"].numpy())
    return np.concatenate(behind)


@pytest.mark.parametrize("in_attention", [False, True])
@pytest.mark.parametrize("name", ["t2v-a14b-tiny", "ti2v-5b-tiny"])
def test_two_devices_that_divide_a_block_in_fp8_compute_the_same_bits(tmp_path, run_graph, name, in_attention):
    spec, fp8 = SPECS[name].dit, Quantised(self_attention=in_attention)
    stored, streams = quantised_blocks(run_graph, spec, fp8)
    stages, rng = Stages(tmp_path, spec, FLOAT, fp8, stored), np.random.default_rng(0)
    attends = {}
    if in_attention:
        attends["v_scale"] = rng.uniform(0.01, 0.02, (1, spec.width)).astype(np.float32)
        attends["k_center"] = rng.standard_normal((1, spec.width), np.float32)
    given, x = given_to(spec), streams[0]
    alone = stages.block(0, x, given, centred=lambda *_: attends)
    assert np.array_equal(divided(stages, 0, x, given, attends), alone)


@pytest.mark.parametrize(
    "quantised", [None, Quantised(True, True), INT8, MIXED], ids=["16 bits", "fp8-attn", "int8", "mixed"]
)
@pytest.mark.parametrize("compute", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("name", MODELS)
def test_onnx_accepts_every_stage(tmp_path, name, compute, quantised):
    for stage, g in stage_graphs(SPECS[name].dit, compute, quantised).items():
        g.edges()
        g.save(tmp_path / f"{stage}.onnx")
        onnx.checker.check_model(tmp_path / f"{stage}.onnx", full_check=True)
        assert not {"Gather", "ScatterND"} & {node.op_type for node in g.graph}


@pytest.mark.parametrize("name", ["t2v-a14b", "i2v-a14b", "ti2v-5b"])
def test_stages_take_every_official_tensor_once(name):
    """Joined inputs count for their parts; only the table of modulation is read by two stages.

    The stages for several devices take what those for one take.
    """
    spec = SPECS[name].dit
    taken, graphs = {}, stage_graphs(spec)
    for count in {g.groups for g in graphs.values()} - {1}:
        assert {f"{stage}_of_{count}" for stage in ("qkv", "attend", "join")} <= graphs.keys()
    for stage, g in graphs.items():
        if g.groups > 1:
            of_one = stage.removesuffix(f"_of_{g.groups}").replace("join", "attend")
            assert g.weights.keys() == graphs[of_one].weights.keys()
            continue
        for key, value in g.weights.items():
            taken.setdefault(key, []).append((stage, int(np.prod(tuple(value.shape)))))
    assert {key for key, users in taken.items() if len(users) > 1} == {"modulation"}
    official = {key: int(np.prod(shape)) for key, shape in dit_tensors(spec).items()}
    one_block = sum(size for key, size in official.items() if key.startswith("blocks.0."))
    rest = sum(size for key, size in official.items() if not key.startswith("blocks."))
    assert sum(users[0][1] for users in taken.values()) == one_block + rest
