"""What an ONNX file points at is found wherever it stands in it, and a damaged file is no more than refused."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.engine_onnxruntime import OnnxRuntimeEngine
from wan22.bundle import Bundle, file_entry, open_bundle
from wan22.errors import UserError
from wan22.onnx_file import Stored, check_graphs, stored_tensors


def external(name, location="weights.bin", **more):
    tensor = TensorProto(name=name, dims=[2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def inside():
    return numpy_helper.from_array(np.zeros(2, np.float32), "inside")


def graph(nodes=(), initializers=()):
    return helper.make_graph(list(nodes), "g", [], [], list(initializers))


def model(graph, **more):
    return helper.make_model(graph, **more).SerializeToString()


def constant(location):
    return helper.make_node("Constant", [], ["y"], value=external("t", location))


def sparse():
    values, indices = external("values", "sparse.bin"), external("indices", "indices.bin")
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[4])


WITH_SPARSE = graph()
WITH_SPARSE.sparse_initializer.append(sparse())
FUNCTION = helper.make_function("d", "f", [], ["y"], [constant("function.bin")], [helper.make_opsetid("", 23)])
BRANCHES = {"then_branch": graph([constant("then.bin")]), "else_branch": graph([], [external("t", "else.bin")])}
SEVERAL = helper.make_node("Several", [], ["y"], tensors=[external("a", "a.bin"), external("b", "b.bin")])
TRAINED = helper.make_model(graph())
TRAINED.training_info.append(onnx.TrainingInfoProto(algorithm=graph([], [external("t", "training.bin")])))


@pytest.mark.parametrize(
    ("content", "locations"),
    [
        (model(graph([], [inside(), external("t")])), {"weights.bin"}),
        (model(graph([constant("constant.bin")])), {"constant.bin"}),
        (model(graph([helper.make_node("If", ["c"], ["y"], **BRANCHES)])), {"then.bin", "else.bin"}),
        (model(graph([SEVERAL])), {"a.bin", "b.bin"}),
        (model(WITH_SPARSE), {"sparse.bin", "indices.bin"}),
        (model(graph(), functions=[FUNCTION]), {"function.bin"}),
        (TRAINED.SerializeToString(), {"training.bin"}),
        (model(graph([], [inside()])), set()),
    ],
    ids=["initializer", "constant", "subgraphs", "lists", "sparse", "function", "training", "none"],
)
def test_every_place_of_a_tensor_is_looked_at(content, locations):
    assert {stored.location for stored in stored_tensors(content)} == locations


def test_offset_and_length_are_read():
    assert list(stored_tensors(model(graph([], [external("t", offset=64, length=8)])))) == [
        Stored("weights.bin", 64, 8)
    ]


def test_a_real_graph_names_its_weights_and_nothing_else(tiny_bundle):
    bundle = open_bundle(tiny_bundle, "graphs")
    check_graphs(bundle)
    for component in bundle.manifest.components:
        found = {stored.location for stored in stored_tensors(bundle.path(component.graph).read_bytes())}
        assert found == {file.path for file in component.weights}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no graph"),
        (b"<html>", "wire type 4"),
        (b"\x3a\xff", "it ends in a number"),
        (b"\x3a\x7f\x00", "127 bytes"),
    ],
)
def test_what_is_no_onnx_file_is_told(content, told):
    with pytest.raises(ValueError, match=told):
        list(stored_tensors(content))


def test_damage_is_a_value_error_whatever_it_is(tiny_bundle):
    whole = bytearray((tiny_bundle / "text_encoder.onnx").read_bytes())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        content = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, len(content), rng.integers(1, 8)):
            content[place] = rng.integers(0, 256)
        try:
            list(stored_tensors(bytes(content)))
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.fixture
def pointing(tmp_path):
    """``pointing(location, ...)`` → a bundle of one graph whose only tensor lies there."""

    def made(location, **more):
        (tmp_path / "weights.bin").write_bytes(bytes(8))
        (tmp_path / "other.bin").write_bytes(bytes(8))
        (tmp_path / "dit.onnx").write_bytes(model(graph([], [external("t", location, **more)])))
        weights = (file_entry(tmp_path, tmp_path / "weights.bin"),)
        from wan22.bundle import Manifest, Source
        from wan22.component import Component
        from wan22.precision import Precision
        from wan22.specs import SPECS

        entry = file_entry(tmp_path, tmp_path / "dit.onnx")
        component = Component("dit", entry, weights, (), (), Precision.FP32)
        source = Source("checkpoint", "official", "0")
        spec = SPECS["t2v-a14b-tiny"]
        return Bundle(tmp_path, Manifest("graphs", spec, Precision.FP32, (component,), (), source, "wan-trt export"))

    return made


def test_weights_that_the_manifest_names_are_accepted(pointing):
    check_graphs(pointing("weights.bin", offset=4, length=4))
    check_graphs(pointing("./weights.bin"))


@pytest.mark.parametrize(
    ("location", "more"),
    [
        ("../outer.bin", {}),
        ("/etc/passwd", {}),
        ("folder/../../outer.bin", {}),
        ("other.bin", {}),
        ("", {}),
        ("weights.bin", {"offset": 4, "length": 8}),
        ("weights.bin", {"offset": -8}),
        ("weights.bin", {"offset": "many"}),
    ],
)
def test_anything_else_is_refused_before_it_is_opened(pointing, location, more):
    bundle = pointing(location, **more)
    with pytest.raises(UserError, match=r"dit\.onnx"):
        check_graphs(bundle)
    (component,) = bundle.manifest.components
    with pytest.raises(UserError, match=r"dit\.onnx"), OnnxRuntimeEngine(bundle.folder, component):
        pass


def test_halves_of_a_graph_are_looked_at_too(pointing):
    bundle = pointing("../outer.bin")
    (component,) = bundle.manifest.components
    (bundle.folder / "whole.onnx").write_bytes(model(graph()))
    whole = file_entry(bundle.folder, bundle.folder / "whole.onnx")
    halved = replace(component, graph=whole, halves=(component.graph,))
    with pytest.raises(UserError, match=r"reads '\.\./outer\.bin'"):
        check_graphs(Bundle(bundle.folder, replace(bundle.manifest, components=(halved,))))
