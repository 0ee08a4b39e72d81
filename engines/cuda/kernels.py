"""Refuse graphs with a node that ONNX Runtime's CUDA provider has no kernel for: it would silently run on the CPU.

The table is that of ONNX Runtime's ``docs/OperatorKernels.md`` at commit 001d12d2 (2026), for the operators of our
graphs: a CPU build of ONNX Runtime lists only its CPU kernels. A kernel without a last version serves only the schema
of its first one, as the registry of ONNX Runtime has it: the kernel of ``Pad`` from 18 on does not serve the ``Pad`` of
opset 23. Where an operator has several type parameters, the table joins the types of each; only equal ones are
accepted, because every kernel has those.
"""

from collections import Counter
from typing import TYPE_CHECKING

from wan22.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

FLOAT, HALF, BFLOAT, INT = "FLOAT", "FLOAT16", "BFLOAT16", "INT64"
Since = int | tuple[int, int]  # from a version on, or from one to another
FLOATS, WIDE, ALL = (FLOAT, HALF, BFLOAT), (FLOAT, HALF), (FLOAT, HALF, BFLOAT, INT)
KERNELS: dict[str, tuple[tuple[Since, tuple[str, ...]], ...]] = {
    "Add": ((14, ALL),),
    "Attention": ((24, FLOATS), ((23, 23), FLOATS)),
    "AveragePool": ((22, FLOATS), ((19, 21), WIDE), ((11, 18), WIDE)),
    "Cast": ((23, ALL), ((21, 22), ALL), ((19, 20), ALL), ((13, 18), ALL)),
    "Clip": ((13, (FLOAT, HALF, INT)),),
    "Concat": ((13, ALL),),
    "Conv": ((22, FLOATS), ((11, 21), WIDE)),
    "Div": ((14, ALL),),
    "Expand": ((13, ALL),),
    "Gather": ((13, ALL),),
    "Gelu": ((20, FLOATS),),
    "Gemm": ((13, FLOATS),),
    "Identity": ((19, ALL), ((14, 18), ALL)),
    "LayerNormalization": ((17, FLOATS),),
    "MatMul": ((13, FLOATS),),
    "Max": ((13, ALL),),
    "Min": ((13, ALL),),
    "Mul": ((14, ALL),),
    "Pad": ((18, WIDE), ((13, 17), WIDE)),
    "RMSNormalization": ((23, FLOATS),),
    "Range": ((11, (FLOAT, INT)),),
    "Reciprocal": ((13, WIDE),),
    "ReduceMean": ((18, WIDE),),
    "ReduceSum": ((13, ALL),),
    "Reshape": ((23, ALL), ((21, 22), ALL), ((19, 20), ALL), ((14, 18), ALL)),
    "RotaryEmbedding": ((23, FLOATS),),
    "Shape": ((23, ALL), ((21, 22), ALL), ((19, 20), ALL), ((15, 18), ALL)),
    "Sigmoid": ((13, FLOATS),),
    "Slice": ((13, ALL),),
    "Softmax": ((13, FLOATS),),
    "Split": ((18, ALL),),
    "Sqrt": ((13, FLOATS),),
    "Squeeze": ((23, ALL), ((21, 22), ALL), ((13, 20), ALL)),
    "Sub": ((14, ALL),),
    "Transpose": ((23, ALL), ((21, 22), ALL), ((13, 20), ALL)),
    "Unsqueeze": ((23, ALL), ((21, 22), ALL), ((13, 20), ALL)),
    "com.microsoft::SkipLayerNormalization": ((1, FLOATS),),
}
SHAPES_OR_INDICES = ("Gather", "Reshape", "Slice", "Expand", "Squeeze", "Unsqueeze", "ReduceMean", "ReduceSum", "Pad")


def check_kernels(model: "ir.Model", name: str) -> dict[str, int]:
    """The number of nodes of each operator and type, such as ``Gemm BFLOAT16``; all have CUDA kernels.

    Raises:
        UserError: some have none; lists them.
    """
    types, found, missing = _types(model.graph), Counter[str](), Counter[str]()
    for node in model.graph:
        operands = sorted(_operand_types(node, types))
        kind = f"{node.op_type} {' '.join(operands)}"
        found[kind] += 1
        if not _has_kernel(node, operands, model.opset_imports.get(node.domain, 1)):
            missing[kind] += 1
    if missing:
        listed = ", ".join(f"{count} {kind}" for kind, count in missing.items())
        wrong = f"{name} has nodes without a CUDA kernel: {listed}"
        raise UserError(wrong, "nodes that all run on the GPU", "export again with wan-trt export, --precision bf16")
    return dict(sorted(found.items()))


def _types(graph: "ir.Graph") -> "dict[ir.Value | None, str]":
    """The type of every value. Nodes that a pass added have none, so they are inferred."""
    import onnx_ir as ir

    known: dict[ir.Value | None, str] = {
        value: value.dtype.name for value in (*graph.inputs, *graph.initializers.values()) if value.dtype is not None
    }
    for node in graph:
        if node.op_type == "Cast":
            made = ir.DataType(node.attributes["to"].as_int()).name
        elif node.op_type == "Shape":
            made = INT
        else:
            made = known.get(node.inputs[0], "") if node.inputs else ""
        known |= dict.fromkeys(node.outputs, made)
    return known


def _operand_types(node: "ir.Node", types: "dict[ir.Value | None, str]") -> set[str]:
    """The types that a kernel is chosen by: those of the data and of the results, not of shapes or indices."""
    data = node.inputs[:1] if node.op_type in SHAPES_OR_INDICES else node.inputs
    return {types.get(value, "") for value in (*data, *node.outputs[:1]) if value is not None}


def _has_kernel(node: "ir.Node", operands: list[str], opset: int) -> bool:
    name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    since, one_type = _schema_version(node, opset), node.op_type not in ("Cast", "Shape")
    if one_type and len(operands) != 1:
        return False
    return any(_serves(versions, since) and set(operands) <= set(types) for versions, types in KERNELS.get(name, ()))


def _serves(versions: Since, since: int) -> bool:
    return versions == since if isinstance(versions, int) else versions[0] <= since <= versions[1]


def _schema_version(node: "ir.Node", opset: int) -> int:
    """The opset that introduced the form of the operator that is valid in ``opset``; 1 for contrib operators."""
    import onnx

    if node.domain:
        return 1
    try:
        return int(onnx.defs.get_schema(node.op_type, opset).since_version)
    except onnx.defs.SchemaError:
        return 0
