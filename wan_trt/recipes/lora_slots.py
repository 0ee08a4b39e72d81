"""LoRAs → small files that engines with slots take beside their weights, instead of new weights.

A file has the slots' matrices and what else a LoRA changes: biases, norms and modulation of the blocks, and tensors
around them. The engines stay exact where they differ from the checkpoint: scales of quantised matrices divide ``up``,
factors of quantised rows divide ``down``, and a mean that the rows lack, as the bias of V that quantised engines add
behind O, passes through the LoRA once, into the bias.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np

from engines.block_weights import ALIGNMENT_BYTES, PAGE_BYTES, V_NORMS, round_up
from engines.build import RANKS
from export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from export.lora.merge import Lora, LoraChoice, merged, open_lora, parse_lora
from export.lora.slots import SlotChanges, slot_changes
from runtime.block_files import BlockFiles
from runtime.weight_sets import lora_slots
from wan22.block_layout import (
    LORA_DOWN,
    LORA_UP,
    Overlay,
    Place,
    parts_of,
    read_block_layout,
    varies,
    write_block_layout,
)
from wan22.bundle import Bundle, file_entry, open_bundle, write_manifest
from wan22.component import Component
from wan22.errors import UserError
from wan22.files import scratch_folder
from wan22.outputs import check_disk
from wan22.progress import Progress, silent
from wan_trt.recipes.apply_lora import check_same_checkpoint

F32 = np.ndarray
LARGEST_CODES = {"float8_e4m3fn": 448.0, "int8": 127.0}  # of slots that have codes; their scales are in the next matrix
SMALLEST_ROW = 1e-12
SET = "lora"  # the name of a set that a command fills for itself
MERGE = "merge it: wan-trt lora apply, or serve engines without slots"


def write_slot_set(
    base: Bundle, loras: Sequence[LoraChoice], folder: Path, checkpoint: str | None = None, progress: Progress = silent
) -> Path:
    """Write the weight set ``folder`` for the engines ``base``, which have slots: ``loras`` beside their weights.

    ``checkpoint`` is read only for the tensors around the blocks and, for quantised engines, for biases of V.

    Raises:
        UserError: a LoRA does not fit the model or is none that slots hold, all together need larger slots, or the
            checkpoint is missing or another one.
    """
    manifest, rank = base.manifest, lora_slots(base.manifest)
    opened = [open_lora(choice, manifest.spec) for choice in loras]
    changes = {expert: slot_changes(opened, expert) for expert in manifest.spec.experts}
    if (needed := max(each.rank for each in changes.values())) > rank:
        enough = -(-needed // RANKS.step) * RANKS.step
        found = f"LoRAs of rank {needed}" + (" together" if len(opened) > 1 else "")
        remedy = f"build with --lora-slots {enough}" if enough in RANKS else MERGE
        raise UserError(found, f"at most {rank}, the slots of {base.folder}", remedy)
    read = cache(lambda: _same_checkpoint(base, checkpoint or manifest.source.checkpoint, progress))
    components, sizes = [], [read_block_layout(base.path(base.component(e).weights[0])) for e in changes]
    check_disk(folder, sum(each.blocks * (each.varying[1] - each.varying[0]) for each in sizes))
    folder.mkdir(parents=True)
    for done, expert in enumerate(manifest.spec.experts, 1):
        component = base.component(expert)
        for file in (stage.graph for stage in component.stages):
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.path(file), folder / file.path)
        slots = _ExpertSlots(base, component, changes[expert], read)
        paths = folder / f"{expert}.slots.json", folder / f"{expert}.slots"
        write_block_layout(paths[0], slots.write(paths[1], opened))
        components.append(replace(component, weights=tuple(file_entry(folder, path) for path in paths)))
        progress("fill the slots", done, len(manifest.spec.experts), "experts")
    for file in manifest.tokenizer:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.path(file), folder / file.path)
    records = tuple(lora.record() for lora in opened)
    write_manifest(folder, replace(manifest, components=tuple(components), loras=records))
    return folder


@contextmanager
def filled_slots(
    engines: Path, arguments: Sequence[str], checkpoint: str | None = None, progress: Progress = silent
) -> Iterator[Path | None]:
    """A weight set for LoRAs in a command's ``arguments``, ``FILE[@STRENGTH][:EXPERT]``; None without any.

    Raises:
        UserError: as :func:`write_slot_set`; the engines have no slots, or merged LoRAs.
    """
    if not arguments:
        yield None
        return
    base, choices = open_bundle(engines, "engines"), [parse_lora(argument) for argument in arguments]
    if not lora_slots(base.manifest):
        blocks = base.component(base.manifest.spec.experts[0]).stages
        merge = "merge it: wan-trt lora apply" if blocks else "merge it: wan-trt export --lora"
        remedy = f"build with --lora-slots RANK, or {merge}"
        raise UserError(f"--lora for {engines}", "engines with slots", remedy)
    refuse_merged(base)
    with scratch_folder("lora") as folder:
        yield write_slot_set(base, choices, folder / SET, checkpoint, progress)


def refuse_merged(base: Bundle) -> None:
    """Refuse engines into which LoRAs are merged: a set is made from the checkpoint and would lack them."""
    if merged_in := base.manifest.loras:
        found = f"--lora for {base.folder}, into which {', '.join(lora.file for lora in merged_in)} is merged"
        remedy = "take engines without, and name the merged LoRA beside the other one, with a --lora for each"
        raise UserError(found, "engines without merged LoRAs", remedy)


def _same_checkpoint(base: Bundle, where: str, progress: Progress) -> Checkpoint:
    opened = open_checkpoint(where, progress)
    check_same_checkpoint(base, opened)
    return opened


@dataclass(frozen=True)
class Region:
    """The bytes of a block's region from ``start`` on, as tensors by name."""

    memory: np.ndarray
    start: int
    places: dict[str, Place]
    dtypes: dict[str, str]

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> np.ndarray:
        place = self.places[name]
        offset = place.offset - self.start
        content = self.memory[offset : offset + place.size_bytes]
        return content.view(_dtype(self.dtypes[name])).reshape(place.shape)

    def vector(self, name: str) -> F32 | None:
        """A float32 copy of a tensor; None if the block has none of that name."""
        return np.array(self[name], np.float32) if name in self else None


class _ExpertSlots:
    """The slots of one expert."""

    def __init__(
        self, base: Bundle, component: Component, changes: SlotChanges, checkpoint: Callable[[], Checkpoint]
    ) -> None:
        self._base, self._component, self._changes, self._checkpoint = base, component, changes, checkpoint
        self._layout = read_block_layout(base.path(component.weights[0]))
        self._dtypes = {t.name: t.dtype for stage in component.stages for t in stage.weights} | {V_NORMS: "float32"}
        self._places = {p.name: p for p in self._layout.block if varies(p.name, p.shape)}
        self._linears = [n.removesuffix(f".{LORA_DOWN}") for n in self._places if n.endswith(LORA_DOWN)]

    def write(self, path: Path, loras: Sequence[Lora]) -> Overlay:
        """Write the file and return its layout."""
        layout, name = self._layout, self._component.name
        start, end = layout.varying
        overlay = self._ends()
        files = BlockFiles({name: self._base.path(self._component.weights[1])}, layout)
        with path.open("wb") as stream, files:
            for place in overlay.ends:
                content = merged(self._checkpoint().weights[name], loras, name).read(place.name)
                stream.seek(place.offset)
                stream.write(_stored(content, self._dtypes[place.name], place.name).tobytes())
            for block in range(layout.blocks):
                memory = files.read(name, layout.region(block) + start, end - start)
                self._change(block, Region(memory, start, self._places, self._dtypes))
                stream.seek(overlay.first_block + block * overlay.stride)
                stream.write(memory.tobytes())
        return overlay

    def _ends(self) -> Overlay:
        places, end = [], 0
        for place in (place for place in self._layout.ends if place.name in self._changes.ends):
            places.append(_moved(place, end))
            end = round_up(end + place.size_bytes, ALIGNMENT_BYTES)
        start, stop = self._layout.varying
        return Overlay(tuple(places), round_up(end, PAGE_BYTES), round_up(stop - start, PAGE_BYTES))

    def _change(self, block: int, region: Region) -> None:
        """Fill the slots of a block, and change its vectors."""
        entering = {linear: self._constant_input(block, linear, region) for linear in self._linears}
        for name in self._changes.vectors:
            if name.startswith(f"blocks.{block}."):
                self._vector(name, name.removeprefix(f"blocks.{block}."), region)
        for linear in self._linears:
            fill_linear(
                linear, lambda part: self._changes.factors(f"blocks.{block}.{part}.weight"), region, entering[linear]
            )

    def _constant_input(self, block: int, linear: str, region: Region) -> F32 | None:
        """What every row of the linear's true input has and its operand lacks, ``[in]``; None for nothing."""
        if not any(f"blocks.{block}.{part}.weight" in self._changes.products for part in parts_of(linear)):
            return None
        constant = region.vector(f"{owner_of(linear)}.input_mean")
        if linear.endswith("attn.o") and f"{linear}.weight_scale" in region:  # V's bias is added behind a quantised O
            v, read = f"blocks.{block}.{linear[:-1]}v", self._checkpoint().weights[self._component.name].read
            moved = read(f"{v}.bias").astype(np.float32)
            if (mean := region.vector(f"{owner_of(f'{linear[:-1]}qkv')}.input_mean")) is not None:
                moved = moved + read(f"{v}.weight").astype(np.float32) @ mean
            constant = moved if constant is None else constant + moved
        return constant

    def _vector(self, name: str, own: str, region: Region) -> None:
        """Change the vector ``name``, ``own`` in its block; a bias may be a part of a joined one."""
        if own.endswith(("self_attn.norm_q.weight", "self_attn.norm_k.weight")) and V_NORMS in region:
            raise UserError(f"a LoRA that changes {name}", "no change of FP8 attention's scales", MERGE)
        whole, part = own, slice(None)
        if own not in region:
            linear, _, leaf = own.rpartition(".")
            joined = next(joined for joined in self._linears if linear in parts_of(joined))
            index, count = parts_of(joined).index(linear), len(parts_of(joined))
            whole = f"{joined}.{leaf}"
            size = region[whole].size // count
            part = slice(index * size, (index + 1) * size)
        values = region[whole][part]
        before = values.astype(np.float32)
        after = self._changes.vector(name, before)
        values[...] = _stored(after, values.dtype, name)
        if own == "self_attn.v.bias" and V_NORMS in region:
            region[V_NORMS][0] += np.abs(after - before)  # the bound is this times more than 1


def fill_linear(
    linear: str, factors: Callable[[str], tuple[F32, F32] | None], region: "Region", entering: F32 | None
) -> None:
    """Fill the slots of a linear.

    Args:
        linear: its name in a block, such as "self_attn.qkv".
        factors: ``down [rank, in]`` and ``up [out, rank]`` of each of its parts ("self_attn.q"); None for no change.
        region: the tensors of the block, which change.
        entering: what every row of the linear's true input has and its operand lacks, ``[in]``; None for nothing.
    """
    parts, down, up = parts_of(linear), region[f"{linear}.{LORA_DOWN}"], region[f"{linear}.{LORA_UP}"]
    rank, leaving = len(down) // len(parts), len(up) // len(parts)
    factor, scale = region.vector(f"{owner_of(linear)}.input_factor"), region.vector(f"{linear}.weight_scale")
    for index, part in enumerate(parts):
        if (found := factors(part)) is None:
            continue
        slot = slice(index * rank, index * rank + len(found[0]))
        outputs = slice(index * leaving, (index + 1) * leaving)
        matrix, other = found[0] if factor is None else found[0] / factor, found[1]
        if (largest := LARGEST_CODES.get(down.dtype.name)) is not None:
            steps = np.maximum(np.abs(matrix).max(1), SMALLEST_ROW) / largest
            matrix, other = matrix / steps[:, None], other * steps
        down[slot] = _stored(np.rint(matrix) if down.dtype == np.int8 else matrix, down.dtype, linear)
        up[outputs, slot] = _stored(other if scale is None else other / scale[outputs, None], up.dtype, linear)
        if entering is not None:
            bias = region[f"{linear}.bias"]
            bias[outputs] = bias[outputs].astype(np.float32) + found[1] @ (found[0] @ entering)
        if part == "self_attn.v" and V_NORMS in region:  # of a sum of two matrices, by the triangle inequality
            longer = np.sqrt(np.maximum(((found[1] @ (found[0] @ found[0].T)) * found[1]).sum(1), 0))
            region[V_NORMS][0] += longer


def owner_of(linear: str) -> str:
    """The linear under whose name an input is recorded: ``self_attn.q`` for ``self_attn.qkv``."""
    return parts_of(linear)[0]


def _moved(place: Place, offset: int) -> Place:
    return Place(place.name, offset, place.size_bytes, place.shape)


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _stored(values: F32, dtype: np.dtype | str, name: str) -> np.ndarray:
    """``values`` as stored.

    Raises:
        UserError: some are not finite.
    """
    kind = _dtype(dtype) if isinstance(dtype, str) else dtype
    found = values.astype(kind)
    if not np.isfinite(found.astype(np.float32)).all():
        raise UserError(f"LoRA: NaN, infinity or values beyond {kind.name} for {name}", "finite weights", MERGE)
    return found
