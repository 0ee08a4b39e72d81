"""Trains the VAE on crops of clips: L1 and squared error, latents with a little noise, bfloat16 convolutions.

Afterwards the latents are brought to the mean and spread that VAE 2.1 is published with, exactly, by scaling the
1×1×1 convolutions around them; so the constants in ``wan22.specs`` hold for this VAE, too.
"""

import argparse
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from studies.tiny_model.clips import FRAMES, HEIGHT, WIDTH, random_clip
from studies.tiny_model.files import resumed, save
from studies.tiny_model.vae import Vae, channels_last
from wan22.specs import spec_named

MODEL = "t2v-a14b-toy"
CROP = (13, 32, 32)  # frames, rows, columns
BATCH, LEARNING_RATE = 2, 6e-4
NOISE, SHRINK = 0.1, 3e-4  # added to latents; weight of their squares, without which they would outgrow it
POOL = 400  # clips in memory that crops are cut from


def pool(name: str, count: int) -> np.ndarray:
    """Clips ``[count, F, H, W, 3]``, uint8."""
    return np.stack([random_clip(f"{name}-{index}")[1] for index in range(count)])


def crops(clips: np.ndarray, draw: random.Random, batch: int, size: tuple[int, int, int]) -> Tensor:
    """``[B, 3, *size]`` in [-1, 1]; of three places the one with most to see, so walls do not fill the batch."""
    cut = []
    for _ in range(batch):
        places = []
        for _ in range(3):
            f, y, x = (draw.randint(0, whole - part) for whole, part in zip((FRAMES, HEIGHT, WIDTH), size, strict=True))
            clip = clips[draw.randrange(len(clips))]
            places.append(clip[f : f + size[0], y : y + size[1], x : x + size[2]])
        cut.append(max(places, key=lambda part: float(part[::4, ::2, ::2].std())))
    return as_tensor(np.stack(cut))


def as_tensor(clips: np.ndarray) -> Tensor:
    """uint8 ``[B, F, H, W, 3]`` → float ``[B, 3, F, H, W]`` in [-1, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(clips)).float().div(127.5).sub(1).movedim(-1, 1)
    return tensor.contiguous(memory_format=torch.channels_last_3d)


def loss_of(vae: Vae, clips: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the mean squared error of the reconstruction."""
    with torch.autocast("cpu", torch.bfloat16):
        latents, _ = vae.encode(clips)
        shown = vae.decode(latents + NOISE * torch.randn_like(latents)).float()
    error = shown - clips
    square = error.square().mean()
    return error.abs().mean() + 2 * square + SHRINK * latents.float().square().mean(), square.detach()


def train(folder: Path, minutes: float, steps: int, threads: int) -> None:
    """Trains until ``steps`` are done or ``minutes`` have passed; goes on where an earlier call ended."""
    torch.set_num_threads(threads)
    vae = Vae(spec_named(MODEL).vae)
    channels_last(vae)
    optimiser = torch.optim.AdamW(vae.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    done = resumed(folder / "vae.pt", vae, [optimiser])
    torch.manual_seed(done)
    draw, clips = random.Random(done), pool(f"vae-{done}", POOL)
    start, shown = time.monotonic(), 0.0
    for step in range(done, steps):
        share = max(step / steps, (time.monotonic() - start) / 60 / minutes)
        if share >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
        loss, square = loss_of(vae, crops(clips, draw, BATCH, CROP))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        shown = 0.97 * shown + 0.03 * 10 * math.log10(4 / square.item())
        if step % 20 == 19 or step < 3:
            passed = time.monotonic() - start
            print(f"step {step + 1}  {passed:.0f} s  loss {loss.item():.4f}  PSNR {shown:.1f} dB", flush=True)
        if step % 100 == 99:
            save(folder / "vae.pt", vae, [optimiser], step + 1)
    save(folder / "vae.pt", vae, [optimiser], step + 1)


@torch.no_grad()
def calibrate(vae: Vae, clips: Tensor) -> None:
    """Scales ``conv1`` and ``conv2`` so that the latents of ``clips`` have the published mean and spread."""
    latents = torch.cat([vae.encode(clip[None])[0] for clip in clips]).movedim(1, 0).flatten(1)
    mean, std = latents.mean(1), latents.std(1)
    wanted_mean, wanted_std = vae.mean.flatten(), vae.std.flatten()
    gain, z = wanted_std / std, len(std)
    back = 1 / gain
    assert vae.conv1.bias is not None
    assert vae.conv2.bias is not None
    vae.conv1.weight[:z] *= gain[:, None, None, None, None]
    vae.conv1.bias[:z] = (vae.conv1.bias[:z] - mean) * gain + wanted_mean
    vae.conv2.bias += (vae.conv2.weight[:, :, 0, 0, 0] * (mean - wanted_mean * back)).sum(1)
    vae.conv2.weight *= back[None, :, None, None, None]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where checkpoints are kept")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    train(arguments.folder, arguments.minutes, arguments.steps, arguments.threads)
