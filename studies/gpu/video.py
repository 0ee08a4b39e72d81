"""A whole video of TI2V-5B with random weights: denoising, streaming decoder, mp4. The text encoder is left out."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from export.checkpoint.schema import dit_tensors, vae_tensors
from runtime.denoise import Conditions, Sampler, denoise
from runtime.noise import standard_normal
from runtime.schedule import make_schedule
from runtime.solver import make_solver
from runtime.vae import decode
from runtime.video import encode_video
from studies.gpu.random_model import decoder_engines, random_weights, transformer_engine
from studies.gpu.stage import Measurement, StageSettings
from wan22.precision import Precision
from wan22.specs import TEXT_TOKENS, spec_named

STEPS = 10


def whole_video(setting: StageSettings) -> Iterator[Measurement]:
    """Seconds of the steps and of the decoder, and the size of the file."""
    spec = spec_named("ti2v-5b-tiny" if setting.dry_run else "ti2v-5b")
    video = (64, 64, 5) if setting.dry_run else (1280, 704, 121)
    steps = 2 if setting.dry_run else STEPS
    precision = Precision.FP32 if setting.dry_run else Precision.BF16
    dtype = torch.float32 if setting.dry_run else torch.bfloat16
    with ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(3)]
        weights = random_weights(dit_tensors(spec.dit), setting.device, dtype, setting.seed)
        making = transformer_engine(spec, weights, folders[0], precision, setting.device)
        with making as (engine, place):
            noise = place({"noise": standard_normal(spec.latent_shape(*video), setting.seed)})["noise"]
            text = place({"text": standard_normal((1, TEXT_TOKENS, spec.dit.text_width), 1)})["text"]
            schedule = make_schedule("unipc", steps, spec.sampling.shift, "official")
            sampler = Sampler(schedule, make_solver("unipc", schedule), spec.sampling.guidance)
            experts = dict.fromkeys(spec.experts, engine)
            seconds: list[float] = []
            for step in denoise(spec, experts, noise, Conditions(text, text), sampler):
                latents = step.latents
                seconds.append(step.seconds_total)
        a_step = median(seconds)
        yield Measurement("a step", 1000 * a_step, "ms", f"{steps} steps, two forwards each")
        decoding = random_weights(vae_tensors(spec.vae), setting.device, torch.float32, setting.seed)
        with decoder_engines(spec, decoding, folders[1], setting.device) as (first, later):
            started = perf_counter()
            frames = encode_video(decode(first, later, latents), folders[2] / "video.mp4", spec.sampling.fps)
            decoded = perf_counter() - started
        yield Measurement("decode and write", decoded, "s", f"{frames} frames of {video[0]}x{video[1]}")
        yield Measurement("video", (folders[2] / "video.mp4").stat().st_size / 2**20, "MiB", "random weights: noise")
        yield Measurement("50 steps and decoder", 50 * a_step + decoded, "s", "extrapolated")
