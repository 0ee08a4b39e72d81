"""From the checkpoints of the training to the data files of the package, in 16 bits, kernels of the VAE in 8."""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from export.checkpoint.schema import part_tensors
from export.synth.trained import SCALE, TOKENIZER_MODEL, part_file
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


def _in_8_bits(name: str, kernel: Tensor) -> dict[str, Tensor]:
    """A convolution's kernel as int8 and a scale per output channel."""
    scale = (kernel.flatten(1).abs().amax(1) / 127).clamp(min=1e-6).half()
    rounded = (kernel / scale.float().view(-1, *(1,) * (kernel.ndim - 1))).round().clamp(-127, 127)
    return {name: rounded.to(torch.int8).contiguous(), name + SCALE: scale}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the training's folder")
    parser.add_argument("package", type=Path, nargs="?", default=PACKAGE)
    arguments = parser.parse_args()
    print(f"{pack(arguments.folder, arguments.package):,} bytes")
