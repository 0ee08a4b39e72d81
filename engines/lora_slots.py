"""Slots for LoRAs: two small matrix products beside every linear of a block, whose matrices are inputs of its stage.

``y = x W^T + b`` becomes ``y + (x down^T) up^T``. Compilers compute the addition, the bias and GELU with the second
product. Whoever fills the slots divides ``down`` by the factors of quantised rows and ``up`` by the scales of quantised
matrices: so they stand where a 16-bit linear has them, on the same operand and before all scales. Zeros change nothing.
"""

from dataclasses import replace

import onnx_ir as ir

from wan22.block_layout import LORA_DOWN, LORA_UP, parts_of
from wan22.bundle import Stage, Tensor

IN_STAGES = ("qkv", "rest", "text_kv")  # of a transformer: those of its blocks
BEFORE_PRODUCTS = frozenset({"DequantizeLinear", "Transpose", "Cast"})  # what a matrix passes through


def with_slots(stage: Stage, rank: int, dtype: str) -> Stage:
    """``stage`` with slots of ``rank`` for every linear of a block, matrices ``[out, in]`` of type ``dtype``."""
    if stage.name not in IN_STAGES:
        return stage
    slots = []
    for tensor in stage.weights:
        linear, _, leaf = tensor.name.rpartition(".")
        if leaf == "weight" and len(tensor.dims) == 2:
            leaving, entering = tensor.dims
            each = len(parts_of(linear)) * rank
            slots += [Tensor(f"{linear}.{LORA_DOWN}", dtype, (each, entering))]
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
        small = ir.node("Gemm", [entering, down], {"transB": 1}, name=f"{linear}/lora/Gemm")
        added = ir.node("Gemm", [small.outputs[0], up, raw], {"transB": 1}, name=f"{linear}/lora/Gemm_1")
        for node in (small, added):
            node.outputs[0].name, node.outputs[0].type = f"{node.name}:0", ir.TensorType(raw.dtype)
        raw.replace_all_uses_with(added.outputs[0])
        added.replace_input_with(2, raw)
        model.graph.insert_after(product, [small, added])


def _product(matrix: ir.Value) -> ir.Node:
    """The node that multiplies by ``matrix``."""
    (reader,) = (use.node for use in matrix.uses())
    return _product(reader.outputs[0]) if reader.op_type in BEFORE_PRODUCTS else reader


def _input(model: ir.Model, tensor: Tensor, dtype: ir.DataType) -> ir.Value:
    value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.dims), type=ir.TensorType(dtype))
    model.graph.inputs.append(value)
    return value
