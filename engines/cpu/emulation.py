"""Emulate a 16-bit graph on a CPU with float32 arithmetic, rounding wherever the compiled graph stores 16 bits.

ONNX Runtime has no bfloat16 kernels for the CPU, but it casts to bfloat16 and back. So every 16-bit tensor becomes
float32, and each result that the compiled graph would store in 16 bits is cast there and back. Three kinds of values
are not rounded, because fused kernels keep them in full: an attention's logits, which stay in registers between the two
matrix products; the inputs of FP8 quantisation; and dequantised FP8 numbers, which enter the matrix product directly,
with their scale applied in float32. FP8 itself needs no emulation: ONNX Runtime quantises on the CPU, and products of
FP8 numbers are exact in float32. NVFP4 is rewritten by :mod:`engines.cpu.nvfp4`.
"""

import onnx_ir as ir

from engines.cpu.nvfp4 import emulate_nvfp4

# Operators that move numbers without computing.
MOVING = frozenset(
    {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Split", "Concat", "Identity", "Expand", "Gather"}
)
IN_REGISTERS = frozenset({"Softmax", "QuantizeLinear"})  # they read their input unrounded
FLOAT = ir.DataType.FLOAT


def emulate(model: ir.Model, emulated: ir.DataType = ir.DataType.BFLOAT16) -> None:
    """Rewrite ``model`` in place; its inputs and outputs must be float32 or integers and do not change."""
    emulate_nvfp4(model)
    graph = model.graph
    for weight in list(graph.initializers.values()):
        if weight.dtype == emulated:
            _widen(graph, weight)
    for node in list(graph):
        for index, output in enumerate(node.outputs):
            if output.dtype == emulated:
                output.type = ir.TensorType(FLOAT)
                readers = {use.node.op_type for use in output.uses()}
                computed = node.op_type not in MOVING and node.op_type != "DequantizeLinear"
                if computed and (not readers or not readers <= IN_REGISTERS):
                    _round(graph, node, index, emulated)
        if node.op_type == "DequantizeLinear":
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(FLOAT))
        if node.op_type == "Cast" and node.attributes["to"].as_int() == emulated:
            node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))


def _widen(graph: ir.Graph, weight: ir.Value) -> None:
    """Keep a stored weight in 16 bits and make its readers read a float32 copy."""
    cast = ir.node("Cast", [weight], {"to": int(FLOAT)}, name=f"{weight.name}/widened")
    wide = cast.outputs[0]
    wide.name, wide.type, wide.shape = f"{weight.name}/float32", ir.TensorType(FLOAT), weight.shape
    weight.replace_all_uses_with(wide)
    cast.replace_input_with(0, weight)
    graph.insert_before(graph[0], cast)


def _round(graph: ir.Graph, node: ir.Node, index: int, emulated: ir.DataType) -> None:
    value = node.outputs[index]
    there = ir.node("Cast", [value], {"to": int(emulated)}, name=f"{value.name}/rounded")
    back = ir.node("Cast", [there.outputs[0]], {"to": int(FLOAT)}, name=f"{value.name}/restored")
    there.outputs[0].name, there.outputs[0].type = f"{value.name}/16", ir.TensorType(emulated)
    back.outputs[0].name, back.outputs[0].type = f"{value.name}/32", ir.TensorType(FLOAT)
    value.replace_all_uses_with(back.outputs[0])
    there.replace_input_with(0, value)
    graph.insert_after(node, [there, back])
