"""A small transformer whose tensors reach the magnitudes of the real model, and its inputs.

Outliers are planted in the random weights of the synthetic checkpoint (:mod:`studies.precision.outliers`). There are
two sets of inputs. The study compares precisions on the first. Static scales, means and factors are measured on the
second, so that no variant is tuned on the run that judges it, or by the export, which needs no inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from export.checkpoint.schema import dit_tensors
from export.graphs.dit import dit_graph
from export.synth.weights import pieces
from runtime.arrays import F32
from runtime.denoise import Conditions, Sampler, denoise
from runtime.forward_inputs import forward_inputs, text_rows
from runtime.noise import standard_normal
from runtime.schedule import Schedule
from runtime.solver import make_solver
from studies.precision.outliers import fit, plant, restore_maxima
from studies.precision.session import fill, open_graph
from wan22.specs import ModelSpec, tokens

PROMPT_TOKENS, NEGATIVE_TOKENS = 40, 120
FITTED_RUNS = 2

Forward = Callable[..., F32]


@dataclass(frozen=True)
class TwinSize:
    layers: int = 4
    width: int = 512  # a multiple of 128, the head width
    latent: tuple[int, int, int] = (5, 24, 32)  # frames, rows, columns: 960 tokens

    @property
    def tokens(self) -> int:
        return tokens(self.latent)


@dataclass(frozen=True, eq=False)
class Inputs:
    latents: F32  # noise [1, z, T, h, w]
    positive: F32  # [1, 512, text width]
    negative: F32
    condition: F32 | None = None  # [1, 20, T, h, w], zeros, if the model takes one


@dataclass(frozen=True, eq=False)
class Twin:
    spec: ModelSpec
    weights: dict[str, dict[str, F32]]  # by expert
    judged: Inputs
    measured: Inputs  # another prompt, other noise: for statistics


def make_twin(model: ModelSpec, size: TwinSize, schedule: Schedule, seed: int) -> Twin:
    """The twin of ``model`` in ``size``, with its inputs; the same seed yields the same twin.

    Outliers are fitted first to noise, then to the inputs of a run.
    """
    spec = _twin_spec(model, size)
    random = np.random.default_rng(seed)
    judged, measured = (_inputs(random, spec, size, seed + offset) for offset in (0, 1))
    weights = {}
    for expert in spec.experts:
        made = {
            name: np.concatenate(list(pieces(spec, seed, expert, name, shape))).reshape(shape)
            for name, shape in dit_tensors(spec.dit).items()
        }
        plant(made, spec.dit, random)
        fit(made, spec.dit, [_probe(spec, judged, timestep) for timestep in _probe_timesteps(spec, expert)], rounds=2)
        weights[expert] = made
    for _ in range(FITTED_RUNS):
        for expert, probes in _run_inputs(spec, judged, schedule, weights).items():
            fit(weights[expert], spec.dit, probes, rounds=1)
            restore_maxima(weights[expert], spec.dit)
    return Twin(spec, weights, judged, measured)


def _run_inputs(
    spec: ModelSpec, given: Inputs, schedule: Schedule, weights: Mapping[str, dict[str, F32]]
) -> dict[str, list[dict[str, F32]]]:
    """The inputs of every forward of a float32 run, by expert."""
    met: dict[str, list[dict[str, F32]]] = {expert: [] for expert in weights}

    def record(expert: str) -> Forward:
        graph = open_graph(fill(dit_graph(spec.dit), weights[expert].__getitem__))

        def forward(**inputs: F32) -> F32:
            met[expert].append(inputs)
            return graph(**inputs)[0]

        return forward

    sample(spec, given, schedule, {expert: record(expert) for expert in weights})
    return met


def sample(spec: ModelSpec, given: Inputs, schedule: Schedule, experts: Mapping[str, Forward]) -> F32:
    """Denoise with UniPC and return the final latents ``[1, z, T, h, w]``.

    Raises:
        NonFiniteError: a velocity has NaN or infinity.
    """
    conditions = Conditions(given.positive, given.negative, condition=given.condition)
    sampler = Sampler(schedule, make_solver("unipc", schedule), spec.sampling.guidance)
    *_, last = denoise(spec, experts, given.latents, conditions, sampler)
    return last.latents


def _twin_spec(model: ModelSpec, size: TwinSize) -> ModelSpec:
    real = model.dit
    ffn_width = max(1, round(real.ffn_width / real.width * size.width / 64)) * 64
    heads = size.width // 128
    dit = replace(real, width=size.width, ffn_width=ffn_width, layers=size.layers, heads=heads)
    return replace(model, name=f"{model.name}-twin", dit=dit)


def _inputs(random: np.random.Generator, spec: ModelSpec, size: TwinSize, seed: int) -> Inputs:
    positive, negative = (_text(random, spec, rows) for rows in (PROMPT_TOKENS, NEGATIVE_TOKENS))
    channels = spec.dit.condition_channels
    condition = np.zeros((1, channels, *size.latent), np.float32) if channels else None
    noise = standard_normal((1, spec.dit.out_channels, *size.latent), seed)
    return Inputs(noise, positive, negative, condition)


def _text(random: np.random.Generator, spec: ModelSpec, rows: int) -> F32:
    """Random embeddings of magnitude 1/3, as after UMT5's final norm; zeros after the last token."""
    embeddings = random.standard_normal((1, rows, spec.dit.text_width), np.float32) / 3
    return text_rows(embeddings.astype(np.float32))


def _probe_timesteps(spec: ModelSpec, expert: str) -> tuple[float, float]:
    """Two timesteps in the range of ``expert``."""
    boundary = 1000 * (spec.sampling.boundary or 0)
    return {"high_noise": (999.0, boundary + 1), "low_noise": (boundary - 1, 100.0), "dit": (999.0, 500.0)}[expert]


def _probe(spec: ModelSpec, given: Inputs, timestep: float) -> dict[str, F32]:
    return forward_inputs(spec.dit, given.latents, timestep, given.positive, given.condition)
