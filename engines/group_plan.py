"""A video on several GPUs: the memory of each, what they exchange, and the time, by every split: ``plan --gpus``.

Time is the roofline of one GPU, divided where the work divides, plus exchanges that nothing hides. ``efficiency`` is
the share of the roofline that one GPU reaches. With the one that a published run has on one GPU, the time on 4 and 8 is
within 7 % of the published one over NVLink, and 17 to 25 % below it over PCIe (RTX 4090), where that run also moves
weights.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

from engines.block_plan import CONTEXT_BYTES
from engines.plan import Plan
from engines.targets import Target
from wan22.block_memory import transformer_blocks
from wan22.errors import UserError
from wan22.parallel import Split, exchanged_bytes, group_sizes
from wan22.precision import Number
from wan22.specs import ModelSpec
from wan22.strips import widest
from wan22.vae_memory import staged_vae

Link = Literal["nvlink", "pcie4", "pcie5"]
Goal = Literal["latency", "throughput"]
LINKS: tuple[Link, ...] = get_args(Link)
GOALS: tuple[Goal, ...] = get_args(Goal)
PCIE_GB_S: dict[Link, float] = {"pcie4": 25.0, "pcie5": 50.0}
NVLINK_GB_S = {"8.0": 300.0, "9.0": 450.0, "10.0": 900.0, "10.3": 900.0}  # one direction, by compute capability
THROUGH_HOST = 0.5  # GeForce cards copy to each other through host memory, so every byte crosses the bus twice


def usual_link(target: Target) -> Link:
    """NVLink where GPUs are sold with it, else PCIe as the GPU has it."""
    if target.compute_capability in NVLINK_GB_S and not target.product.startswith("GeForce"):
        return "nvlink"
    return "pcie5" if target.bus_gb_s >= PCIE_GB_S["pcie5"] else "pcie4"


def link_gb_s(target: Target, link: Link) -> float:
    """GB/s that a GPU sends, while all others do.

    Raises:
        UserError: the GPU has no NVLink.
    """
    if link == "nvlink":
        if target.compute_capability not in NVLINK_GB_S:
            raise UserError(f"--link nvlink for {target.name}", "pcie4 or pcie5", "it has no NVLink")
        return NVLINK_GB_S[target.compute_capability]
    return PCIE_GB_S[link] * (THROUGH_HOST if target.product.startswith("GeForce") else 1.0)


@dataclass(frozen=True)
class GroupPlan:
    """``plan`` is for one GPU; ``gpus`` of them make videos with ``split``, as many at a time as it fits."""

    plan: Plan
    split: Split
    gpus: int
    link: Link
    efficiency: float = 1.0  # of the roofline

    @property
    def spec(self) -> ModelSpec:
        return self.plan.request.spec

    @property
    def replicas(self) -> int:
        """Groups of GPUs, each with a video."""
        return self.gpus // self.split.members

    # -- exchange

    @cached_property
    def forward_bytes(self) -> float:
        """What a GPU sends in one forward for the other shares of tokens."""
        if self.split.ulysses == 1:
            return 0.0
        precision, dit = self.plan.request.precision, self.spec.dit
        operand, output = precision.attention.bits / 8, precision.wide.linears.bits / 8
        widths = (operand, operand, operand, output)
        return dit.layers * max(exchanged_bytes(dit, self.plan.tokens, self.split.ulysses, widths))

    @property
    def step_bytes(self) -> float:
        """What the busiest GPU sends in a step: for its forwards, and one velocity to the other branch of guidance."""
        velocity = 4.0 * math.prod(self.plan.latent_shape) if self.split.cfg > 1 else 0.0
        return self._forwards * self.forward_bytes + velocity

    @property
    def link_seconds(self) -> float:
        """The exchanges of a step."""
        return self.step_bytes / (link_gb_s(self.plan.request.target, self.link) * 1e9)

    # -- time

    @property
    def _forwards(self) -> float:
        """Forwards of a step, one after the other."""
        return max(1.0, self.plan.forwards_per_step / self.split.cfg)

    @cached_property
    def step_seconds(self) -> float | None:
        whole = self.plan.step_seconds
        if whole is None:
            return None
        forward = whole / self.plan.forwards_per_step / self.split.ulysses / self.efficiency
        return self._forwards * forward + self.link_seconds

    @property
    def rest_seconds(self) -> float | None:
        """Text encoder and VAE; strips of pictures take the time of the widest."""
        if self.plan.video_seconds is None or self.plan.step_seconds is None:
            return None
        wide = self.plan.request.target.peak_tflops(Number.FP32) or math.inf
        vae = self.plan.vae_flops / (wide * 1e12)
        text = self.plan.video_seconds - self.plan.request.steps * self.plan.step_seconds - vae
        return (text + vae * self._widest_strip) / self.efficiency

    @property
    def _widest_strip(self) -> float:
        if self.split.vae == 1:
            return 1.0
        size = (self.plan.latent_shape[3], self.plan.latent_shape[4])
        rows, columns = widest(self.spec.vae, "vae_decoder", size, self.split.vae)
        return rows * columns / (size[0] * size[1])

    @property
    def video_seconds(self) -> float | None:
        """From the prompt to the last frame."""
        if self.step_seconds is None or self.rest_seconds is None:
            return None
        return self.plan.request.steps * self.step_seconds + self.rest_seconds

    @property
    def videos_per_hour(self) -> float | None:
        """Of all GPUs. With an expert each, two videos are in work at a time, and the slower half decides."""
        if self.video_seconds is None or self.step_seconds is None or self.rest_seconds is None:
            return None
        seconds = self.video_seconds
        if self.split.experts > 1:
            first = high_noise_steps(self.spec, self.plan.request.steps)
            last = self.plan.request.steps - first
            seconds = max(first * self.step_seconds, last * self.step_seconds + self.rest_seconds)
        return 3600.0 * self.replicas / seconds

    @property
    def efficiency_of_scaling(self) -> float | None:
        """The time of one GPU over that of all of a group together."""
        alone = replace(self, split=Split(), gpus=1)
        if self.video_seconds is None or alone.video_seconds is None:
            return None
        return alone.video_seconds / (self.split.members * self.video_seconds)

    # -- memory

    @cached_property
    def memory_bytes(self) -> float:
        """The most that a GPU takes with its expert or experts resident, or with streamed blocks if that exceeds it."""
        return min(self._bytes(resident=True), max(self._bytes(resident=False), self.plan.usable_vram_bytes))

    def _bytes(self, *, resident: bool) -> float:
        blocks, precision = self.plan.in_blocks, self.plan.request.precision
        sizes, beside = (self.plan.tokens, blocks.block_bytes, self.split.ulysses), int(bool(blocks.low_rank))
        stack = transformer_blocks(self.spec.dit, precision, *sizes, beside=beside)
        held = 1 if self.split.experts > 1 else len(self.spec.experts)
        transformer = stack.memory(stack.most if resident else stack.least).total
        if resident:
            transformer += (held - 1) * self.spec.dit.layers * blocks.block_bytes
        text = next(memory for memory in self.plan.memory if memory.component == "text_encoder")
        return max(transformer, text.weights + text.scratch, self._vae_bytes) + CONTEXT_BYTES

    @property
    def _vae_bytes(self) -> float:
        precision, shape = self.plan.precisions["vae_decoder_first"], self.plan.latent_shape
        if self.split.vae > 1:
            return staged_vae(self.spec.vae, "vae_decoder", precision, shape, self.split.vae).total
        return max(m.weights + m.scratch + m.inputs_and_outputs for m in self.plan.memory if m.has_state)

    @property
    def fits(self) -> bool:
        return self._bytes(resident=False) <= self.plan.usable_vram_bytes

    def as_json(self) -> dict[str, Any]:
        return {
            "split": str(self.split) or "one",
            "gpus_per_video": self.split.members,
            "replicas": self.replicas,
            "link": self.link,
            "memory_per_gpu_bytes": self.memory_bytes,
            "fits": self.fits,
            "sent_per_step_bytes": self.step_bytes,
            "link_step_s": self.link_seconds,
            "step_s": self.step_seconds,
            "video_s": self.video_seconds,
            "videos_per_hour": self.videos_per_hour,
            "scaling_efficiency": self.efficiency_of_scaling,
        }


def high_noise_steps(spec: ModelSpec, steps: int) -> int:
    """The steps of the first expert, with evenly spaced times and the model's shift; all of them with one expert."""
    boundary, shift = spec.sampling.boundary, spec.sampling.shift
    if boundary is None:
        return steps
    return math.ceil(steps * (1 - boundary / (shift - boundary * (shift - 1))))


def splits_of(spec: ModelSpec, gpus: int) -> Iterator[Split]:
    """The splits of at most ``gpus`` GPUs that divide them into equal groups; the one without any first."""
    for experts in (1, 2)[: len(spec.experts)]:
        for cfg in (1, 2):
            for ulysses in (1, *group_sizes(spec.dit)):
                split = Split(experts, cfg, ulysses)
                if split.members <= gpus and gpus % split.members == 0:
                    yield replace(split, vae=split.members if experts == 1 else 1)


def group_plans(plan: Plan, gpus: int, link: Link, efficiency: float) -> list[GroupPlan]:
    """The plans of every split of ``gpus`` GPUs, the shortest video first."""
    every = [GroupPlan(plan, split, gpus, link, efficiency) for split in splits_of(plan.request.spec, gpus)]
    return sorted(every, key=lambda each: each.video_seconds or math.inf)


def best(plans: Sequence[GroupPlan], goal: Goal) -> GroupPlan | None:
    """The split that fits and serves ``goal`` best, of equal ones that with the fewest GPUs for a video."""
    fitting = [each for each in plans if each.fits and each.video_seconds is not None]

    def seconds(each: GroupPlan) -> float:
        found = each.video_seconds if goal == "latency" else 3600.0 / (each.videos_per_hour or math.nan)
        return found or math.inf

    return min(fitting, key=lambda each: (round(seconds(each), 3), each.split.members), default=None)


def reason(chosen: GroupPlan, goal: Goal) -> str:
    """Why ``chosen`` is best for ``goal``."""
    split, alone = chosen.split, replace(chosen, split=Split())
    if goal == "throughput":
        if split.members == 1:
            return "nothing is exchanged, and no GPU waits for another"
        if not alone.fits:
            return f"one GPU cannot hold the work: it needs {chosen.split.members} to fit"
        return "two videos are in work at a time and weights never move"
    parts = []
    if split.cfg > 1:
        parts.append("guidance divides without any exchange inside a forward")
    if split.ulysses > 1 and chosen.step_seconds:
        parts.append(
            f"exchanges are {100 * chosen.link_seconds / chosen.step_seconds:.0f} % of a step over {chosen.link}"
        )
    return "; ".join(parts) or "no split makes a video sooner"
