"""The text encoder graph computes what transformers' UMT5EncoderModel computes, without padding."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from export.checkpoint.keys import diffusers_names, text_encoder_config
from export.checkpoint.schema import text_encoder_tensors
from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16, Placed
from export.graphs.linear import coded_matrices
from export.graphs.text_encoder import relative_buckets, text_encoder_graph, text_stages
from export.graphs.weights_file import declare_weights
from export.quantise.quantised_weights import QuantisedWeights
from tests.export.conftest import made_up
from tests.export.graphs.test_blocks import as_value
from wan22.specs import SPECS

MODEL = SPECS["t2v-a14b-tiny"]
SPEC = MODEL.text_encoder


def token_ids(count, seed=0):
    return np.random.default_rng(seed).integers(2, SPEC.vocab, (1, count))


def reference(weights, ids):
    """The embeddings of transformers' model, from ids padded to 512 with a mask like in the pipelines."""
    module = UMT5EncoderModel(UMT5Config(**text_encoder_config(MODEL))).eval()
    names = diffusers_names("text_encoder", MODEL)
    module.load_state_dict({names[k]: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    padded, mask = np.zeros((2, 1, 512), np.int64)
    padded[:, : ids.shape[1]], mask[:, : ids.shape[1]] = ids, 1
    with torch.no_grad():
        return module(torch.from_numpy(padded), torch.from_numpy(mask))[0][:, : ids.shape[1]].numpy()


@pytest.mark.parametrize("count", [1, 2, 17, 200, 512])
def test_unpadded_prompts_equal_padded_ones_of_transformers(run_graph, count):
    weights, ids = made_up(text_encoder_tensors(SPEC)), token_ids(count)
    found = run_graph(text_encoder_graph(SPEC), weights)(input_ids=ids)[0]
    expected = reference(weights, ids)
    assert found.shape == (1, count, SPEC.width)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5


def test_float16_keeps_the_last_projection_in_float32(run_graph):
    g = text_encoder_graph(SPEC, FLOAT16)
    assert {key for key, value in g.weights.items() if "fc" in key and value.dtype == FLOAT} == {
        f"blocks.{i}.ffn.fc2.weight" for i in range(SPEC.layers)
    }
    weights, ids = made_up(text_encoder_tensors(SPEC)), token_ids(9)
    half = run_graph(g, weights)(input_ids=ids)[0]
    full = run_graph(text_encoder_graph(SPEC), weights)(input_ids=ids)[0]
    assert np.linalg.norm(half - full) / np.linalg.norm(full) < 5e-3


def test_fp8_is_for_the_feed_forward_alone_and_stays_near(run_graph):
    g = text_encoder_graph(SPEC, fp8_feed_forward=True)
    in_fp8 = coded_matrices(g)
    assert list(in_fp8) == [
        f"blocks.{i}.ffn.{leaf}.weight" for i in range(SPEC.layers) for leaf in ("gate.0", "fc1", "fc2")
    ]
    weights, ids = made_up(text_encoder_tensors(SPEC)), token_ids(40)
    read = QuantisedWeights(weights.__getitem__, MODEL.dit, in_fp8)
    found = run_graph(g, {key: np.asarray(read(key)) for key in g.weights})(input_ids=ids)[0]
    exact = run_graph(text_encoder_graph(SPEC), weights)(input_ids=ids)[0]
    # A product of random E4M3 operands is 3.7 % off; three in a row give sqrt(3) times that per layer, in two layers.
    assert 0.01 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.037 * 6**0.5


def test_layers_in_fp8_compute_what_the_whole_graph_computes(run_graph, tmp_path):
    g = text_encoder_graph(SPEC, fp8_feed_forward=True)
    weights, ids = made_up(text_encoder_tensors(SPEC)), token_ids(40)
    in_fp8 = coded_matrices(g)
    read = QuantisedWeights(weights.__getitem__, MODEL.dit, in_fp8)
    stored = {key: np.asarray(read(key)) for key in g.weights}
    expected = run_graph(g, stored)(input_ids=ids)[0]
    x = stored["token_embedding.weight"][ids[0]].astype(np.float32)
    stages = text_stages(SPEC, fp8_feed_forward=True)
    for name, blocks in (("layer", range(SPEC.layers)), ("norm", [0])):
        stages[name].edges()
        stages[name].save(tmp_path / "stage.onnx")
        session = ort.InferenceSession(tmp_path / "stage.onnx", providers=["CPUExecutionProvider"])
        for block in blocks:
            feeds = {"x": as_value(x)}
            for key, value in stages[name].weights.items():
                array = stored.get(f"blocks.{block}.{key}", stored.get(key))
                feeds[key] = as_value(array.astype(value.dtype.numpy()).reshape(tuple(value.shape)))
            (made,) = session.run_with_ort_values([session.get_outputs()[0].name], feeds)
            x = made.numpy()
    assert np.linalg.norm(x - expected) / np.linalg.norm(expected) < 1e-2  # roundings to FP8 flip where sums differ


def test_buckets_grow_where_the_reference_grows_them():
    forward = relative_buckets(SPEC)[511:]
    starts = [int((forward >= 16 + bucket).argmax()) for bucket in range(8, 16)]
    assert starts == [8, 12, 16, 23, 32, 46, 64, 91]
    assert forward[0] == 0
    assert relative_buckets(SPEC)[510] == 1


@pytest.mark.parametrize("compute", [FLOAT, FLOAT16, BFLOAT16])
def test_onnx_accepts_the_graph(tmp_path, compute):
    g = text_encoder_graph(SPEC, compute)
    g.bind({key: Placed("weights.bin", 0, value.size_bytes) for key, value in declare_weights([g]).items()}, tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(2**22))
    g.save(tmp_path / "text_encoder.onnx")
    onnx.checker.check_model(tmp_path / "text_encoder.onnx", full_check=True)
    assert sum(node.op_type == "Attention" for node in g.graph) == SPEC.layers


@pytest.mark.parametrize("name", ["t2v-a14b", "t2v-a14b-tiny"])
def test_every_official_tensor_is_declared(name):
    spec = SPECS[name].text_encoder
    declared_shapes = {key: tuple(value.shape) for key, value in text_encoder_graph(spec).weights.items()}
    assert declared_shapes == text_encoder_tensors(spec)
