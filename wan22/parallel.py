"""How one model runs on several devices: an expert each, guidance on two, tokens divided among some (``--parallel``).

Members are numbered with the expert slowest and the share of tokens fastest: ``experts,cfg2,ulysses4`` has 16, of which
0 to 3 compute the first expert's conditional velocity and 4 to 7 its unconditional one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from wan22.errors import UserError
from wan22.parts import DitSpec
from wan22.specs import ModelSpec

LARGEST_GROUP = 8  # GPUs of one machine
AUTO = "auto"
WORDS = "experts, cfg2, ulyssesN, vaeN, several of them with commas, or auto"


@dataclass(frozen=True)
class Split:
    """The parts into which the work is divided; 1 each on one device."""

    experts: int = 1
    cfg: int = 1
    ulysses: int = 1
    vae: int = 1  # members that take strips of the VAE's pictures, beside what they do otherwise

    @property
    def members(self) -> int:
        return max(self.experts * self.cfg * self.ulysses, self.vae)

    def __str__(self) -> str:
        parts = [name for name, count in (("experts", self.experts), (f"cfg{self.cfg}", self.cfg)) if count > 1]
        parts += [f"{name}{count}" for name, count in (("ulysses", self.ulysses), ("vae", self.vae)) if count > 1]
        return ",".join(parts)

    def units(self, expert: int) -> list[tuple[int, ...]]:
        """The members that compute a forward of the ``expert``-th expert together, by branch of guidance."""
        first = self.cfg * self.ulysses * (expert if self.experts > 1 else 0)
        starts = (first + branch * self.ulysses for branch in range(self.cfg))
        return [tuple(range(start, start + self.ulysses)) for start in starts]

    @property
    def home(self) -> int:
        """The member of text encoder and VAE: with an expert each, that of the last, which has fewer steps."""
        return self.units(self.experts - 1)[0][0]

    def check(self, spec: ModelSpec) -> None:
        """Refuse a split that ``spec`` does not have.

        Raises:
            UserError: it has one expert, or its heads do not divide.
        """
        if self.experts > len(spec.experts):
            raise UserError(f"--parallel experts for {spec.name}", "a model with two experts", "use cfg2 or ulysses2")
        if self.ulysses > 1 and self.ulysses not in group_sizes(spec.dit):
            found = f"--parallel ulysses{self.ulysses} for {spec.dit.heads} heads"
            raise UserError(found, f"a number that divides them: {sizes_text(spec.dit)}", "use one of these")


ALONE = Split()


@dataclass(frozen=True)
class Devices:
    """Numbered GPUs, or threads of a CPU, and the split among them; the numbers stand in the order of the members."""

    split: Split = ALONE
    numbers: tuple[int, ...] = ()

    @property
    def together(self) -> bool:
        return self.split != ALONE


ONE_DEVICE = Devices()


def group_sizes(dit: DitSpec) -> tuple[int, ...]:
    """The numbers of devices among which the heads of attention divide."""
    return tuple(count for count in range(2, LARGEST_GROUP + 1) if dit.heads % count == 0)


def sizes_text(dit: DitSpec) -> str:
    return ", ".join(map(str, group_sizes(dit))) or "none does"


def shares(tokens: int, members: int) -> list[slice]:
    """The tokens of every member: ⌈tokens / members⌉ of the first ones, ⌊tokens / members⌋ of the others."""
    each, more = divmod(tokens, members)
    ends = accumulate([each + (member < more) for member in range(members)], initial=0)
    return [slice(start, stop) for start, stop in pairwise(ends)]


def exchanged_bytes(dit: DitSpec, tokens: int, members: int, widths: Sequence[float]) -> list[float]:
    """What every member sends to others in one block.

    Args:
        dit: the transformer.
        tokens: of the video.
        members: that divide the tokens.
        widths: bytes of an element of q, k, v and the output of attention.
    """
    *of_qkv, of_output = widths
    sent = []
    for rows in shares(tokens, members):
        own = rows.stop - rows.start
        per_head_group = dit.width / members
        sent.append(per_head_group * (sum(of_qkv) * own * (members - 1) + of_output * (tokens - own)))
    return sent


def parse_split(text: str) -> Split:
    """The split that ``text`` names, such as ``cfg2,ulysses4``.

    Raises:
        UserError: a word is unknown, or stands twice.
    """
    found: dict[str, int] = {}
    for word in (word.strip() for word in text.split(",")):
        match = re.fullmatch(r"(experts|cfg|ulysses|vae)(\d*)", word)
        if not match or match[1] in found:
            raise UserError(f"--parallel {text!r}", WORDS, "write it as cfg2,ulysses4")
        name, count = match[1], int(match[2] or 2)
        if name in ("experts", "cfg") and count != 2:
            raise UserError(f"--parallel {word}", f"{name}2: there are two to divide", f"write {name}2")
        if not 2 <= count <= LARGEST_GROUP:
            raise UserError(f"--parallel {word}", f"2 to {LARGEST_GROUP}", "choose another number")
        found[name] = count
    return Split(**found)


def automatic_split(spec: ModelSpec, devices: int, groups: Sequence[int], strips: int) -> Split:
    """The split of ``devices`` for the shortest time of a video: guidance first, then tokens.

    Args:
        spec: the model.
        devices: how many there are.
        groups: numbers of devices among which the engines can divide tokens.
        strips: of pictures that the VAE's engines take at most.

    Raises:
        UserError: no split uses all of them.
    """
    usable = {1, *(count for count in groups if count in group_sizes(spec.dit))}
    for cfg in (2, 1):
        if devices % cfg == 0 and devices // cfg in usable:
            return Split(cfg=cfg, ulysses=devices // cfg, vae=max(1, min(devices, strips)))
    possible = sorted({1, *usable, *(2 * count for count in usable)})
    remedy = f"use that many, or engines built with --parallel for {devices}"
    raise UserError(f"--parallel auto for {devices} devices", f"one of {', '.join(map(str, possible))}", remedy)


def parse_devices(gpus: str | None) -> tuple[int, ...]:
    """The numbers in ``0,1,2``.

    Raises:
        UserError: it is not a list of different numbers.
    """
    if gpus is None:
        return ()
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})*", gpus.replace(" ", "")):
        raise UserError(f"--gpus {gpus!r}", "numbers with commas", "write it as 0,1")
    numbers = tuple(int(word) for word in gpus.split(","))
    if len(set(numbers)) != len(numbers):
        raise UserError(f"--gpus {gpus}", "each number once", "leave out the second")
    return numbers


def choose_devices(
    spec: ModelSpec, gpus: str | None, parallel: str | None, groups: Sequence[int], strips: int
) -> Devices:
    """The devices that the options ``--gpus`` and ``--parallel`` name, checked against each other and the model.

    ``groups`` and ``strips`` are those of :func:`automatic_split`.

    Raises:
        UserError: one of them is malformed, the model does not divide so, or there are too few or too many devices.
    """
    numbers = parse_devices(gpus)
    if parallel is None and len(numbers) < 2:
        return Devices(ALONE, numbers)
    if parallel is None or parallel == AUTO:
        if not numbers:
            raise UserError("--parallel auto", "the devices to use", "name them with --gpus 0,1")
        split = automatic_split(spec, len(numbers), groups, strips)
    else:
        split = parse_split(parallel)
    split.check(spec)
    numbers = numbers or tuple(range(split.members))
    if len(numbers) != split.members:
        found = f"--gpus {','.join(map(str, numbers))} for --parallel {split}"
        raise UserError(found, f"{split.members} devices", f"name {split.members} of them")
    return Devices(split, numbers)
