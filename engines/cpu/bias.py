"""Move biases out of matrix products into the next pass over the rows, or remove the pass altogether.

ONNX Runtime's ``Gemm`` writes the bias into its result on one core before it multiplies, and reads it back: a tenth of
its time if the result is wide. ``FastGelu``, the same tanh approximation, adds a bias on all cores during its pass over
the rows; elsewhere a separate ``Add`` is still cheaper. The bias of an attention's values needs no pass: probabilities
sum to 1, so it passes through the attention unchanged, and the next linear can add it.
"""

from typing import TYPE_CHECKING

from engines.cpu.match import consumer, producer, replace_value, shape_constant
from engines.cpu.padding import MODULE

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "com.microsoft"
OF_BOTH = "/bias_of_both"  # suffix of the name of a linear that sums two biases


def forward_value_biases(model: "ir.Model") -> int:
    """Add the bias of every self-attention's values to the next linear's bias, in place; return their number.

    Requires fused attention with a separate linear for the values. ONNX Runtime computes the sum at load time.
    """
    attentions = [node for node in model.graph if node.op_type == "MultiHeadAttention" and MODULE not in str(node.name)]
    moved = [_forward(model.graph, node) for node in attentions]
    return sum(moved)


def _forward(graph: "ir.Graph", attention: "ir.Node") -> bool:
    import onnx_ir as ir

    values, behind = attention.inputs[2], attention
    while (reshape := producer(values, "Reshape")) is not None:
        values = reshape.inputs[0]
    while (reshape := consumer(behind, "Reshape")) is not None:
        behind = reshape
    before, after = producer(values, "Gemm"), consumer(behind, "Gemm")
    if before is None or after is None or not (_is_linear(before) and _is_linear(after)):
        return False
    x, weight, bias = before.inputs
    name, row = str(after.name), ir.node("Unsqueeze", [bias, shape_constant(graph, [0])])
    both = ir.node("Gemm", [row.outputs[0], *after.inputs[1:]], {"transB": 1}, name=f"{name}{OF_BOTH}")
    graph.insert_before(after, [row, both])
    after.replace_input_with(2, both.outputs[0])
    plain = ir.node("FusedMatMul", [x, weight], {"transB": 1}, domain=DOMAIN, name=f"{before.name}/product")
    replace_value(graph, before.outputs[0], [plain])
    graph.remove(before, safe=True)
    return True


def separate_biases(model: "ir.Model") -> int:
    """Move the bias out of every linear ``x Wᵀ + b`` of the graph, in place; return their number."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    products = [node for node in model.graph if node.op_type == "Gemm" and not str(node.name).endswith(OF_BOTH)]
    linears = [node for node in products if _is_linear(node)]
    for linear in linears:
        _replace(model.graph, linear)
    if linears:
        model.opset_imports[DOMAIN] = 1
        RemoveUnusedNodesPass()(model)
    return len(linears)


def _is_linear(node: "ir.Node") -> bool:
    transposed = [name for name in ("transA", "transB") if name in node.attributes and node.attributes[name].as_int()]
    return transposed == ["transB"] and len(node.inputs) == 3


def _replace(graph: "ir.Graph", linear: "ir.Node") -> None:
    import onnx_ir as ir

    name, bias, gelu = str(linear.name), linear.inputs[2], consumer(linear, "Gelu")
    product = ir.node("FusedMatMul", linear.inputs[:2], {"transB": 1}, domain=DOMAIN, name=f"{name}/product")
    if gelu is not None and "approximate" in gelu.attributes and gelu.attributes["approximate"].as_string() == "tanh":
        activated = ir.node("FastGelu", [product.outputs[0], bias], domain=DOMAIN, name=f"{name}/gelu")
        replace_value(graph, gelu.outputs[0], [product, activated])
    else:
        added = ir.node("Add", [product.outputs[0], bias], name=f"{name}/bias")
        replace_value(graph, linear.outputs[0], [product, added])
