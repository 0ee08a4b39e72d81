"""The resident set of a process whose blocks stream from disk: two of them and the activations, not the model."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from wan22.block_layout import read_block_layout
from wan22.block_memory import BlockChoice, block_memory
from wan22.bundle import open_bundle
from wan22.precision import Precision
from wan22.specs import SPECS

LAYERS, MIB = 16, 2**20
CHILD = """
import json, sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from runtime.backend import open_backend
from runtime.block_backend import BlockOptions
from tests.export.graphs.test_dit import inputs_for
from wan22.bundle import open_bundle
from wan22.memory import peak_rss_bytes

bundle, name, weights_in = open_bundle(Path(sys.argv[1]), "engines"), sys.argv[2], sys.argv[3]
if name == "dit":
    given = inputs_for(bundle.manifest.spec.dit, 3, 16, 16, [0.0, 812.0])
    given["text"].flags.writeable = False
else:
    given = {"input_ids": np.arange(40)[None]}
with ExitStack() as stack:
    backend = open_backend(bundle, stack, BlockOptions(weights_in))
    engine = stack.enter_context(backend.new_engine(bundle.component(name)))
    before = peak_rss_bytes()
    for _ in range(2):
        engine(**given)
    print(json.dumps({"before": before, "peak": peak_rss_bytes(), "streamed": engine._shared.streamed.blocks}))
"""


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Blocks and layers of a few MiB, so that the model stands out from the interpreter."""
    from engines.build import BuildOptions, build_engines
    from export.exporter import export_checkpoint
    from export.options import ExportOptions
    from export.synth.checkpoint import synthesise

    folder, tiny = tmp_path_factory.mktemp("residency"), SPECS["ti2v-5b-tiny"]
    dit = replace(tiny.dit, layers=LAYERS, width=512, ffn_width=2048, heads=4, text_width=512)
    text = replace(tiny.text_encoder, layers=LAYERS, width=512, ffn_width=2048, heads=8)
    synthesise(replace(tiny, dit=dit, text_encoder=text), folder / "c", "diffusers", seed=0)
    export_checkpoint(folder / "c", folder / "b", ExportOptions(parts=frozenset({"dit", "text_encoder"})))
    build_engines(folder / "b", folder / "e", BuildOptions(topology="blocks"))
    return open_bundle(folder / "e", "engines")


def peaks(engines, name):
    """What two calls of component ``name`` take with resident and with streamed blocks, and the bytes of a block."""
    found = {}
    for weights_in in ("vram", "disk"):
        words = [sys.executable, "-c", CHILD, str(engines.folder), name, weights_in]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found[weights_in] = json.loads(done.stdout.splitlines()[-1])
    assert found["vram"]["streamed"] == LAYERS
    assert found["disk"]["streamed"] == 2 * LAYERS + 2
    return found, read_block_layout(engines.path(engines.component(name).weights[0])).step_bytes


@pytest.mark.slow
def test_streamed_blocks_do_not_stay_in_memory(engines):
    found, block_bytes = peaks(engines, "dit")
    saved = found["vram"]["peak"] - found["disk"]["peak"]
    assert saved > 0.9 * (LAYERS - 2) * block_bytes
    memory = block_memory(engines.manifest.spec.dit, Precision.FP32, 3 * 8 * 8, BlockChoice(2, 1), block_bytes)
    assert found["disk"]["peak"] - found["disk"]["before"] < memory.total + 48 * MIB  # the arena's granularity


@pytest.mark.slow
def test_streamed_layers_of_the_text_encoder_do_not_stay_in_memory(engines):
    found, layer_bytes = peaks(engines, "text_encoder")
    saved = found["vram"]["peak"] - found["disk"]["peak"]
    assert saved > 0.9 * (LAYERS - 2) * layer_bytes
    assert found["disk"]["peak"] - found["disk"]["before"] < 2 * layer_bytes + 48 * MIB
