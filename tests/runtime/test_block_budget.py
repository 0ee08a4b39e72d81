"""No card of ``wan-trt plan --cards`` runs out of memory: real-size forwards on a device of paper that counts bytes.

The memory between kernels is that of engines compiled for SM89, not of the formulas that made the plan.
"""

import weakref

import numpy as np
import pytest

from engines.block_weights import layout_of
from engines.plan import card_plans
from export.graphs.blocks import stage_graphs
from export.graphs.builder import BFLOAT16
from export.graphs.dit import dit_graph
from export.precisions import usual_quantised
from runtime.block_forward import BlockForward
from runtime.block_transformer import BlockTransformer, SharedBlocks
from tests.export.graphs.test_dit import inputs_for
from tests.runtime.test_parallel import HEADS, rows_of, velocities
from wan22.block_layout import ITEM_BYTES
from wan22.block_memory import BlockChoice, block_memory
from wan22.bundle import open_bundle
from wan22.component import Component, File
from wan22.precision import Precision
from wan22.shapes import shape_of
from wan22.specs import T2V_A14B, TI2V_5B

MIB = 2**20
SCRATCH_MIB = {  # at so many tokens, built by TensorRT-RTX 1.7.1 in fp8-attn; nothing else takes more
    "t2v-a14b": (75_600, {"qkv": 2594, "attend": 738, "rest": 4838}),
    "ti2v-5b": (27_280, {"qkv": 569, "attend": 160, "rest": 1521}),
}


class Paper:
    """An array without content."""

    def __init__(self, device, shape, size_bytes, base=None):
        self.shape, self._device, self._base = tuple(shape), device, base
        if base is None:
            device.take(size_bytes)
            weakref.finalize(self, device.take, -size_bytes)

    def __getitem__(self, rows):
        left = () if isinstance(rows, int) else (len(range(self.shape[0])[rows]),)
        return Paper(self._device, (*left, *self.shape[1:]), 0, self)


class PaperDevice:
    def __init__(self, model):
        self.used = self.arena = self.peak = 0
        self._tokens, self._scratch = SCRATCH_MIB[model]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def take(self, size_bytes):
        self.used += size_bytes
        self.peak = max(self.peak, self.used + self.arena)

    def run(self, name, inputs, outputs, weights):
        assert weights is not None
        rows = next(iter(outputs.values())).shape[0]
        self.arena = max(self.arena, self._scratch.get(name, 0) * MIB * rows / self._tokens)
        self.take(0)

    def empty(self, tensor, **sizes):
        shape = shape_of(tensor, sizes)
        return Paper(self, shape, np.prod(shape, dtype=float) * ITEM_BYTES[tensor.dtype])

    def put(self, array):
        return Paper(self, array.shape, array.nbytes)

    def get(self, array):
        return np.zeros(array.shape, np.float32)

    def allocate(self, size_bytes):
        return Paper(self, (size_bytes,), size_bytes)

    def read(self, expert, offset, size_bytes):
        return self.allocate(size_bytes)

    def host_bytes(self, expert, offset, size_bytes):
        return np.zeros(size_bytes, np.uint8)

    def views(self, memory, places):
        return {place.name: memory for place in places}

    def move(self, source, target):
        assert source.shape == target.shape

    def copy(self, expert, block, slot, after):
        return None

    def wait(self, event):
        pass

    def computed(self):
        return None

    def seconds(self):
        return 0.0, 0.0


def transformer(spec):
    """The component and the layout of a transformer in blocks."""
    fp8 = usual_quantised(Precision.FP8_ATTN)
    stages = tuple(g.stage(File(f"{n}.plan", "", 1)) for n, g in stage_graphs(spec.dit, BFLOAT16, fp8).items())
    inputs, outputs = dit_graph(spec.dit, BFLOAT16, None, fp8).edges()
    made = Component("dit", stages[-1].graph, (), inputs, outputs, Precision.FP8_ATTN, stages=stages)
    return made, layout_of(stages, spec.dit.layers)


@pytest.mark.parametrize(
    ("spec", "video"),
    [(T2V_A14B, (1280, 720, 81)), (T2V_A14B, (832, 480, 81)), (TI2V_5B, (1280, 704, 121))],
    ids=["14B 720p", "14B 480p", "5B 720p"],
)
def test_a_card_runs_within_its_memory(spec, video):
    component, layout = transformer(spec)
    given = inputs_for(spec.dit, *spec.latent_shape(*video)[2:], [0.0, 812.0][-spec.dit.time_rows :])
    given["text"].flags.writeable = False
    other = given["text"].copy()
    other.flags.writeable = False
    tried = set()
    for plan in card_plans(spec, Precision.FP8_ATTN, video):
        choice, usable = plan.in_blocks.choice, plan.usable_vram_bytes
        if choice in tried:  # on a smaller card
            continue
        tried.add(choice)
        device = PaperDevice(spec.name)
        with BlockTransformer(SharedBlocks(device, layout, lambda _, c=choice: c), spec.dit, component) as engine:
            for text in (given["text"], other):
                engine(**given | {"text": text})
        assert 0.8 * plan.in_blocks.stack.memory(choice).total < device.peak <= usable, plan.request.target.name
    assert len(tried) > 1 or spec is TI2V_5B


def test_arrays_around_attention_of_one_of_two_devices_are_those_of_its_plan(divisible, monkeypatch):
    folder, kept, block = divisible("ti2v-5b-tiny", HEADS), {}, BlockForward.block

    def recorded(self, *given):
        found = block(self, *given)
        kept[self._link.rank] = {name: array.nbytes for name, array in self._kept.items() if not name.startswith("x")}
        return found

    monkeypatch.setattr(BlockForward, "block", recorded)
    velocities(folder, "ti2v-5b-tiny", "ulysses2")
    spec = open_bundle(folder, "engines").manifest.spec.dit
    planned = block_memory(spec, Precision.FP32, rows_of(2)[0], BlockChoice(2, 1), 0.0, 2).edges
    assert 0.98 * planned <= sum(kept[0].values()) <= planned
