"""The parity ladder: one row per claim that the engines compute what PyTorch computes, from token ids to the video.

Every rung belongs to a component, and a model climbs the rungs of the components it has (``spec.components``). Rungs
that isolate a component feed both sides the reference's tensors; the run and the video share nothing with it but the
checkpoint and the request.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np

from validate.ladder import image, official, thresholds, video
from validate.ladder.comparison import Climb, solved
from validate.ladder.engines_side import Ours
from validate.ladder.metrics import FRAME_RANGE, compare, incomparable
from validate.ladder.row import Row, excess
from validate.ladder.thresholds import Limit, Measure
from validate.reference.parts import F32, time_features
from validate.reference.reference import Reference
from validate.reference.whole_run import ReferenceStep, lists, noise
from wan22.quantities import counted
from wan22.specs import TRAIN_TIMESTEPS, ModelSpec

VELOCITY_POINTS = 4  # timesteps per expert, evenly over the range it works in


Climbed = Callable[[Climb], Iterator[Row]]
DISTANCES: tuple[Measure, ...] = ("max_abs", "relative_l2")
OF_FRAMES: tuple[Measure, ...] = (*DISTANCES, "psnr_db")
BESIDE_PRECISION: tuple[Measure, ...] = (*DISTANCES, "excess")


@dataclass(frozen=True)
class Rung:
    """``subject`` is what gates call the rows."""

    subject: str
    climb: Climbed
    of_every_case: bool = False  # a prompt or a seed makes a difference to it that no other rung shows
    measures: tuple[Measure, ...] = DISTANCES  # what gates may ask of the rows

    def rows(self, climb: Climb) -> Iterator[Row]:
        return (replace(row, subject=self.subject) for row in self.climb(climb))


def rungs(spec: ModelSpec, *, official: bool = False) -> tuple[Rung, ...]:
    """The ladder of a model, from the bottom; ``official`` adds the part that stands on the official code."""
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


def token_ids(climb: Climb) -> Iterator[Row]:
    for name, prompt in climb.prompts.items():
        theirs = climb.reference.token_ids(prompt)
        metrics = compare(climb.ours.token_ids(prompt), theirs)
        yield Row(f"token ids, {name}", "tokenizer", metrics, thresholds.TOKEN_IDS, f"{theirs.shape[1]} tokens")


def embeddings(climb: Climb) -> Iterator[Row]:
    limit = climb.limits["text_encoder"].text
    for name, prompt in climb.prompts.items():
        ours, theirs = climb.ours.embeddings(prompt), climb.text[name]
        ids = climb.reference.token_ids(prompt)
        low = climb.in_precision("text_encoder", (ours, theirs), partial(Reference.embeddings, token_ids=ids))
        note = "512 rows, zeros after the last token"
        yield Row(f"embeddings, {name}", "text_encoder", compare(ours, theirs), limit, note, in_precision=low)


def schedule(climb: Climb) -> Iterator[Row]:
    sigmas, timesteps = lists(climb.request)
    our_sigmas, our_timesteps = climb.ours.lists(climb.request)
    note = f"{climb.request.solver}, {climb.request.schedule}, shift {climb.request.shift:g}"
    yield Row("sigmas", "sampler", compare(our_sigmas, sigmas), thresholds.SIGMAS, note)
    whole = np.issubdtype(timesteps.dtype, np.integer)
    limit = thresholds.TIMESTEPS if whole else thresholds.FRACTIONAL_TIMESTEPS
    shown = " ".join(f"{t:g}" for t in timesteps)
    yield Row("timesteps", "sampler", compare(our_timesteps, timesteps), limit, shown)


def initial_noise(climb: Climb) -> Iterator[Row]:
    shape, seed = climb.request.latent_shape, climb.request.seed
    metrics = compare(climb.ours.noise(shape, seed), noise(shape, seed))
    yield Row("initial noise", "sampler", metrics, thresholds.NOISE, f"torch.randn on the CPU, seed {seed}")


def time_conditions(climb: Climb) -> Iterator[Row]:
    """What the transformer is told of the timesteps of the run."""
    _, timesteps = lists(climb.request)
    width = climb.spec.dit.freq_width
    limits = {"float64": thresholds.SINUSOID, "float32": thresholds.SINUSOID_OF_DIFFUSERS}
    whose = {"float64": "the official formula in float64", "float32": "diffusers' own, computed in float32"}
    for precision, theirs in time_features(timesteps, width).items():
        metrics = compare(climb.ours.time_features(timesteps.tolist()), theirs)
        yield Row(f"time features, {precision} reference", "sampler", metrics, limits[precision], whose[precision])


def velocities(climb: Climb, expert: str) -> Iterator[Row]:
    """The first step of the run that ``expert`` makes, with both prompts, then timesteps over its whole range."""
    everywhere = _velocities_everywhere(climb, expert, "velocity at t = {:g}")
    yield from _with_excess(chain(_velocities_at_first(climb, expert), everywhere), expert)


def _velocities_at_first(climb: Climb, expert: str) -> Iterator[Row]:
    first = next((step for step in climb.reference_steps if step.expert == expert), None)
    if first is not None:
        for name in climb.text:
            row = f"velocity at its first step, {name}"
            yield _velocity(climb, expert, row, (first.before, first.timestep, climb.text[name]))


def _velocities_everywhere(climb: Climb, expert: str, name: str) -> Iterator[Row]:
    """With the reference's finished latents, noisy as they are at each timestep; ``name`` has room for it."""
    start, image = noise(climb.request.latent_shape, climb.request.seed), climb.given.first_frame
    for timestep in velocity_points(climb.spec, expert):
        sigma = np.float32(timestep / TRAIN_TIMESTEPS)
        noisy = (1 - sigma) * climb.latents + sigma * start
        if image is not None:
            noisy[:, :, :1] = image
        yield _velocity(climb, expert, name.format(timestep), (noisy, timestep, climb.text["prompt"]))


def velocity_points(spec: ModelSpec, expert: str) -> list[float]:
    """Falling timesteps, whole and fractional, from the first to the last that ``expert`` can meet."""
    boundary = TRAIN_TIMESTEPS * (spec.sampling.boundary or 0)
    first, last = {"high_noise": (999.0, boundary), "low_noise": (boundary - 1, 1.0), "dit": (999.0, 1.0)}[expert]
    return [round(4 * float(t)) / 4 for t in np.linspace(first, last, VELOCITY_POINTS)]  # exact in float32


def _velocity(climb: Climb, expert: str, name: str, inputs: tuple[F32, float, F32]) -> Row:
    def of(side: Ours | Reference) -> F32:
        return side.velocity(expert, *inputs, climb.given)

    ours, theirs = of(climb.ours), of(climb.reference)
    low = climb.in_precision(expert, (ours, theirs), of)
    limit = climb.limits[expert].velocity
    return Row(name, expert, compare(ours, theirs), limit, timestep=inputs[1], in_precision=low)


def solver(climb: Climb) -> Iterator[Row]:
    """What the run adds to its velocities: our solver on the reference's, at the step where they are farthest apart."""
    yield solved("solver on PyTorch's velocities", climb, climb.reference_steps)


def trajectory(climb: Climb) -> Iterator[Row]:
    """Latents after every step of two runs that each go their own way; three where ours is not float32."""
    yield from _with_excess((_step(climb, theirs) for theirs in climb.reference_steps), "sampler")


def _with_excess(rows: Iterable[Row], component: str) -> Iterator[Row]:
    """``rows`` as they come, then what all of them say of the precision."""
    seen = []
    for row in rows:
        seen.append(row)
        yield row
    if over := excess(seen, thresholds.EXCESS):
        yield replace(over, component=component)


def _step(climb: Climb, theirs: ReferenceStep) -> Row:
    name, limit = f"latents after step {theirs.index + 1}", climb.limits["run"].latents
    row = Row(name, theirs.expert, incomparable(""), limit, step=theirs.index + 1, timestep=theirs.timestep)
    if theirs.index >= len(climb.our_steps):
        return replace(row, metrics=incomparable(climb.stopped or "no such step"))
    if theirs.problem:
        return replace(row, metrics=incomparable(theirs.problem))
    ours = climb.our_steps[theirs.index]
    note = "" if ours.expert == theirs.expert else f"ours ran {ours.expert}"
    low = climb.in_precision("run", (ours.latents, theirs.after), lambda _: climb.lowered_steps[theirs.index].after)
    return replace(row, metrics=compare(ours.latents, theirs.after), note=note, in_precision=low)


def text_mode(climb: Climb) -> Iterator[Row]:
    """The same request as text to video, for models that can do both: no frame is given, every token has the same t."""
    plain = climb.without_image
    for expert in climb.spec.experts:
        yield from _velocities_everywhere(plain, expert, "text mode, velocity at t = {:g}")
    last = _step(plain, plain.reference_steps[-1])
    name, note = (
        "text mode, latents after the last step",
        last.note or f"{counted(last.step or 0, 'step')} on each side",
    )
    yield replace(last, name=name, note=note, step=None)


def decoder(climb: Climb) -> Iterator[Row]:
    """Our VAE on the reference's latents; its two graphs apart, then the whole video."""
    first, following = climb.limits["vae_decoder_first"], climb.limits["vae_decoder_next"]
    yield _decoded(climb, "decode of the first latent", "vae_decoder_first", first.vae, slice(0, 1))
    if climb.reference_frames.shape[2] > 1:
        yield _decoded(climb, "decode of the later latents", "vae_decoder_next", following.vae, slice(1, None))
    name = "streaming decode against whole decode"
    yield _decoded(climb, name, "vae_decoder_next", following.streaming, slice(None))


def _decoded(climb: Climb, name: str, component: str, limit: Limit, frames: slice) -> Row:
    ours, theirs = climb.our_decode[:, :, frames], climb.reference_frames[:, :, frames]
    low = climb.in_precision(component, (ours, theirs), lambda _: climb.lowered_decode[:, :, frames], FRAME_RANGE)
    metrics = compare(ours, theirs, signal_range=FRAME_RANGE)
    return Row(name, component, metrics, limit, "the reference's latents", in_precision=low)


TEXT_RUNGS = (
    Rung("token_ids", token_ids, of_every_case=True),
    Rung("embeddings", embeddings, of_every_case=True),
)
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
SAMPLER_RUNGS = (
    Rung("schedule", schedule),
    Rung("noise", initial_noise),
    Rung("time_features", time_conditions),
)
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
