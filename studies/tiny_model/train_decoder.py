"""Goes on with the VAE's decoder alone, on whole pictures and on the latents that the transformer learns from.

The encoder is fixed by then, so this can run beside the transformer's training. A little noise on the latents prepares
the decoder for those that a transformer makes.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch

from studies.tiny_model.clips import random_clip
from studies.tiny_model.data import encoded
from studies.tiny_model.files import resumed, save, weights
from studies.tiny_model.train_vae import MODEL, as_tensor
from studies.tiny_model.vae import Vae, channels_last
from wan22.specs import spec_named

LEARNING_RATE, NOISE = 4e-4, 0.1  # noise in units of the normalised latents


def train(folder: Path, minutes: float, steps: int) -> None:
    """Trains until ``steps`` are done or ``minutes`` have passed; goes on where an earlier call ended."""
    vae = Vae(spec_named(MODEL).vae)
    vae.load_state_dict(weights(folder / "vae-calibrated.pt"))
    channels_last(vae)
    learned = [*vae.conv2.parameters(), *vae.decoder.parameters()]
    optimiser = torch.optim.AdamW(learned, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    done = step = resumed(folder / "vae-tuned.pt", vae, [optimiser])
    draw, start, shown = random.Random(done), time.monotonic(), 20.0
    latents, *_ = encoded(folder)
    for step in range(done, steps):
        share = max(step / steps, (time.monotonic() - start) / 60 / minutes)
        if share >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 20) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
        index = draw.randrange(len(latents))
        clip = as_tensor(random_clip(f"train-{index}")[1][None])
        given = latents[index : index + 1].float()
        given = (given + NOISE * torch.randn_like(given)) * vae.std + vae.mean
        with torch.autocast("cpu", torch.bfloat16):
            error = vae.decode(given).float() - clip
        square = error.square().mean()
        optimiser.zero_grad()
        torch.autograd.backward(error.abs().mean() + 2 * square)
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        shown = 0.97 * shown + 0.03 * 10 * math.log10(4 / square.item())
        if step % 20 == 19:
            print(f"step {step + 1}  {time.monotonic() - start:.0f} s  PSNR {shown:.1f} dB", flush=True)
        if step % 100 == 99:
            save(folder / "vae-tuned.pt", vae, [optimiser], step + 1)
    save(folder / "vae-tuned.pt", vae, [optimiser], step + 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where latents and checkpoints are kept")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.folder, arguments.minutes, arguments.steps)
