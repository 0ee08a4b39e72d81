"""The parity ladder: one row per claim that the engines compute what PyTorch computes, from token ids to the video.

Every rung belongs to a component; a model's ladder has the rungs of its components (``spec.components``). Rungs that
isolate a component feed both sides the reference's tensors. In the run and the video, the two sides share only the
checkpoint and the request.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np

from validate.ladder import image, official, thresholds, video
from validate.ladder.comparison import Comparison, solver_row
from validate.ladder.engines_side import EnginesSide
from validate.ladder.metrics import FRAME_RANGE, compare, incomparable
from validate.ladder.row import Row, excess
from validate.ladder.thresholds import Limit, Measure
from validate.reference.parts import F32, time_features
from validate.reference.reference import Reference
from validate.reference.whole_run import ReferenceStep, initial_noise, sigmas_and_timesteps
from wan22.precision import Precision
from wan22.quantities import counted
from wan22.specs import TRAIN_TIMESTEPS, ModelSpec

VELOCITY_POINTS = 4  # timesteps per expert, evenly spaced over its range

Compare = Callable[[Comparison], Iterator[Row]]
DISTANCES: tuple[Measure, ...] = ("max_abs", "relative_l2")
OF_FRAMES: tuple[Measure, ...] = (*DISTANCES, "psnr_db")
BESIDE_PRECISION: tuple[Measure, ...] = (*DISTANCES, "excess")


@dataclass(frozen=True)
class Rung:
    """``compare`` yields the rows; ``subject`` is their name in gates."""

    subject: str
    compare: Compare
    of_every_case: bool = False  # repeated for every prompt and seed
    measures: tuple[Measure, ...] = DISTANCES  # the measures that gates may use

    def rows(self, comparison: Comparison) -> Iterator[Row]:
        return (replace(row, subject=self.subject) for row in self.compare(comparison))


def rungs(spec: ModelSpec, *, official: bool = False) -> tuple[Rung, ...]:
    """The ladder of a model, from the bottom; ``official`` adds the rungs against the official code."""
    experts = tuple(
        Rung("velocity", partial(velocities, expert=expert), measures=BESIDE_PRECISION) for expert in spec.experts
    )
    sampled = Rung("solver", solver)
    run = Rung("latents", trajectory, of_every_case=True, measures=BESIDE_PRECISION)
    both_modes = (Rung("text_mode", text_mode),) if spec.takes.image == "optional" else ()
    known: tuple[tuple[str, tuple[Rung, ...]], ...] = (
        ("text_encoder", TEXT_RUNGS),
        ("vae_encoder_first", IMAGE_RUNGS),
        (spec.experts[0], (*SAMPLER_RUNGS, *experts, sampled, run, *both_modes)),
        ("vae_decoder_first", VIDEO_RUNGS),
    )
    ladder = tuple(rung for component, its in known if component in spec.components for rung in its)
    return (*ladder, *OFFICIAL_RUNGS) if official else ladder


def token_ids(comparison: Comparison) -> Iterator[Row]:
    for name, prompt in comparison.prompts.items():
        theirs = comparison.reference.token_ids(prompt)
        metrics = compare(comparison.ours.token_ids(prompt), theirs)
        yield Row(f"token ids, {name}", "tokenizer", metrics, thresholds.TOKEN_IDS, f"{theirs.shape[1]} tokens")


def embeddings(comparison: Comparison) -> Iterator[Row]:
    limit = comparison.limits["text_encoder"].text
    for name, prompt in comparison.prompts.items():
        ours, theirs = comparison.ours.embeddings(prompt), comparison.text[name]
        ids = comparison.reference.token_ids(prompt)
        low = comparison.in_precision("text_encoder", (ours, theirs), partial(Reference.embeddings, token_ids=ids))
        note = "512 rows, zeros after the last token"
        yield Row(f"embeddings, {name}", "text_encoder", compare(ours, theirs), limit, note, in_precision=low)


def schedule(comparison: Comparison) -> Iterator[Row]:
    sigmas, timesteps = sigmas_and_timesteps(comparison.request)
    our_sigmas, our_timesteps = comparison.ours.sigmas_and_timesteps(comparison.request)
    note = f"{comparison.request.solver}, {comparison.request.schedule}, shift {comparison.request.shift:g}"
    yield Row("sigmas", "sampler", compare(our_sigmas, sigmas), thresholds.SIGMAS, note)
    whole = np.issubdtype(timesteps.dtype, np.integer)
    limit = thresholds.TIMESTEPS if whole else thresholds.FRACTIONAL_TIMESTEPS
    shown = " ".join(f"{t:g}" for t in timesteps)
    yield Row("timesteps", "sampler", compare(our_timesteps, timesteps), limit, shown)


def noise_rung(comparison: Comparison) -> Iterator[Row]:
    request = comparison.request
    metrics = compare(comparison.ours.noise(request), initial_noise(request))
    source = f"torch.randn on the CPU, seed {request.seed}" if request.noise is None else "the given noise"
    yield Row("initial noise", "sampler", metrics, thresholds.NOISE, source)


def time_conditions(comparison: Comparison) -> Iterator[Row]:
    """Compare the time features of the run's timesteps."""
    _, timesteps = sigmas_and_timesteps(comparison.request)
    width = comparison.spec.dit.freq_width
    limits = {"float64": thresholds.SINUSOID, "float32": thresholds.SINUSOID_OF_DIFFUSERS}
    whose = {"float64": "the official formula in float64", "float32": "diffusers' own, computed in float32"}
    for precision, theirs in time_features(timesteps, width).items():
        metrics = compare(comparison.ours.time_features(timesteps.tolist()), theirs)
        yield Row(f"time features, {precision} reference", "sampler", metrics, limits[precision], whose[precision])


def velocities(comparison: Comparison, expert: str) -> Iterator[Row]:
    """Compare velocities at the first step of ``expert`` with both prompts, then over its range of timesteps."""
    its_steps = [step for step in comparison.reference_steps if step.expert == expert]
    at_first = (
        _velocity(comparison, expert, f"velocity at its first step, {name}", (step.before, step.timestep, text))
        for step in its_steps[:1]
        for name, text in comparison.text.items()
    )
    everywhere = _velocities_everywhere(comparison, expert, "velocity at t = {:g}")
    yield from _with_excess(chain(at_first, everywhere), expert)


def _velocities_everywhere(comparison: Comparison, expert: str, name: str) -> Iterator[Row]:
    """Compare velocities on the reference's final latents, noised for each timestep.

    ``name`` is a format string for the timestep.
    """
    start, image = initial_noise(comparison.request), comparison.image_inputs.first_frame
    for timestep in velocity_points(comparison.spec, expert):
        sigma = np.float32(timestep / TRAIN_TIMESTEPS)
        noisy = (1 - sigma) * comparison.latents + sigma * start
        if image is not None:
            noisy[:, :, :1] = image
        yield _velocity(comparison, expert, name.format(timestep), (noisy, timestep, comparison.text["prompt"]))


def velocity_points(spec: ModelSpec, expert: str) -> list[float]:
    """Descending timesteps, integer and fractional, from the first to the last in the range of ``expert``."""
    boundary = TRAIN_TIMESTEPS * (spec.sampling.boundary or 0)
    first, last = {"high_noise": (999.0, boundary), "low_noise": (boundary - 1, 1.0), "dit": (999.0, 1.0)}[expert]
    return [round(4 * float(t)) / 4 for t in np.linspace(first, last, VELOCITY_POINTS)]  # exact in float32


def _velocity(comparison: Comparison, expert: str, name: str, inputs: tuple[F32, float, F32]) -> Row:
    def of(side: EnginesSide | Reference) -> F32:
        return side.velocity(expert, *inputs, comparison.image_inputs)

    ours, theirs = of(comparison.ours), of(comparison.reference)
    low = comparison.in_precision(expert, (ours, theirs), of)
    limit = comparison.limits[expert].velocity
    return Row(name, expert, compare(ours, theirs), limit, timestep=inputs[1], in_precision=low)


def solver(comparison: Comparison) -> Iterator[Row]:
    yield solver_row("solver on PyTorch's velocities", comparison, comparison.reference_steps)


def trajectory(comparison: Comparison) -> Iterator[Row]:
    """Compare the latents of independent runs after every step: two runs, or three if ours is not float32."""
    yield from _with_excess((_step(comparison, theirs) for theirs in comparison.reference_steps), "sampler")


def _with_excess(rows: Iterable[Row], component: str) -> Iterator[Row]:
    """Yield ``rows``, then one row with their error relative to PyTorch's in the same precision."""
    seen = []
    for row in rows:
        seen.append(row)
        yield row
    if over := excess(seen, thresholds.EXCESS):
        yield replace(over, component=component)


def _step(comparison: Comparison, theirs: ReferenceStep) -> Row:
    name, limit = f"latents after step {theirs.index + 1}", comparison.limits["run"].latents
    row = Row(name, theirs.expert, incomparable(""), limit, step=theirs.index + 1, timestep=theirs.timestep)
    if theirs.index >= len(comparison.our_steps):
        return replace(row, metrics=incomparable(comparison.stop_reason or "no such step"))
    if theirs.problem:
        return replace(row, metrics=incomparable(theirs.problem))
    ours = comparison.our_steps[theirs.index]
    note = "" if ours.expert == theirs.expert else f"ours ran {ours.expert}"
    sides = (ours.latents, theirs.after)
    before_vae = ("text_encoder", *comparison.spec.experts)
    low = None  # in float32 up to the latents, the precision of the VAE costs them nothing
    if any(comparison.precision_of(component) is not Precision.FP32 for component in before_vae):
        low = comparison.in_precision("run", sides, lambda _: comparison.lowered_steps[theirs.index].after)
    return replace(row, metrics=compare(*sides), note=note, in_precision=low)


def text_mode(comparison: Comparison) -> Iterator[Row]:
    """Compare the same request as text to video: without a clean first frame, all tokens share one timestep."""
    plain = comparison.without_image
    for expert in comparison.spec.experts:
        yield from _velocities_everywhere(plain, expert, "text mode, velocity at t = {:g}")
    last = _step(plain, plain.reference_steps[-1])
    note = last.note or f"{counted(last.step or 0, 'step')} on each side"
    yield replace(last, name="text mode, latents after the last step", note=note, step=None)


def decoder(comparison: Comparison) -> Iterator[Row]:
    """Compare our VAE decoder on the reference's latents: each of its two graphs, then the whole video."""
    first, following = comparison.limits["vae_decoder_first"], comparison.limits["vae_decoder_next"]
    yield _decoder_row(comparison, "decode of the first latent", "vae_decoder_first", first.vae, slice(0, 1))
    if comparison.reference_frames.shape[2] > 1:
        yield _decoder_row(comparison, "decode of the later latents", "vae_decoder_next", following.vae, slice(1, None))
    name = "streaming decode against whole decode"
    yield _decoder_row(comparison, name, "vae_decoder_next", following.streaming, slice(None))


def _decoder_row(comparison: Comparison, name: str, component: str, limit: Limit, frames: slice) -> Row:
    sides = (comparison.our_decode[:, :, frames], comparison.reference_frames[:, :, frames])
    low = comparison.in_precision(component, sides, lambda _: comparison.lowered_decode[:, :, frames], FRAME_RANGE)
    metrics, precision = compare(*sides, signal_range=FRAME_RANGE), comparison.precision_of(component)
    rounded = "" if precision is Precision.FP32 else f"; what {precision} costs beside float32"
    return Row(name, component, metrics, limit, f"the reference's latents{rounded}", in_precision=low)


TEXT_RUNGS = (Rung("token_ids", token_ids, of_every_case=True), Rung("embeddings", embeddings, of_every_case=True))
IMAGE_RUNGS = (
    Rung("pixels", image.pixels, of_every_case=True),
    Rung("encode", image.encoder),
    Rung("condition", image.condition, of_every_case=True),
)
VIDEO_RUNGS = (
    Rung("decode", decoder, measures=OF_FRAMES),
    Rung("frames", video.frames, of_every_case=True, measures=OF_FRAMES),
    Rung("ssim", video.structure, of_every_case=True, measures=("ssim",)),
    Rung("frame_changes", video.changes, of_every_case=True, measures=OF_FRAMES),
    Rung("lpips", video.perception, of_every_case=True, measures=("lpips",)),
)
SAMPLER_RUNGS = (Rung("schedule", schedule), Rung("noise", noise_rung), Rung("time_features", time_conditions))
OFFICIAL_RUNGS = (
    Rung("official_token_ids", official.token_ids),
    Rung("official_embeddings", official.embeddings),
    Rung("official_schedule", official.schedule),
    Rung("official_encode", official.encode),
    Rung("official_velocity", official.velocities),
    Rung("official_solver", official.solver),
    Rung("official_latents", official.latents),
    Rung("official_decode", official.decode, measures=OF_FRAMES),
    Rung("official_frames", official.video, measures=OF_FRAMES),
)
