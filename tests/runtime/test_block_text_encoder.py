"""A text encoder whose layers stream: the embeddings of the whole graph, to the last bit if ONNX Runtime adds alike."""

from contextlib import ExitStack

import numpy as np
import onnxruntime as ort
import pytest

from runtime.backend import open_backend
from runtime.block_backend import BlockOptions
from runtime.engine_onnxruntime import OnnxRuntimeEngine
from tests.export.graphs.test_dit import relative_l2
from wan22.bundle import open_bundle
from wan22.errors import UserError

NAME, TEXT = "ti2v-5b-tiny", "text_encoder"


def ids_of(spec, count):
    return np.random.default_rng(count).integers(0, spec.text_encoder.vocab, (1, count))


@pytest.fixture
def opened(blocks_of):
    """``opened(weights_in)`` → the text encoder in stages, its bundle and its backend."""
    with ExitStack() as stack:

        def make(weights_in="auto", vram=None):
            bundle = open_bundle(blocks_of(NAME), "engines")
            backend = open_backend(bundle, stack, BlockOptions(weights_in, vram))
            return stack.enter_context(backend.new_engine(bundle.component(TEXT))), bundle, backend

        yield make


@pytest.mark.parametrize("weights_in", ["vram", "disk"])
def test_it_computes_what_the_whole_encoder_computes(flow_of, opened, weights_in):
    engine, bundle, _ = opened(weights_in)
    whole = open_bundle(flow_of(NAME).engines, "engines")
    assert (engine.inputs, engine.outputs) == (whole.component(TEXT).inputs, whole.component(TEXT).outputs)
    options = ort.SessionOptions()  # packed constants are added up in another order
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(whole.path(whole.component(TEXT).graph), options, ["CPUExecutionProvider"])
    with OnnxRuntimeEngine(whole.folder, whole.component(TEXT)) as packed:
        for count in (1, 40, 512):
            ids = ids_of(bundle.manifest.spec, count)
            found = engine(input_ids=ids)
            assert np.array_equal(found, session.run(None, {"input_ids": ids})[0])
            assert relative_l2(found, packed(input_ids=ids)) <= 1.5e-6


def test_two_layers_are_in_memory_and_the_embedding_never_is(opened):
    engine, bundle, backend = opened("disk")
    spec = bundle.manifest.spec
    engine(input_ids=ids_of(spec, 512))
    shared = engine._shared
    assert len(shared.stream._slots) == 2
    least = backend.blocks.memory(TEXT, (64, 64, 5), resident=False)
    table = spec.text_encoder.vocab * spec.text_encoder.width * 4
    assert least.weights == 2 * shared.layout.step_bytes
    assert shared.layout.size_bytes > table + spec.text_encoder.layers * shared.layout.step_bytes


def test_a_budget_too_small_for_two_layers_is_refused(opened):
    with pytest.raises(UserError, match=r"--vram 1.00 KiB for text_encoder \| expected at least"):
        opened(vram=1024.0)[2].blocks.check((64, 64, 5), 0.0)


def test_a_token_beyond_the_table_reads_nothing(opened):
    engine, bundle, _ = opened()
    with pytest.raises(ValueError, match="the table has"):
        engine(input_ids=np.array([[bundle.manifest.spec.text_encoder.vocab]]))
