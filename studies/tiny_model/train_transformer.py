"""Trains text encoder and transformer by flow matching, then continues the transformer as two experts.

``x = (1 - σ) latents + σ noise``; the model learns ``noise - latents`` at timestep 1000 σ. σ is drawn as the sampler
visits it, bent by the model's shift, and more often where little is seen yet. One step in ten has no caption (guidance
needs that): half of those have the empty prompt, half the negative prompt that the product uses by default.
"""

import argparse
import math
import random
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from studies.tiny_model.data import CAPTION_TOKENS, Captions, encoded
from studies.tiny_model.files import resumed, save, weights
from studies.tiny_model.scenes import VOCABULARY, Content, random_content
from studies.tiny_model.train_vae import MODEL
from studies.tiny_model.transformer import Dit, TextEncoder
from wan22.sampling import NEGATIVE_PROMPT
from wan22.specs import TRAIN_TIMESTEPS, spec_named

BATCH, LEARNING_RATE, WITHOUT_CAPTION = 16, 2e-3, 0.1
OBJECT = 6.0  # weight of the loss where the object can be, beside 1 elsewhere: two fifths of the positions
ASKED = ("size", "colour", "shape", "motion")
GRID, CELLS = (5, 4, 6), 4  # tokens in time, rows and columns; cells of a token across, see ``data.in_cells``
THICKER = 0.75  # power of the share of the range; 1 would be even
AVERAGED = 0.995  # per step, of the moving average that is kept as the result
EXPERTS = {"shared": (0.0, 1.0), "high_noise": (0.875, 1.0), "low_noise": (0.0, 0.875)}  # range of σ


class Hints(nn.Module):
    """Three questions that tokens are asked on their way, beside the velocity, and which end with the training.

    Where is the token? Nothing says so, since RoPE knows distances only and the input is noise; from the velocity alone
    the model hardly learns it, and without it no motion. Which words does the caption say? And what of the object will
    be seen there?
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.places = nn.ModuleList(nn.Linear(width, count) for count in GRID)
        self.words = nn.ModuleList(nn.Linear(width, len(VOCABULARY[field])) for field in ASKED)
        self.cover = nn.Linear(width, CELLS**2)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, tokens: list[Tensor], covers: Tensor, words: Tensor) -> Tensor:
        """The loss of the answers.

        Args:
            tokens: ``[B, L, width]`` behind each block.
            covers: uint8 ``[B, T, rows, columns]`` of :func:`data.in_cells`.
            words: which of ``VOCABULARY`` each caption says, ``[B, fields]`` in the order of ``ASKED``.
        """
        early, late = self.norm(tokens[1]), self.norm(tokens[3])
        places = torch.stack(torch.meshgrid(*map(torch.arange, GRID), indexing="ij")).flatten(1)[:, None]
        right = [*places.expand(-1, len(early), -1), *words.mT[..., None].expand(-1, -1, early.shape[1])]
        asked = zip([*self.places, *self.words], right, strict=True)
        told = [F.cross_entropy(answer(early).flatten(0, 1), of.flatten()) for answer, of in asked]
        t, h, w = GRID
        cells = covers.view(-1, t, h, CELLS, w, CELLS).transpose(3, 4).reshape(len(late), t * h * w, CELLS**2)
        seen = F.binary_cross_entropy_with_logits(self.cover(late), cells.float() / 255)
        return 0.3 * torch.stack(told).sum() + seen


class Model(nn.Module):
    """What is trained together."""

    def __init__(self) -> None:
        super().__init__()
        spec = spec_named(MODEL)
        self.text_encoder, self.dit = TextEncoder(spec.text_encoder), Dit(spec.dit)
        self.hints = Hints(spec.dit.width)
        self.outputs = self.dit.outputs  # may be compiled

    def forward(self, latents: Tensor, timestep: Tensor, ids: Tensor, present: Tensor) -> tuple[Tensor, list[Tensor]]:
        text = self.text_encoder(ids, present)
        with torch.compiler.set_stance("default" if ids.shape[1] == CAPTION_TOKENS else "force_eager"):
            return self.outputs(latents, timestep, text, present)


@dataclass(frozen=True)
class Data:
    """Latents ``[N, z, T, h, w]`` in float16, what they show, and how captions become ids."""

    latents: Tensor
    regions: Tensor  # bool [N, T, h, w]
    covers: Tensor  # uint8 [N, T, rows, columns]
    contents: list[Content]
    captions: Captions

    def batch(self, draw: random.Random, size: int) -> "Batch":
        """A whole batch has captions or has none, which keeps short ones short."""
        chosen = draw.sample(range(len(self.contents)), size)
        texts = [self.contents[index].caption for index in chosen]
        if without := draw.random() < WITHOUT_CAPTION:
            texts = [draw.choice(("", NEGATIVE_PROMPT))] * size
        weight = 1 + (OBJECT - 1) * self.regions[chosen].float()
        said = [[VOCABULARY[field].index(getattr(self.contents[index], field)) for field in ASKED] for index in chosen]
        hints = None if without else (self.covers[chosen], torch.tensor(said))
        return Batch(self.latents[chosen].float(), weight / weight.mean(), hints, *self.captions(texts))


@dataclass(frozen=True)
class Batch:
    latents: Tensor
    weight: Tensor  # of the loss, [B, T, h, w], 1 on average
    hints: tuple[Tensor, Tensor] | None  # covers and words of :class:`Hints`; None without captions
    ids: Tensor
    present: Tensor


def sigmas(count: int, limits: tuple[float, float], shift: float) -> Tensor:
    """Noise levels within ``limits``, spread over the batch evenly, and thicker where little is seen yet."""
    low, high = (limit / (shift - (shift - 1) * limit) for limit in limits)
    u = low + (high - low) * ((torch.randperm(count) + torch.rand(count)) / count) ** THICKER
    return shift * u / (1 + (shift - 1) * u)


def losses_of(model: Model, batch: Batch, limits: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The loss of the velocity and that of the hints."""
    noise = torch.randn_like(batch.latents)
    sigma = sigmas(len(noise), limits, spec_named(MODEL).sampling.shift)
    level = sigma[:, None, None, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        noisy = (1 - level) * batch.latents + level * noise
        velocity, tokens = model(noisy, TRAIN_TIMESTEPS * sigma, batch.ids, batch.present)
    square = (velocity.float() - (noise - batch.latents)).square() * batch.weight.unsqueeze(1)
    hints = noise.new_zeros(()) if batch.hints is None else model.hints(tokens, *batch.hints)
    return square.mean(), hints


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


def train(folder: Path, part: str, minutes: float, steps: int, rate: float, *, compiled: bool) -> None:
    """Trains ``part`` until ``steps`` are done or ``minutes`` have passed; experts start from "shared"."""
    model, captions = Model(), Captions(folder)
    if part == "shared" and not (folder / "shared.pt").exists():
        model.text_encoder = taught_text_encoder(captions)
    if part != "shared":
        start = folder / f"{part}-start.pt"  # what the package holds, if ``pack --unpack`` has put it there
        missing, strange = model.load_state_dict(
            weights(start if start.exists() else folder / "shared-average.pt"), strict=False
        )
        assert not strange
        assert all(name.startswith("hints.") for name in missing)
        model.text_encoder.requires_grad_(False)  # both experts read the same text
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimisers = _optimisers(model, rate)
    done = resumed(folder / f"{part}.pt", model, optimisers)
    average = Model()
    average.load_state_dict(model.state_dict())
    if done:
        average.load_state_dict(weights(folder / f"{part}-average.pt"))
    if compiled:
        model.outputs = torch.compile(model.dit.outputs, dynamic=False)
    torch.manual_seed(done)
    draw, data = random.Random(done), Data(*encoded(folder), captions)
    began, shown, hinted, step = time.monotonic(), 1.0, 1.0, done
    for step in range(done, steps):
        share = max(step / steps, (time.monotonic() - began) / 60 / minutes)
        if share >= 1:
            break
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.03 + 0.97 * (1 + math.cos(math.pi * share)) / 2)
        loss, hints = losses_of(model, data.batch(draw, BATCH), EXPERTS[part])
        model.zero_grad()
        torch.autograd.backward(loss + hints)
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        for optimiser in optimisers:
            optimiser.step()
        with torch.no_grad():
            weight = 1 - min(AVERAGED, (step + 1) / (step + 10))
            for kept, now in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(now, weight)
        shown = 0.98 * shown + 0.02 * loss.item()
        hinted = hinted if hints.item() == 0 else 0.98 * hinted + 0.02 * hints.item()
        if step % 50 == 49:
            print(
                f"step {step + 1}  {time.monotonic() - began:.0f} s  loss {shown:.4f}, hints {hinted:.4f}", flush=True
            )
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
    parser.add_argument("--compile", action="store_true", help="a quarter faster, after a minute")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(
        arguments.folder, arguments.part, arguments.minutes, arguments.steps, arguments.rate, compiled=arguments.compile
    )
