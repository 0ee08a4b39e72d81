"""A transformer split in halves gives the same result, and the second half does not depend on the text."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from engines.cpu.passes import fit_transformer
from engines.cpu.prompt import split_at_prompt
from tests.engines.cpu.graphs import SPEC, inputs, kinds, run, transformer
from wan22.specs import SPECS


def fitted(spec):
    model = transformer(spec)
    fit_transformer(model, spec)
    return model


def session(model):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    graph = ir.serde.serialize_model(model).SerializeToString()
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=["t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny"])
def spec(request):
    return replace(SPECS[request.param].dit, layers=2)


@pytest.fixture(scope="module")
def models(spec):
    """The complete transformer, and its halves."""
    whole = fitted(spec)
    return whole, split_at_prompt(fitted(spec))


@pytest.mark.parametrize("text_rows", [0, 7, 200, 512])
def test_the_halves_compute_what_the_whole_does(spec, models, text_rows):
    whole, (prompt, step) = models
    given = inputs(spec, text_rows=text_rows)
    first = session(prompt)
    handed = dict(zip([v.name for v in first.get_outputs()], first.run(None, {"text": given["text"]}), strict=True))
    rest = {name: array for name, array in given.items() if name != "text"}
    assert np.array_equal(session(step).run(None, rest | handed)[0], run(whole, given))


def test_a_step_reads_no_text_and_the_prompt_half_reads_nothing_else(models):
    whole, (prompt, step) = models
    assert [value.name for value in prompt.graph.inputs] == ["text"]
    others = [value.name for value in whole.graph.inputs if value.name != "text"]
    assert [value.name for value in step.graph.inputs] == others + [value.name for value in prompt.graph.outputs]


def test_weights_that_only_the_text_needs_are_in_its_half_alone(models):
    _, (prompt, step) = models
    of_text = ("text_embedding.0.weight", "blocks.0.cross_attn.k.weight", "blocks.1.cross_attn.v.weight")
    assert all(name in prompt.graph.initializers and name not in step.graph.initializers for name in of_text)
    assert "blocks.0.ffn.0.weight" in step.graph.initializers
    assert "blocks.0.ffn.0.weight" not in prompt.graph.initializers


def test_the_whole_stays_as_it_was():
    model = fitted(SPEC)
    before = kinds(model)
    split_at_prompt(model)
    assert kinds(model) == before
    assert np.isfinite(run(model, inputs())).all()


def test_a_graph_without_text_is_not_split():
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Exp", [x])
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23})
    assert split_at_prompt(ir.Model(graph, ir_version=11)) is None
