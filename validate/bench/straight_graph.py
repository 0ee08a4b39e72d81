"""Rewrites a graph into standard operators without control flow, so that ONNX can infer its shapes.

The CPU engines process tokens in chunks (``Scan``), branch on the length of the prompt (``If``) and use ONNX Runtime's
own operators. Their replacements have the same shapes and are never run.
"""

from collections.abc import Iterable, Iterator
from typing import Any

FUSED = {"MultiHeadAttention", "FusedMatMul", "FastGelu"}  # ONNX Runtime's operators that this module can replace


def straighten(model: Any, rows_by_value: int | None) -> bool:
    """Remove control flow from an ONNX model in place; returns False if it has unknown control flow.

    A ``Scan`` over the chunks of a ``Reshape`` becomes its body on all chunks. An ``If`` that compares a number of rows
    with a constant becomes the branch for ``rows_by_value``, or its ``else`` branch if that is None.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    try:
        nodes = list(_straight(model.graph.node, makers, constants, rows_by_value))
    except KeyError:
        return False
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return True


def _straight(
    nodes: Iterable[Any], makers: dict[str, Any], constants: dict[str, Any], rows: int | None
) -> Iterator[Any]:
    for node in nodes:
        if node.op_type == "Scan":
            body = _graph(node, "body")
            sources = [_expect_kind(makers[name], "Reshape").input[0] for name in node.input]
            yield from _same(sources, [value.name for value in body.input])
        elif node.op_type == "If":
            body = _graph(node, "then_branch" if _is_true(makers[node.input[0]], constants, rows) else "else_branch")
        else:
            yield node
            continue
        yield from _straight(body.node, makers, constants, rows)
        yield from _same([value.name for value in body.output], node.output)


def _graph(node: Any, name: str) -> Any:
    return {item.name: item.g for item in node.attribute}[name]


def _expect_kind(node: Any, kind: str) -> Any:
    if node.op_type != kind:
        raise KeyError(node.op_type)
    return node


def _same(sources: Iterable[str], names: Iterable[str]) -> Iterator[Any]:
    from onnx import helper

    for source, name in zip(sources, names, strict=True):
        yield helper.make_node("Identity", [source], [name])


def _is_true(condition: Any, constants: dict[str, Any], rows: int | None) -> bool:
    """The value of the condition ``rows <= constant``."""
    from onnx import numpy_helper

    limit = constants[_expect_kind(condition, "LessOrEqual").input[1]]
    return rows is not None and rows <= int(numpy_helper.to_array(limit).item())


def make_known(model: Any, rows_by_value: int | None) -> None:
    """Replace fused operators by standard ones, and slice ends that depend on values by ``rows_by_value``."""
    from onnx import helper

    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain and node.op_type in FUSED:
            _stand_in(node)
        elif node.op_type == "Slice" and node.input[2] not in constants and rows_by_value is not None:
            name = f"{node.output[0]}/end"
            model.graph.initializer.append(helper.make_tensor(name, 7, [1], [rows_by_value]))  # int64
            node.input[2] = name


def _stand_in(node: Any) -> None:
    from onnx import helper

    given = {item.name: item.i for item in node.attribute if item.name.startswith("trans") and item.i}
    kept, settings = len(node.input), {}
    if node.op_type == "FastGelu":
        node.op_type, kept = "Identity", 1
    elif node.op_type == "MultiHeadAttention":  # q, k and v [B, rows, columns]
        node.op_type, kept, settings = "Einsum", 3, {"equation": "bld,bsd,bsv->blv"}
    elif given == {"transBatchA": 1, "transBatchB": 1, "transB": 1}:
        node.op_type, settings = "Einsum", {"equation": "rhd,nhd->hrn"}
    else:
        node.op_type, settings = ("Gemm", given) if given else ("MatMul", {})
    node.domain = ""
    del node.input[kept:], node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in settings.items())
