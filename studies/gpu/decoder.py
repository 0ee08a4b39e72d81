"""VAE decoding at 720p: our streaming graphs on ONNX Runtime and diffusers' decoder, both in float32."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from export.checkpoint.schema import vae_tensors
from runtime.arrays import F32
from runtime.noise import standard_normal
from runtime.vae import decode
from studies.gpu.random_model import Weights, decoder_engines, fill_module, random_weights
from studies.gpu.stage import Measurement, StageSettings, reason_of
from studies.gpu.timing import peak_gib, time_ms
from validate.reference.parts import autoencoder
from wan22.specs import ModelSpec, spec_named


def streaming(setting: StageSettings) -> Iterator[Measurement]:
    """Run each side twice: the first run yields the peak memory, the second the time."""
    spec = spec_named("t2v-a14b-tiny" if setting.dry_run else "t2v-a14b")
    video = (64, 64, 5) if setting.dry_run else (1280, 720, 17)
    latents = standard_normal(spec.latent_shape(*video), setting.seed)
    weights = random_weights(vae_tensors(spec.vae), setting.device, torch.float32, setting.seed)
    for name, side in (("ONNX Runtime", _ours), ("PyTorch", _theirs)):
        try:
            milliseconds, gib = side(setting.device, spec, weights, latents)
        except Exception as error:  # if one side runs out of memory, the other is still measured
            yield Measurement(name, note=f"no: {reason_of(error)}")
            continue
        yield Measurement(name, milliseconds, "ms", "{}x{}, {} frames".format(*video))
        yield Measurement(f"{name}, peak memory", gib, "GiB", "beyond the weights")


def _ours(device: str, spec: ModelSpec, weights: Weights, latents: F32) -> tuple[float, float]:
    with (
        tempfile.TemporaryDirectory() as folder,
        decoder_engines(spec, weights, Path(folder), device) as (first, later),
    ):
        return _measure(device, lambda: [None for _ in decode(first, later, latents)])


def _theirs(device: str, spec: ModelSpec, weights: Weights, latents: F32) -> tuple[float, float]:
    with torch.device("meta"):
        module = autoencoder(spec)
    module = fill_module(module, "vae", spec, weights, torch.float32).to(device)
    entering = torch.from_numpy(latents).to(device)

    @torch.inference_mode()
    def work() -> object:
        return module.decode(entering, return_dict=False)[0]

    return _measure(device, work)


def _measure(device: str, work: Callable[[], object]) -> tuple[float, float]:
    gib = peak_gib(device, work)
    return time_ms(device, work), gib
