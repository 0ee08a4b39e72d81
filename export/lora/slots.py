"""LoRAs for slots: what runs as two small products beside a linear, and what is stored anew because it is small."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.lora.deltas import F32, Delta, LowRank
from export.lora.merge import Lora
from wan22.errors import UserError

NAMES_SHOWN = 3


@dataclass(frozen=True)
class SlotChanges:
    """The changes that LoRAs make to one expert, by official name."""

    products: Mapping[str, Sequence[tuple[LowRank, float]]]  # of the blocks' matrices, with strengths
    vectors: Mapping[str, Sequence[tuple[Delta, float]]]  # biases, norms and modulation of blocks
    ends: frozenset[str]  # tensors around the blocks

    @property
    def rank(self) -> int:
        """The smallest rank of slots that hold the products."""
        return max((sum(delta.rank for delta, _ in parts) for parts in self.products.values()), default=0)

    def factors(self, weight: str) -> tuple[F32, F32] | None:
        """``down [rank, in]`` and ``up [out, rank]``: the weight changes by ``up·down``; None if it does not."""
        found = [delta.factors(strength) for delta, strength in self.products.get(weight, ())]
        if not found:
            return None
        return np.concatenate([down for down, _ in found]), np.concatenate([up for _, up in found], axis=1)

    def vector(self, name: str, own: F32) -> F32:
        """``own``, the tensor ``name`` of the checkpoint, with its changes."""
        for delta, strength in self.vectors.get(name, ()):
            own = delta.merged(own, strength)
        return own


def slot_changes(loras: Sequence[Lora], expert: str) -> SlotChanges:
    """The changes of ``loras`` to ``expert``.

    Raises:
        UserError: a change of a block's matrix is no product of two smaller ones.
    """
    products: dict[str, list[tuple[LowRank, float]]] = {}
    vectors: dict[str, list[tuple[Delta, float]]] = {}
    ends: set[str] = set()
    for lora in loras:
        other = []
        for name, deltas in lora.deltas.get(expert, {}).items():
            for delta in deltas:
                if not name.startswith("blocks."):
                    ends.add(name)
                elif isinstance(delta, LowRank):
                    products.setdefault(name, []).append((delta, lora.choice.strength))
                elif name.endswith(".weight") and ".norm" not in name:
                    other.append(name)
                else:
                    vectors.setdefault(name, []).append((delta, lora.choice.strength))
        if other:
            shown = ", ".join(other[:NAMES_SHOWN]) + (", …" if len(other) > NAMES_SHOWN else "")
            found = f"LoRA {lora.choice.path} changes {len(other)} matrices by no product of two smaller ones: {shown}"
            raise UserError(found, "a plain LoRA for slots", "merge it: wan-trt lora apply, or export --lora")
    return SlotChanges(products, vectors, frozenset(ends))
