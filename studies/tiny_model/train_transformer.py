"""Trains text encoder and transformer by flow matching, then continues the transformer as two experts.

``x = (1 - σ) latents + σ noise``; the model learns ``noise - latents`` at timestep 1000 σ. σ is drawn as the sampler
visits it: evenly, then bent by the model's shift. One step in ten has no caption (guidance needs that): half of those
have the empty prompt, half the negative prompt that the product uses by default.
"""

import argparse
import copy
import math
import random
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from studies.tiny_model.data import Captions, encoded
from studies.tiny_model.files import resumed, save, weights
from studies.tiny_model.scenes import VOCABULARY, Content, random_content
from studies.tiny_model.train_vae import MODEL
from studies.tiny_model.transformer import Dit, TextEncoder
from wan22.sampling import NEGATIVE_PROMPT
from wan22.specs import TRAIN_TIMESTEPS, spec_named

BATCH, LEARNING_RATE, WITHOUT_CAPTION = 16, 2e-3, 0.1
AVERAGED = 0.998  # per step, of the moving average that is kept as the result
EXPERTS = {"shared": (0.0, 1.0), "high_noise": (0.875, 1.0), "low_noise": (0.0, 0.875)}  # range of σ


class Model(nn.Module):
    """What is trained together."""

    def __init__(self) -> None:
        super().__init__()
        spec = spec_named(MODEL)
        self.text_encoder, self.dit = TextEncoder(spec.text_encoder), Dit(spec.dit)

    def forward(self, latents: Tensor, timestep: Tensor, ids: Tensor, present: Tensor) -> Tensor:
        result: Tensor = self.dit(latents, timestep, self.text_encoder(ids, present), present)
        return result


@dataclass(frozen=True)
class Data:
    """Latents ``[N, z, T, h, w]`` in float16, what they show, and how captions become ids."""

    latents: Tensor
    contents: list[Content]
    captions: Captions

    def batch(self, draw: random.Random, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, ids and presence; a whole batch has captions or has none, which keeps short ones short."""
        chosen = draw.sample(range(len(self.contents)), size)
        texts = [self.contents[index].caption for index in chosen]
        if draw.random() < WITHOUT_CAPTION:
            texts = [draw.choice(("", NEGATIVE_PROMPT))] * size
        return self.latents[chosen].float(), *self.captions(texts)


def sigmas(count: int, limits: tuple[float, float], shift: float) -> Tensor:
    """Noise levels within ``limits``, spread over the batch as evenly as chance allows."""
    low, high = (limit / (shift - (shift - 1) * limit) for limit in limits)
    u = low + (high - low) * (torch.randperm(count) + torch.rand(count)) / count
    return shift * u / (1 + (shift - 1) * u)


def loss_of(model: Model, batch: tuple[Tensor, Tensor, Tensor], limits: tuple[float, float]) -> Tensor:
    latents, ids, present = batch
    noise = torch.randn_like(latents)
    sigma = sigmas(len(latents), limits, spec_named(MODEL).sampling.shift)
    level = sigma[:, None, None, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model((1 - level) * latents + level * noise, TRAIN_TIMESTEPS * sigma, ids, present)
    result: Tensor = (velocity.float() - (noise - latents)).square().mean()
    return result


def taught_text_encoder(captions: Captions, steps: int = 250) -> TextEncoder:
    """A text encoder from whose mean row every word of a caption can be read, which is where training starts.

    umt5 comes trained; without this, the transformer would have to wait for its text encoder.
    """
    encoder, draw = TextEncoder(spec_named(MODEL).text_encoder), random.Random(0)
    said = {field.name: list(VOCABULARY[field.name]) for field in fields(Content)}
    heads = nn.ModuleDict({name: nn.Linear(encoder.norm.weight.numel(), len(words)) for name, words in said.items()})
    optimiser = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], 2e-3)
    for step in range(steps):
        contents = [random_content(draw, held_out=False) for _ in range(32)]
        ids, present = captions([content.caption for content in contents])
        mean = encoder(ids, present).sum(1) / present.sum(1, keepdim=True)
        losses = [
            F.cross_entropy(heads[name](mean), torch.tensor([words.index(getattr(c, name)) for c in contents]))
            for name, words in said.items()
        ]
        loss = torch.stack(losses).sum()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        if step % 50 == 49:
            print(f"text encoder: step {step + 1}  loss {loss.item():.3f}", flush=True)
    return encoder


def train(folder: Path, part: str, minutes: float, steps: int, rate: float) -> None:
    """Trains ``part`` until ``steps`` are done or ``minutes`` have passed; experts start from "shared"."""
    model, captions = Model(), Captions(folder)
    if part == "shared" and not (folder / "shared.pt").exists():
        model.text_encoder = taught_text_encoder(captions)
    if part != "shared":
        model.load_state_dict(weights(folder / "shared-average.pt"))
        model.text_encoder.requires_grad_(False)  # both experts read the same text
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimisers = _optimisers(model, rate)
    done = resumed(folder / f"{part}.pt", model, optimisers)
    average = copy.deepcopy(model)
    if done:
        average.load_state_dict(weights(folder / f"{part}-average.pt"))
    torch.manual_seed(done)
    draw, data = random.Random(done), Data(*encoded(folder), captions)
    start, shown, step = time.monotonic(), 1.0, done
    for step in range(done, steps):
        share = max(step / steps, (time.monotonic() - start) / 60 / minutes)
        if share >= 1:
            break
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.03 + 0.97 * (1 + math.cos(math.pi * share)) / 2)
        loss = loss_of(model, data.batch(draw, BATCH), EXPERTS[part])
        model.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        for optimiser in optimisers:
            optimiser.step()
        with torch.no_grad():
            weight = 1 - min(AVERAGED, (step + 1) / (step + 10))
            for kept, now in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(now, weight)
        shown = 0.98 * shown + 0.02 * loss.item()
        if step % 50 == 49:
            print(f"step {step + 1}  {time.monotonic() - start:.0f} s  loss {shown:.4f}", flush=True)
        if step % 200 == 199:
            _save(folder, part, model, average, optimisers, step + 1)
            data = Data(*encoded(folder), captions)  # more clips may have been encoded meanwhile
    _save(folder, part, model, average, optimisers, step + 1)


def _optimisers(model: Model, rate: float) -> list[Optimizer]:
    """Muon for the matrices of the blocks, which needs about half the steps, and AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and "dit.blocks" in name]
    kept = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in kept]
    muon = torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.01), muon]


def _save(folder: Path, part: str, model: Model, average: Model, optimisers: list[Optimizer], step: int) -> None:
    save(folder / f"{part}-average.pt", average, [], step)
    save(folder / f"{part}.pt", model, optimisers, step)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where latents and checkpoints are kept")
    parser.add_argument("part", choices=EXPERTS)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.folder, arguments.part, arguments.minutes, arguments.steps, arguments.rate)
