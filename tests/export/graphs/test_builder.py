"""The builder writes graphs that ONNX accepts and ONNX Runtime computes."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from export.graphs.builder import BFLOAT16, FLOAT, INT64, GraphBuilder, Placed


def line(weight_dtype=FLOAT):
    """A graph of y = x·w + 1 with external w [2, 2]."""
    g = GraphBuilder("line")
    x = g.input("x", FLOAT, ["rows", 2])
    with g.scope("layer"):
        w = g.weight("w", (2, 2), weight_dtype)
        y = g.add(g.op("MatMul", x, g.op("Cast", w, to=int(FLOAT))), g.constant(1.0, FLOAT))
    g.output("y", y, ["rows", 2])
    return g


def test_a_weight_is_read_from_its_offset_in_another_file(tmp_path):
    g = line()
    (tmp_path / "weights.bin").write_bytes(b"pad." + np.array([[1, 2], [3, 4]], np.float32).tobytes())
    g.bind({"w": Placed("weights.bin", 4, 16)}, tmp_path)
    g.save(tmp_path / "line.onnx")
    onnx.checker.check_model(tmp_path / "line.onnx", full_check=True)
    session = ort.InferenceSession(tmp_path / "line.onnx")
    assert session.run(None, {"x": np.eye(2, dtype=np.float32)})[0].tolist() == [[2, 3], [4, 5]]


def test_nodes_carry_the_path_of_their_module():
    names = [node.name for node in line().graph]
    assert names == ["layer/Cast", "layer/MatMul", "layer/Add"]


def test_equal_constants_are_stored_once():
    g = GraphBuilder("g")
    assert g.constant([1, 2]) is g.constant([1, 2])
    assert g.constant([1, 2]) is not g.constant([1.0, 2.0], FLOAT)


def test_a_weight_keeps_one_type_and_shape():
    g = line()
    with pytest.raises(ValueError, match="declared twice"):
        g.weight("w", (2, 2), BFLOAT16)


def test_edges_name_their_dimensions():
    inputs, outputs = line().edges()
    assert (inputs[0].dims, outputs[0].name, inputs[0].dtype) == (("rows", 2), "y", "float32")


def test_a_passed_through_input_gets_a_name_of_its_own():
    g = GraphBuilder("g")
    g.output("y", g.input("x", INT64, [1]), [1], INT64)
    assert [node.op_type for node in g.graph] == ["Identity"]
