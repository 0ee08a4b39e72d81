"""A transformer in stages, called like an engine: the weights of its blocks are resident or stream past.

``time`` runs once per schedule and ``text`` with ``text_kv`` once per prompt; their results are kept. A forward then
calls ``qkv``, ``attend`` and ``rest`` for every block; several devices call ``join`` before ``rest``. Tokens may go
through ``qkv`` and ``rest`` in slices, which divides their scratch memory; ``attend`` reads the keys of all tokens. The
residual stream ``x`` is never input and output of one call: compilers may keep other tensors in an output's memory.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from runtime.arrays import F32
from runtime.block_forward import BlockForward, StageDevice, Weights, fp8_scales, patchify, unpatchify
from runtime.block_stream import NOTHING, BlockStream, Streamed
from runtime.engine import Arrays, check_inputs
from runtime.group import Link
from wan22.block_layout import BlockLayout, Overlay, Place
from wan22.block_memory import BlockChoice
from wan22.component import Component, Stage
from wan22.parallel import shares
from wan22.parts import DitSpec
from wan22.shapes import Profile

TIMES_KEPT = 256  # rows of time, unless one schedule has more
PROMPTS_KEPT = 2  # the prompt and the negative prompt, which alternate
V_NORMS, V_MEAN = "self_attn.v_norms", "self_attn.q.input_mean"


@dataclass
class SharedBlocks:
    """What the experts of a model share: the device, its stages and the slots of the stream."""

    device: StageDevice
    layout: BlockLayout
    choose: Callable[[int], BlockChoice]  # for a number of tokens
    link: Link | None = None  # to the other devices that divide the tokens
    stream: BlockStream | None = None
    _streamed: Streamed = NOTHING  # by earlier streams
    _chosen: tuple[int, BlockChoice] | None = None  # for so many tokens
    engines: dict[str, "BlockTransformer"] = field(default_factory=dict)  # by expert, those that are open
    _overlays: dict[str, tuple[Path, Overlay]] = field(default_factory=dict)  # by expert
    _users: int = 0
    _open: ExitStack = field(default_factory=ExitStack)

    def enter(self) -> None:
        if not self._users:
            self._open.enter_context(self.device)
        self._users += 1

    def leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._drop_stream()
            self._open.close()

    def use(self, expert: str, overlay: tuple[Path, Overlay] | None) -> None:
        """Replace parts of the weights of ``expert`` from now on, or take its own again."""
        if self._overlays.get(expert) == overlay:
            return
        self._overlays.pop(expert, None)
        if overlay is not None:
            self._overlays[expert] = overlay
        self.device.use(expert, overlay)
        if self.stream is not None:
            self.stream.changed(expert)
        if expert in self.engines:
            self.engines[expert].renew()

    def end_weights(self, expert: str, stage: Stage) -> dict[str, Any]:
        """The weights of a stage outside of the blocks, read from disk."""
        found, names = dict[str, Any](), {tensor.name for tensor in stage.weights}
        for place in (place for place in self.layout.ends if place.name in names):
            memory = self.device.read(expert, place.offset, place.size_bytes)
            found |= self.device.views(memory, _moved([place], -place.offset))
        return found

    @property
    def streamed(self) -> Streamed:
        return self._streamed if self.stream is None else self.stream.streamed

    def _drop_stream(self) -> None:
        """Free the slots."""
        self._streamed, self.stream, self._chosen = self.streamed, None, None

    def stream_for(self, tokens: int) -> tuple[BlockStream, int]:
        """The stream and the number of slices for a forward of so many tokens."""
        if self.stream is None or self._chosen is None or self._chosen[0] != tokens:
            self._drop_stream()
            self._chosen = tokens, self.choose(tokens)
            slots, layout = self._chosen[1].slots, self.layout
            self.stream = BlockStream(self.device, layout.blocks, slots, layout.step_bytes, self._streamed)
        return self.stream, self._chosen[1].slices


class BlockTransformer:
    """One expert. It is an :class:`runtime.engine.Engine`."""

    def __init__(
        self, shared: SharedBlocks, spec: DitSpec, component: Component, profiles: Sequence[Profile] = ()
    ) -> None:
        self.name, self.inputs, self.outputs = component.name, component.inputs, component.outputs
        self._shared, self._spec, self._profiles = shared, spec, profiles
        self._stages = {stage.name: stage for stage in component.stages}
        self._following = self.name
        self._ends: dict[str, Weights] = {}
        self._times: dict[bytes, tuple[Any, Any]] = {}
        self._texts: list[tuple[np.ndarray, list[dict[str, Any]]]] = []
        self._resumed = 0
        self._bounds: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def __enter__(self) -> Self:
        self._shared.enter()
        self.renew()
        self._shared.engines[self.name] = self
        return self

    def __exit__(self, *_: object) -> None:
        self._ends, self._times, self._texts = {}, {}, []
        self._shared.engines.pop(self.name, None)
        self._shared.leave()

    def renew(self) -> None:
        """Forget what was computed with earlier weights, and read the weights around the blocks."""
        self._times, self._texts = {}, []
        self._ends = {name: self._end_weights(name) for name in ("patches", "velocity")}
        names = {place.name for place in self._shared.layout.block}
        if V_NORMS in names:
            norms = self._of_all_blocks(V_NORMS)
            means = self._of_all_blocks(V_MEAN) if V_MEAN in names else np.zeros_like(norms)
            self._bounds = norms, self._of_all_blocks("modulation"), means

    def prepare(self, time_features: F32) -> None:
        """Compute the time rows of a whole schedule, ``[rows, 256]``, in one call, and free the weights for it."""
        device, stage = self._shared.device, self._stages["time"]
        asked = {row.tobytes(): row for row in time_features}
        new = {key: row for key, row in asked.items() if key not in self._times}
        if not new:
            return
        if len(self._times) + len(new) > TIMES_KEPT:  # a server meets many schedules
            self._times = {key: rows for key, rows in self._times.items() if key in asked}
        features = device.put(np.stack(list(new.values())))
        made = {tensor.name: device.empty(tensor, steps=len(new)) for tensor in stage.outputs}
        device.run("time", {"time_features": features}, made, self._end_weights("time"))
        time, modulation = (device.get(made[name]) for name in ("time", "time_modulation"))
        self._times |= {key: (time[i], modulation[i]) for i, key in enumerate(new)}

    def follow(self, expert: str) -> None:
        """Announce the expert of the forward after the next one, so that its first blocks are brought early."""
        self._following = expert

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        """The velocity of a forward; see :class:`runtime.engine.Engine`."""
        check_inputs(self.name, self.inputs, inputs, self._profiles)
        video = np.concatenate([inputs[name][0] for name in ("latents", "condition") if name in inputs])
        patches, text, link = patchify(video), self._text(inputs["text"]), self._shared.link
        rows = shares(len(patches), link.size)[link.rank] if link else slice(0, len(patches))
        whole, patches = (link, len(patches)) if link else None, patches[rows]
        stream, slices = self._shared.stream_for(len(patches))
        stream.begin(self.name)
        forward = BlockForward(
            self._shared.device, self._stages, len(patches), slices, self._given(inputs, rows), whole
        )
        x = forward.in_slices("patches", {"patches": self._shared.device.put(patches)}, self._ends["patches"])["x"]
        for block in range(self._spec.layers):
            with stream.block(self.name, block, self._following) as slot:
                weights = self._shared.device.views(slot, self._shared.layout.block)
                x = forward.block(block, x, text[block], weights)
        self._following = self.name
        part = forward.in_slices("velocity", {"x": x}, self._ends["velocity"])["patches"]
        patches = self._shared.device.get(forward.gathered("patches", part))
        stream.end()
        return unpatchify(patches, inputs["latents"].shape)

    # -- inputs of stages

    def _given(self, inputs: Mapping[str, np.ndarray], own: slice) -> dict[str, Any]:
        """What all blocks share: rotations, time rows, and the mask of the first frame if it has its own time.

        Those with a row for a token have those of ``own`` tokens.
        """
        self.prepare(inputs["time_features"])
        rows = [self._times[row.tobytes()] for row in inputs["time_features"]]
        grid, half = inputs["rope_cos"].shape[:3], inputs["rope_cos"].shape[3]
        given = {name: np.ascontiguousarray(inputs[name]).reshape(-1, half)[own] for name in ("rope_cos", "rope_sin")}
        given |= {"time": np.stack([time for time, _ in rows]), "time_modulation": np.stack([m for _, m in rows])}
        if self._spec.time_rows > 1:
            mask = np.arange(grid[0] * grid[1] * grid[2]) < grid[1] * grid[2]
            given["first_frame"] = mask.astype(np.float32)[own, None]
        if self._bounds is not None:
            norms, tables, means = self._bounds
            given |= fp8_scales(norms, tables, given["time_modulation"], means)
        return {name: self._shared.device.put(array) for name, array in given.items()}

    def _of_all_blocks(self, name: str) -> np.ndarray:
        """The float32 weight ``name`` of every block, ``[blocks, size]``."""
        device, layout = self._shared.device, self._shared.layout
        (place,) = (place for place in layout.block if place.name == name)
        starts = (layout.region(block) + place.offset for block in range(layout.blocks))
        rows = [device.host_bytes(self.name, start, place.size_bytes).view(np.float32) for start in starts]
        return np.stack(rows)

    def _text(self, text: np.ndarray) -> list[dict[str, Any]]:
        """Keys and values of ``text`` for every block. Kept if the array is read-only, as any other may change."""
        link = self._shared.link
        if link is not None and link.resumed != self._resumed:  # members must agree on what they know
            self._texts, self._resumed = [], link.resumed
        for known, values in self._texts:
            if known is text:
                return values
        device, layout = self._shared.device, self._shared.layout
        context = self._new_outputs("text")
        device.run("text", {"text": device.put(text)}, context, self._end_weights("text"))
        start, values = layout.step_bytes, []
        places = [place for place in layout.block if place.offset >= start]
        for block in range(layout.blocks):
            values.append(self._new_outputs("text_kv"))
            if link is None or block % link.size == link.rank:
                memory = device.read(self.name, layout.region(block) + start, layout.block_bytes - start)
                device.run("text_kv", context, values[-1], device.views(memory, _moved(places, -start)))
        if link is not None:  # each has read the weights of its blocks alone
            for block, made in enumerate(values):
                for name in sorted(made):
                    link.broadcast(made[name], block % link.size)
        if text.flags.owndata and not text.flags.writeable:
            self._texts = [*self._texts[1 - PROMPTS_KEPT :], (text, values)]
        return values

    def _new_outputs(self, stage: str) -> dict[str, Any]:
        return {tensor.name: self._shared.device.empty(tensor) for tensor in self._stages[stage].outputs}

    def _end_weights(self, stage: str) -> dict[str, Any]:
        return self._shared.end_weights(self.name, self._stages[stage])


def _moved(places: Sequence[Place], by: int) -> list[Place]:
    return [Place(place.name, place.offset + by, place.size_bytes, place.shape) for place in places]
