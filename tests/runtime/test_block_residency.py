"""The resident set of a process whose blocks stream from disk: two blocks and the activations, not the model."""

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
from runtime.backend import open_backend
from runtime.block_backend import BlockOptions
from tests.export.graphs.test_dit import inputs_for
from wan22.bundle import open_bundle
from wan22.memory import peak_rss_bytes

bundle, weights_in = open_bundle(Path(sys.argv[1]), "engines"), sys.argv[2]
given = inputs_for(bundle.manifest.spec.dit, 3, 16, 16, [0.0, 812.0])
given["text"].flags.writeable = False
with ExitStack() as stack:
    backend = open_backend(bundle, stack, BlockOptions(weights_in))
    engine = stack.enter_context(backend.new_engine(bundle.component("dit")))
    before = peak_rss_bytes()
    for _ in range(2):
        engine(**given)
    print(json.dumps({"before": before, "peak": peak_rss_bytes(), "streamed": engine._shared.streamed.blocks}))
"""


@pytest.mark.slow
def test_streamed_blocks_do_not_stay_in_memory(tmp_path):
    from engines.build import BuildOptions, build_engines
    from export.exporter import export_checkpoint
    from export.options import ExportOptions
    from export.synth.checkpoint import synthesise

    tiny = SPECS["ti2v-5b-tiny"]
    dit = replace(tiny.dit, layers=LAYERS, width=512, ffn_width=2048, heads=4)
    synthesise(replace(tiny, dit=dit), tmp_path / "c", "diffusers", seed=0)
    export_checkpoint(tmp_path / "c", tmp_path / "b", ExportOptions(parts=frozenset({"dit"})))
    build_engines(tmp_path / "b", tmp_path / "e", BuildOptions(topology="blocks"))
    bundle = open_bundle(tmp_path / "e", "engines")
    block_bytes = read_block_layout(bundle.path(bundle.component("dit").weights[0])).step_bytes
    found = {}
    for weights_in in ("vram", "disk"):
        words = [sys.executable, "-c", CHILD, str(tmp_path / "e"), weights_in]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found[weights_in] = json.loads(done.stdout.splitlines()[-1])
    assert found["vram"]["streamed"] == LAYERS
    assert found["disk"]["streamed"] == 2 * LAYERS + 2
    saved = found["vram"]["peak"] - found["disk"]["peak"]
    assert saved > 0.9 * (LAYERS - 2) * block_bytes
    memory = block_memory(dit, Precision.FP32, 3 * 8 * 8, BlockChoice(2, 1), block_bytes)
    assert found["disk"]["peak"] - found["disk"]["before"] < memory.total + 48 * MIB  # the arena's granularity
