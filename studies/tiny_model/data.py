"""What the transformer is trained on: clips encoded once, and their captions as token ids.

Latents are kept as float16, 15 kB per clip, so thousands fit into memory.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.checkpoint.tokenizer import unigram
from export.synth.corpus import lines
from export.synth.tokenizer import train
from studies.tiny_model.clips import HEIGHT, WIDTH, covered, random_scene, region, render
from studies.tiny_model.files import save, weights
from studies.tiny_model.scenes import COLOURS, LIGHTS, MOVES, SHAPES, SIZES, STAYS, WALLS, Content
from studies.tiny_model.train_vae import MODEL, as_tensor, calibrate, pool
from studies.tiny_model.vae import Vae, channels_last
from wan22.specs import spec_named

CHUNK = 250  # clips per file
CAPTION_TOKENS = 36  # of the longest


def corpus() -> Iterator[str]:
    """What the tokenizer learns: captions, so that their words are pieces, and sentences about everything else."""
    yield from lines()
    walls, sizes = list(WALLS), list(SIZES)
    for index, motion in enumerate((*MOVES, *STAYS)):
        for shape in SHAPES:
            for turn, colour in enumerate(COLOURS):
                wall, size = walls[(turn + index) % len(walls)], sizes[turn % 2]
                camera = ("camera pans left", "camera pans right", "camera zooms in", "camera zooms out")[index % 4]
                yield Content(size, colour, shape, motion, wall, list(LIGHTS)[1 + turn % 2], camera).caption


def tokenizer_model(folder: Path) -> bytes:
    """``spiece.model``, trained at the first call and kept in ``folder``."""
    path = folder / "spiece.model"
    if not path.exists():
        path.write_bytes(train(corpus()))
    return path.read_bytes()


class Captions:
    """Token ids of texts, padded to the longest; to the longest caption there is at least."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = unigram(tokenizer_model(folder))

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids ``[B, n]``, and which of them are there."""
        ids = [self._tokenizer.encode(text).ids for text in texts]
        longest = max(CAPTION_TOKENS, *map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        return padded, torch.tensor([[n < len(row) for n in range(longest)] for row in ids])


@torch.no_grad()
def encode(vae: Vae, folder: Path, clips: int) -> None:
    """Writes the latents of training clips 0…``clips`` in chunks; goes on where an earlier call ended."""
    channels_last(vae)
    for start in range(0, clips, CHUNK):
        path = folder / f"latents-{start:05d}.npz"
        if path.exists():
            continue
        scenes = [random_scene(f"train-{index}") for index in range(start, start + CHUNK)]
        latents = []
        with torch.autocast("cpu", torch.bfloat16):
            for scene in scenes:
                latents.append(vae.normalised(as_tensor(render(*scene)[None]))[0].float().numpy())
        beside = path.with_suffix(".partial.npz")
        np.savez(
            beside,
            latents=np.stack(latents).astype(np.float16),
            regions=np.stack([in_latents(region(content)) for content, _ in scenes]),
            covers=np.stack([in_cells(covered(*scene)) for scene in scenes]),
            contents=np.array(json.dumps([asdict(content) for content, _ in scenes])),
        )
        beside.replace(path)
        print(f"{start + CHUNK} clips encoded, {time.process_time():.0f} s of CPU", flush=True)


def in_latents(pixels: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which positions ``[T, h, w]`` of the latents stand for a pixel of ``[F, H, W]``; the first has one frame."""
    frames = np.stack([pixels[:1].any(0), *(pixels[at : at + 4].any(0) for at in range(1, len(pixels), 4))])
    return np.asarray(frames.reshape(len(frames), HEIGHT // 8, 8, WIDTH // 8, 8).any((2, 4)))


def in_cells(cover: NDArray[np.float64]) -> NDArray[np.uint8]:
    """How much of 4×4 pixels the object covers, 0…255, in the last frame of each latent one: ``[T, H / 4, W / 4]``."""
    cells = cover[::4].reshape(-1, HEIGHT // 4, 4, WIDTH // 4, 4).mean((2, 4))
    result: NDArray[np.uint8] = np.round(255 * cells).astype(np.uint8)
    return result


def encoded(folder: Path) -> tuple[Tensor, Tensor, Tensor, list[Content]]:
    """Every chunk that is there: latents ``[N, z, T, h, w]`` in float16, object's region and cover, what they show."""
    latents, regions, covers, contents = [], [], [], []
    for path in sorted(folder.glob("latents-?????.npz")):
        with np.load(path) as file:
            latents.append(torch.from_numpy(file["latents"]))
            regions.append(torch.from_numpy(file["regions"]))
            covers.append(torch.from_numpy(file["covers"]))
            contents += [Content(**content) for content in json.loads(str(file["contents"]))]
    return torch.cat(latents), torch.cat(regions), torch.cat(covers), contents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the VAE's checkpoint is and the latents go")
    parser.add_argument("--clips", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vae = Vae(spec_named(MODEL).vae)
    kept = arguments.folder / "vae-calibrated.pt"
    if not kept.exists():
        vae.load_state_dict(weights(arguments.folder / "vae.pt"))
        calibrate(vae, as_tensor(pool("calibration", 48)))
        save(kept, vae, [], 0)
    vae.load_state_dict(weights(kept))
    encode(vae, arguments.folder, arguments.clips)


if __name__ == "__main__":
    main()
