"""From the checkpoints of the training to the data files of the package, in 16 bits, kernels of the VAE in 8."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from export.checkpoint.schema import part_tensors
from export.synth.trained import SCALE, TOKENIZER_MODEL, part_file, trained_pieces
from studies.tiny_model.data import tokenizer_model
from studies.tiny_model.files import weights
from studies.tiny_model.train_vae import MODEL
from wan22.specs import spec_named

PACKAGE = Path(__file__).parents[2] / "export" / "synth" / "trained" / MODEL


def parts(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of every part under official names, from the training's ``folder``."""
    found = {"vae": weights(folder / "vae-tuned.pt")}
    for expert in ("high_noise", "low_noise"):
        average = weights(folder / f"{expert}-average.pt")
        found[expert] = _below("dit.", average)
        found["text_encoder"] = _below("text_encoder.", average)  # the same in both
    return found


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def pack(folder: Path, package: Path) -> int:
    """Writes the parts and the tokenizer into ``package`` and returns their bytes."""
    spec = spec_named(MODEL)
    package.mkdir(parents=True, exist_ok=True)
    for part, tensors in parts(folder).items():
        dtype = torch.bfloat16 if part == "text_encoder" else torch.float16
        shapes = part_tensors(part, spec)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes, part
        kept = {name: tensors[name].to(dtype).contiguous() for name in shapes}
        for name in [name for name in shapes if part == "vae" and len(shapes[name]) > 3 and name.endswith("weight")]:
            kept |= _in_8_bits(name, tensors[name])
        save_file(kept, part_file(package, part))
    (package / TOKENIZER_MODEL).write_bytes(tokenizer_model(folder))
    return sum(path.stat().st_size for path in package.iterdir())


def unpack(folder: Path, package: Path) -> None:
    """Puts what ``package`` holds where a training in ``folder`` goes on from it."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = spec_named(MODEL)
    found = {}
    for part in ("vae", "text_encoder", "high_noise", "low_noise"):
        found[part] = {
            name: torch.from_numpy(np.concatenate([*trained_pieces(package, part, name)]).astype(np.float32)).view(
                shape
            )
            for name, shape in part_tensors(part, spec).items()
        }
    for name in ("vae-calibrated", "vae-tuned"):
        torch.save({"model": found["vae"]}, folder / f"{name}.pt")
    text = {f"text_encoder.{name}": tensor for name, tensor in found["text_encoder"].items()}
    for expert in ("high_noise", "low_noise"):
        both = text | {f"dit.{name}": tensor for name, tensor in found[expert].items()}
        torch.save({"model": both}, folder / f"{expert}-start.pt")
    (folder / TOKENIZER_MODEL).write_bytes((package / TOKENIZER_MODEL).read_bytes())


def _in_8_bits(name: str, kernel: Tensor) -> dict[str, Tensor]:
    """A convolution's kernel as int8 and a scale per output channel."""
    scale = (kernel.flatten(1).abs().amax(1) / 127).clamp(min=1e-6).half()
    rounded = (kernel / scale.float().view(-1, *(1,) * (kernel.ndim - 1))).round().clamp(-127, 127)
    return {name: rounded.to(torch.int8).contiguous(), name + SCALE: scale}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the training's folder")
    parser.add_argument("package", type=Path, nargs="?", default=PACKAGE)
    parser.add_argument("--unpack", action="store_true", help="the other way: the package's weights into the folder")
    arguments = parser.parse_args()
    if arguments.unpack:
        unpack(arguments.folder, arguments.package)
        sys.exit()
    print(f"{pack(arguments.folder, arguments.package):,} bytes")
