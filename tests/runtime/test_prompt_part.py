"""The prompt-only half is computed once per prompt, as long as the prompt's array cannot change."""

import numpy as np
import onnxruntime
import pytest

from runtime.engine_onnxruntime import OnnxRuntimeEngine
from runtime.pipeline import Pipeline
from runtime.prompt_part import PromptPart
from runtime.request import Request
from validate.bench.our_side import OurSide
from validate.bench.work import BenchOptions, work_for
from wan22.bundle import open_bundle
from wan22.specs import SPECS

WIDTH = SPECS["t2v-a14b-tiny"].dit.text_width


@pytest.fixture(scope="module")
def bundle(tiny_engines):
    return open_bundle(tiny_engines, "engines")


@pytest.fixture(scope="module")
def component(bundle):
    return bundle.component("high_noise")


@pytest.fixture
def part(bundle, component):
    return PromptPart(onnxruntime.InferenceSession(bundle.path(component.halves[0])))


def text(seed, *, writeable=False):
    array = np.zeros((1, 512, WIDTH), np.float32)
    array[:, :5] = np.random.default_rng(seed).standard_normal((1, 5, WIDTH))
    array.flags.writeable = writeable
    return array


def test_a_text_that_cannot_change_is_worked_on_once(part):
    one, other = text(1), text(2)
    kept = part(one), part(other)
    assert (part(one), part(other)) == kept
    assert part(one) is kept[0]
    assert part(other) is kept[1]


def test_texts_of_equal_content_are_not_taken_for_one(part):
    assert part(text(1)) is not part(text(1))


def test_the_last_two_texts_are_kept(part):
    texts = [text(seed) for seed in range(3)]
    first, second, third = (part(one) for one in texts)
    assert part(texts[1]) is second
    assert part(texts[2]) is third
    assert part(texts[0]) is not first


@pytest.mark.parametrize("given", [text(1, writeable=True), text(1)[:]], ids=["writeable", "a view"])
def test_a_text_that_may_change_is_worked_on_in_every_call(part, given):
    assert part(given) is not part(given)


@pytest.fixture
def forward(tiny_engines, bundle, component):
    work = work_for(bundle, BenchOptions(Request(size=(96, 64), frames=5)))
    with Pipeline(bundle) as pipeline, OnnxRuntimeEngine(tiny_engines, component) as engine:
        inputs = OurSide(pipeline, work)._inputs("high_noise")
        yield lambda **others: engine(**inputs | others), inputs


def test_an_engine_sees_that_a_text_was_written_to(forward):
    compute, inputs = forward
    given = inputs["text"].copy()
    before = compute(text=given)
    given[:, :3] += 1
    assert not np.array_equal(compute(text=given), before)


def test_an_engine_computes_the_same_for_a_text_that_it_knows(forward, bundle, component):
    compute, inputs = forward
    first, again, other = compute(), compute(), compute(text=text(7))
    whole = onnxruntime.InferenceSession(bundle.path(component.graph)).run(None, inputs)[0]
    assert np.array_equal(first, whole)
    assert np.array_equal(again, whole)
    assert not np.array_equal(other, whole)


def test_the_text_of_a_pipeline_cannot_be_written_to(bundle):
    with Pipeline(bundle) as pipeline, pytest.raises(ValueError, match="read-only"):
        pipeline.text("a cat")[0, 0, 0] = 1
