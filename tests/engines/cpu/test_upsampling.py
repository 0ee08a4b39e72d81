"""A decoder's pictures are convolved before they are doubled, and the frames are the same."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from engines.cpu.match import ints
from engines.cpu.upsampling import convolve_before_doubling
from export.checkpoint.schema import vae_tensors
from export.graphs.vae_decoder import vae_decoder
from tests.export.conftest import made_up
from wan22.specs import SPECS

ROWS, COLUMNS = 3, 5
every_graph = pytest.mark.parametrize(
    ("name", "first"), [(name, first) for name in ("t2v-a14b-tiny", "ti2v-5b-tiny") for first in (True, False)]
)


def decoder(name, first):
    spec = SPECS[name].vae
    g, weights = vae_decoder(spec, first), made_up(vae_tensors(spec))
    for key, value in g.weights.items():
        value.const_value = ir.tensor(weights[key], name=key)
    return ir.Model(g.graph, ir_version=11)


def outputs(model, sizes=(ROWS, COLUMNS)):
    rng, named = np.random.default_rng(0), dict(zip(("height", "width"), sizes, strict=True))
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    sides = {
        f"{scale}*{name}" if scale > 1 else name: scale * size for name, size in named.items() for scale in (1, 2, 4, 8)
    }
    given = {
        edge.name: rng.standard_normal([sides.get(dim, dim) for dim in edge.shape], dtype=np.float32)
        for edge in session.get_inputs()
    }
    return session.run(None, given)


def kernels(model):
    return [ints(node, "kernel_shape") for node in model.graph if node.op_type == "Conv"]


@every_graph
def test_frames_and_caches_stay_the_same(name, first):
    fitted = decoder(name, first)
    assert convolve_before_doubling(fitted) == 3
    for ours, expected in zip(outputs(fitted), outputs(decoder(name, first)), strict=True):
        assert ours.shape == expected.shape
        assert np.linalg.norm(ours - expected) <= 2e-6 * np.linalg.norm(expected)


@every_graph
def test_each_becomes_four_convolutions_of_the_small_picture(name, first):
    before, fitted = decoder(name, first), decoder(name, first)
    convolve_before_doubling(fitted)
    assert kernels(fitted).count((1, 2, 2)) == 4 * 3
    assert kernels(before).count((1, 3, 3)) - kernels(fitted).count((1, 3, 3)) == 3


def test_a_shortcut_that_no_convolution_follows_stays():
    model = decoder("ti2v-5b-tiny", first=False)
    convolve_before_doubling(model)
    assert any("avg_shortcut" in str(node.name) and node.op_type == "Concat" for node in model.graph)


def test_a_convolution_with_other_padding_stays():
    model = decoder("t2v-a14b-tiny", first=True)
    for node in model.graph:
        if node.op_type == "Conv" and "resample" in str(node.name):
            node.attributes["pads"] = ir.AttrInt64s("pads", [0, 0, 0, 0, 2, 2])
    assert convolve_before_doubling(model) == 0
