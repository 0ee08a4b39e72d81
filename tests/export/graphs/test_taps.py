"""A tapped graph reports the largest magnitude of every linear's input, and its result does not change."""

import numpy as np
import pytest

from engines.cpu.emulation import emulate
from export.checkpoint.schema import DIT_LINEARS_PER_BLOCK, dit_tensors
from export.graphs.builder import BFLOAT16, FLOAT
from export.graphs.dit import dit_graph
from export.graphs.taps import Tapped, add_taps, linear_inputs
from studies.precision.session import fill, open_graph
from tests.export.conftest import made_up
from tests.export.graphs.test_dit import inputs_for
from wan22.specs import SPECS

SPEC = SPECS["ti2v-5b-tiny"].dit
INPUTS = inputs_for(SPEC, 2, 8, 8, [0.0, 900.0])


@pytest.fixture(scope="module")
def weights():
    return made_up(dit_tensors(SPEC))


def test_every_linear_of_every_block_is_found(weights):
    expected = {f"blocks.{layer}.{name}" for layer in range(SPEC.layers) for name in DIT_LINEARS_PER_BLOCK}
    assert set(linear_inputs(fill(dit_graph(SPEC), weights.__getitem__))) == expected


def test_the_maxima_are_those_of_the_tensors(weights):
    plain = fill(dit_graph(SPEC), weights.__getitem__)
    values = linear_inputs(plain)
    plain.graph.outputs.append(values["blocks.1.ffn.2"])
    velocity, rows = open_graph(plain)(**INPUTS)
    model = fill(dit_graph(SPEC), weights.__getitem__)
    taps = add_taps(model, linear_inputs(model))
    forward = Tapped(open_graph(model), taps)
    assert np.array_equal(forward(**INPUTS), velocity)
    assert forward.largest["blocks.1.ffn.2"] == np.abs(rows).max()
    assert forward.largest["blocks.0.self_attn.q"] == forward.largest["blocks.0.self_attn.v"]


def test_maxima_grow_over_calls(weights):
    model = fill(dit_graph(SPEC), weights.__getitem__)
    taps = add_taps(model, linear_inputs(model))
    forward = Tapped(open_graph(model), taps)
    forward(**INPUTS)
    once = forward.largest
    forward(**INPUTS | {"latents": 0 * INPUTS["latents"]})
    assert forward.calls == 2
    assert all(forward.largest[label] >= once[label] for label in once)


def test_a_bfloat16_graph_is_tapped_and_then_emulated(weights):
    model = fill(dit_graph(SPEC, BFLOAT16), weights.__getitem__)
    taps = add_taps(model, linear_inputs(model))
    emulate(model)
    forward = Tapped(open_graph(model), taps)
    forward(**INPUTS)
    assert all(value > 0 for value in forward.largest.values())
    assert {output.dtype for output in model.graph.outputs} == {FLOAT}


def test_means_are_taken_over_tokens_and_calls(weights):
    plain = fill(dit_graph(SPEC), weights.__getitem__)
    plain.graph.outputs.append(linear_inputs(plain)["blocks.0.ffn.0"])
    calls = [INPUTS, INPUTS | {"latents": 2 * INPUTS["latents"]}]
    expected = np.mean([open_graph(plain)(**inputs)[1].mean(0) for inputs in calls], axis=0)
    model = fill(dit_graph(SPEC), weights.__getitem__)
    entering = linear_inputs(model)
    rows = {name: (entering[name], SPEC.width) for name in ("blocks.1.ffn.0", "blocks.0.ffn.0")}
    taps = add_taps(model, {"one": entering["blocks.0.ffn.2"]}, rows)
    forward = Tapped(open_graph(model), taps)
    for inputs in calls:
        forward(**inputs)
    assert list(forward.means) == ["blocks.1.ffn.0", "blocks.0.ffn.0"]
    assert np.abs(forward.means["blocks.0.ffn.0"] - expected).max() < 1e-5
