"""Every node of every graph has a CUDA kernel, or the build is refused with a list."""

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from engines.cuda.kernels import KERNELS, check_kernels
from engines.cuda.passes import OPSET, lower_opset
from export.graphs.builder import BFLOAT16, FLOAT, GraphBuilder
from wan22.errors import UserError


def graph(op, dtype=FLOAT, **attributes):
    g = GraphBuilder("g")
    g.output("y", g.op(op, g.input("x", dtype, [1, 1, 4]), **attributes), [1, 1, 4], dtype)
    return ir.Model(g.graph, ir_version=11)


def test_nodes_are_counted_by_operator_and_type():
    assert check_kernels(graph("Gelu", BFLOAT16), "g") == {"Gelu BFLOAT16": 1}


@pytest.mark.parametrize(
    ("op", "dtype", "listed"),
    [
        ("Sin", FLOAT, "1 Sin FLOAT"),  # not in the table
        ("Reciprocal", BFLOAT16, "1 Reciprocal BFLOAT16"),  # not in this type
        ("Erf2", FLOAT, "1 Erf2 FLOAT"),  # no operator of ONNX
    ],
)
def test_a_node_without_a_kernel_is_refused_by_name_and_type(op, dtype, listed):
    with pytest.raises(UserError, match=f"vae has nodes without a CUDA kernel: {listed} "):
        check_kernels(graph(op, dtype), "vae")


def test_a_kernel_serves_the_version_of_its_schema_only():
    """The kernel of Pad is that of opset 18, its schema changed later; so did Identity."""
    g = GraphBuilder("g")
    x = g.input("x", FLOAT, [4])
    g.output("y", g.op("Pad", x, g.constant([1, 1])), [6])
    model = ir.Model(g.graph, ir_version=11)
    with pytest.raises(UserError, match="1 Pad FLOAT"):
        check_kernels(model, "g")
    lower_opset(model)
    assert check_kernels(model, "g") == {"Pad FLOAT": 1}


def test_onnxruntime_has_that_rule():
    """On its own CPU kernels: GlobalLpPool has one from opset 2 on, and the schema of opset 22 finds none."""
    node = helper.make_node("GlobalLpPool", ["x"], ["y"])
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [1, 1, 4]), ("y", None))
    )

    def session(opset):
        model = helper.make_model(
            helper.make_graph([node], "g", [x], [y]), opset_imports=[helper.make_opsetid("", opset)], ir_version=10
        )
        return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    session(21)
    with pytest.raises(Exception, match=r"Could not find an implementation for GlobalLpPool\(22\)"):
        session(22)


def test_attributes_that_an_older_opset_lacks_are_a_bug():
    with pytest.raises(ValueError, match="Softmax of opset 18 has no made_up"):
        lower_opset(graph("Softmax", made_up=1))


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_the_table_names_operators_and_versions_that_exist(name):
    if name.startswith("com.microsoft::"):
        return
    versions = [versions if isinstance(versions, int) else versions[0] for versions, _ in KERNELS[name]]
    assert versions == sorted(versions, reverse=True)
    for version in versions:
        assert onnx.defs.get_schema(name, version).since_version == version


def test_the_vae_of_an_older_opset_has_the_same_operators():
    assert onnx.defs.get_schema("Pad", OPSET).since_version == OPSET
