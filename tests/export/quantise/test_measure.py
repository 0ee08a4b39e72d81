"""What an export measures without data is what the graph meets on the same input, and it is enough for INT8."""

import numpy as np
import pytest

from export.checkpoint.schema import dit_tensors
from export.graphs.builder import FLOAT
from export.graphs.dit import dit_graph
from export.graphs.linear import coded_matrices, kind_of
from export.graphs.taps import PARTS, Forwards, Tapped, Taps, add_taps, linear_inputs
from export.precisions import used_inputs, usual_quantised
from export.quantise.inputs import CENTRED, LARGEST_INT8_CREST, crests_by_kind, input_width
from export.quantise.measure import GRID, MOST_ROWS, TIMESTEPS, forwards_of_noise, measure_inputs, timesteps_of
from export.quantise.quantised_weights import QuantisedWeights
from runtime.forward_inputs import forward_inputs, text_rows
from studies.precision.session import fill, open_graph
from tests.export.conftest import made_up
from tests.export.graphs.test_dit import inputs_for, relative_l2
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS, TEXT_TOKENS

TINY = SPECS["t2v-a14b-tiny"]


@pytest.fixture(scope="module")
def weights():
    """Channels that are large for every token, and hidden channels with outliers, as trained models have them."""
    made = made_up(dit_tensors(TINY.dit))
    for layer in range(TINY.dit.layers):
        made[f"blocks.{layer}.norm3.bias"][[4, 70]] += 20
        made[f"blocks.{layer}.ffn.0.bias"][[9, 200]] += 12
        made[f"blocks.{layer}.ffn.0.weight"][[30, 301]] *= 9
    return made


def tapped_on_the_same_input(spec, expert, weights, measured):
    """The float32 graph with taps, called with the noise and timesteps of the measurement."""
    model = fill(dit_graph(spec.dit), weights.__getitem__)
    rows = {name: (x, input_width(spec.dit, name)) for name, x in linear_inputs(model).items()}
    rows = {name: row for name, row in rows.items() if kind_of(name) in CENTRED}
    taps = add_taps(model, linear_inputs(model), rows, {name: found.vectors for name, found in measured.items()})
    tapped, forwards = Tapped(open_graph(model), taps), forwards_of_noise(spec, expert)
    assert forwards.grid == GRID
    for video, timestep in zip(forwards.video[:, None], timesteps_of(spec, expert), strict=True):
        noise, condition = np.split(video, [spec.dit.out_channels], axis=1)
        text = text_rows(forwards.text)
        tapped(**forward_inputs(spec.dit, noise, timestep, text, condition if spec.dit.condition_channels else None))
    return tapped


@pytest.mark.parametrize(
    ("name", "expert"), [("t2v-a14b-tiny", "low_noise"), ("i2v-a14b-tiny", "high_noise"), ("ti2v-5b-tiny", "dit")]
)
def test_it_is_what_the_graph_meets(name, expert):
    spec = SPECS[name]
    weights = made_up(dit_tensors(spec.dit))
    measured = measure_inputs(weights.__getitem__, spec, expert)
    assert {kind_of(linear) for linear in measured} == set(CENTRED)
    tapped = tapped_on_the_same_input(spec, expert, weights, measured)
    for linear, found in measured.items():
        assert relative_l2(found.mean, tapped.means[linear]) < 1e-4, linear
        if found.crest is not None:
            assert found.crest == pytest.approx(tapped.crests[linear], rel=1e-3), linear
    assert [linear for linear, found in measured.items() if found.crest is None] == [
        f"blocks.{n}.cross_attn.o" for n in range(spec.dit.layers)  # all rows are equal without text
    ]  # fmt: skip


def test_kept_rows_are_what_the_graph_meets_in_recorded_forwards():
    """Two forwards of different texts, recorded whole; the rows of the text are kept too."""
    spec = SPECS["ti2v-5b-tiny"]
    weights, kinds = made_up(dit_tensors(spec.dit)), (*CENTRED, "cross_attn.k")
    model = fill(dit_graph(spec.dit), weights.__getitem__)
    values = {name: value for name, value in linear_inputs(model).items() if kind_of(name) in kinds}
    model.graph.outputs.extend(values.values())
    run, tapped, rows = open_graph(model), Tapped(lambda **_: (np.zeros(1), np.zeros(0)), Taps(())), []
    for seed, timestep in ((1, 900.0), (2, 300.0)):
        inputs = inputs_for(spec.dit, 2, 6, 8, [timestep] * 2, seed)
        inputs["text"][:, 30 + seed :] = 0
        tapped(**inputs)
        rows.append(run(**inputs)[1:])
    parts = tapped.forwards
    assert parts.video.shape == (2 * PARTS, spec.dit.out_channels, 2, 6, 8)
    whole = Forwards(parts.video[::PARTS], parts.time_features[::PARTS], parts.text[::PARTS])
    measured = measure_inputs(weights.__getitem__, spec, "dit", keep=kinds, given=whole)
    for name, of_both in zip(values, zip(*rows, strict=True), strict=True):
        expected = np.concatenate(of_both)
        expected = expected[:: -(-len(expected) // MOST_ROWS)]
        assert relative_l2(measured[name].rows.astype(np.float32), expected) < 4e-3, name  # bfloat16


def test_as_many_tokens_as_rows_of_text_are_no_text():
    forwards = forwards_of_noise(TINY, "low_noise", (2, 16, 8))
    assert np.prod(forwards.grid) * len(forwards.video) == TEXT_TOKENS
    measure_inputs(made_up(dit_tensors(TINY.dit)).__getitem__, TINY, "low_noise", given=forwards)


def test_timesteps_are_those_of_the_expert():
    early, late = timesteps_of(TINY, "high_noise"), timesteps_of(TINY, "low_noise")
    assert len(early) == len(late) == TIMESTEPS
    assert 1000 > early[0] > early[1] > 875 > late[0] > late[1] > 0


def velocity(run_graph, weights, precision, inputs):
    """With float32 in the place of bfloat16, so that the codes alone err."""
    quantised = usual_quantised(precision)
    g = dit_graph(TINY.dit, FLOAT, None, quantised)
    used = used_inputs(quantised, inputs)
    read = QuantisedWeights(weights.__getitem__, TINY.dit, coded_matrices(g), None, used)
    return run_graph(g, {key: np.asarray(read(key)) for key in g.weights})(**inputs_for(TINY.dit, 3, 8, 8, [400.0]))[0]


def test_int8_errs_a_fraction_of_fp8_and_needs_means_and_factors(run_graph, weights):
    exact = run_graph(dit_graph(TINY.dit), weights)(**inputs_for(TINY.dit, 3, 8, 8, [400.0]))[0]
    measured = measure_inputs(weights.__getitem__, TINY, "low_noise")
    assert max(crests_by_kind(measured).values()) < LARGEST_INT8_CREST
    fp8, int8, plain = (
        relative_l2(velocity(run_graph, weights, precision, inputs), exact)
        for precision, inputs in ((Precision.FP8, measured), (Precision.INT8, measured), (Precision.INT8, {}))
    )
    assert 1e-3 < int8 < 0.4 * fp8
    assert int8 < 0.6 * plain


def test_the_codes_and_the_factors_are_the_matrix(weights):
    measured = measure_inputs(weights.__getitem__, TINY, "low_noise")
    quantised = usual_quantised(Precision.INT8)
    g = dit_graph(TINY.dit, FLOAT, None, quantised)
    read = QuantisedWeights(weights.__getitem__, TINY.dit, coded_matrices(g), None, used_inputs(quantised, measured))
    for stored, parts, owner in (("self_attn.qkv", "qkv", "q"), ("ffn.2", "2", "2")):
        module = f"blocks.1.{stored.rpartition('.')[0]}"
        codes, scales = read(f"blocks.1.{stored}.weight"), read(f"blocks.1.{stored}.weight_scale")
        assert codes.dtype == np.int8
        assert (np.abs(codes.astype(int)).max(1) == 127).all()
        factor = read(f"{module}.{owner}.input_factor")
        assert np.median(factor) == pytest.approx(1)
        matrix = np.concatenate([weights[f"{module}.{part}.weight"] for part in parts])
        errors = np.abs(codes * scales[:, None] - matrix / factor)
        assert (errors <= 0.501 * scales[:, None]).all()


def test_weights_that_make_nan_are_named(weights):
    key = "blocks.1.ffn.0.bias"
    spoiled = weights | {key: np.full_like(weights[key], np.inf)}
    with pytest.raises(UserError, match=r"blocks\.1\.ffn\.2: its input holds NaN or infinity"):
        measure_inputs(spoiled.__getitem__, TINY, "high_noise")
