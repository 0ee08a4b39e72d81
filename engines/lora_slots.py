"""Slots for LoRAs: two small matrix products beside every linear of a block, whose matrices are inputs of its stage.

``y = x W^T + b`` becomes ``y + (x down^T) up^T``, on the same operand and before all scales; who fills the slots
divides by these. Beside FP8 and INT8 matrices ``down`` has their codes, so both products read the codes of rows; 16
bits would cost a copy of the rows for every linear. ``up`` is in 16 bits. Zeros change nothing.
"""

from dataclasses import replace

import onnx_ir as ir

from wan22.block_layout import LORA_DOWN, LORA_UP, parts_of
from wan22.component import Stage, Tensor

IN_STAGES = ("qkv", "rest", "text_kv")  # of a transformer: those of its blocks
CODES = {"float8_e4m3fn": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8}
BEFORE_PRODUCTS = frozenset({"DequantizeLinear", "Transpose", "Cast"})  # what a matrix passes through


def with_slots(stage: Stage, rank: int, dtype: str) -> Stage:
    """``stage`` with slots of ``rank`` for every linear of a block: codes, or numbers of type ``dtype``."""
    if stage.name.partition("_of_")[0] not in IN_STAGES:  # also the forms for groups of devices
        return stage
    slots = []
    for tensor in stage.weights:
        linear, _, leaf = tensor.name.rpartition(".")
        if leaf == "weight" and len(tensor.dims) == 2:
            leaving, entering = tensor.dims
            each = len(parts_of(linear)) * rank
            of_down = tensor.dtype if tensor.dtype in CODES else dtype
            slots += [Tensor(f"{linear}.{LORA_DOWN}", of_down, (each, entering))]
            slots += [Tensor(f"{linear}.{LORA_UP}", dtype, (leaving, each))]
    return replace(stage, weights=(*stage.weights, *slots))


def add_slots(model: ir.Model, stage: Stage) -> None:
    """Add the slots of ``stage`` to its graph ``model``, in place."""
    inputs = {str(value.name): value for value in model.graph.inputs}
    made = {tensor.name: tensor for tensor in stage.weights if tensor.name not in inputs}
    for linear in (name.removesuffix(f".{LORA_DOWN}") for name in made if name.endswith(LORA_DOWN)):
        product = _product(inputs[f"{linear}.weight"])
        entering, raw = product.inputs[0], product.outputs[0]
        assert entering is not None and raw.dtype is not None
        down, up = (_input(model, made[f"{linear}.{leaf}"], raw.dtype) for leaf in (LORA_DOWN, LORA_UP))
        small = _dequantised(model, linear, down, raw.dtype) if down.dtype != raw.dtype else []
        small += [ir.node("Gemm", [entering, small[0].outputs[0] if small else down], {"transB": 1})]
        added = ir.node("Gemm", [small[-1].outputs[0], up, raw], {"transB": 1})
        for number, node in enumerate((*small, added)):
            node.name = f"{linear}/lora/{node.op_type}_{number}"
            node.outputs[0].name, node.outputs[0].type = f"{node.name}:0", ir.TensorType(raw.dtype)
        raw.replace_all_uses_with(added.outputs[0])
        added.replace_input_with(2, raw)
        model.graph.insert_after(product, [*small, added])


def _product(matrix: ir.Value) -> ir.Node:
    """The node that multiplies by ``matrix``."""
    (reader,) = (use.node for use in matrix.uses())
    return _product(reader.outputs[0]) if reader.op_type in BEFORE_PRODUCTS else reader


def _dequantised(model: ir.Model, linear: str, codes: ir.Value, dtype: ir.DataType) -> list[ir.Node]:
    """``codes`` in ``dtype``; their scales are in ``up``."""
    one = ir.tensor(1.0, dtype=ir.DataType.FLOAT, name=f"{linear}/lora/one")
    value = ir.Value(name=one.name, shape=ir.Shape([]), type=ir.TensorType(one.dtype), const_value=one)
    model.graph.initializers[str(one.name)] = value
    return [ir.node("DequantizeLinear", [codes, value], {"output_dtype": int(dtype)})]


def _input(model: ir.Model, tensor: Tensor, dtype: ir.DataType) -> ir.Value:
    """A new input for ``tensor``: codes, or numbers of the type ``dtype``."""
    kind = ir.TensorType(CODES.get(tensor.dtype, dtype))
    value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.dims), type=kind)
    model.graph.inputs.append(value)
    return value
