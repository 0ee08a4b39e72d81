"""The rungs against the official Wan2.2 code, for users who have its wheel or a clone of it.

The inputs are those of the main ladder, so a row here differs from its counterpart there only in the reference. The
note gives the distance between the two references. Only the main ladder separates precision loss from export error.
"""

from collections.abc import Iterator
from itertools import groupby

from validate.ladder import thresholds
from validate.ladder.comparison import Comparison, solver_row
from validate.ladder.metrics import FRAME_RANGE, compare, incomparable
from validate.ladder.row import Row
from validate.ladder.thresholds import Limit
from validate.reference.official import can_generate, can_run
from validate.reference.parts import F32
from validate.reference.whole_run import sigmas_and_timesteps


def token_ids(comparison: Comparison) -> Iterator[Row]:
    for name, prompt in comparison.prompts.items():
        metrics = compare(comparison.ours.token_ids(prompt), comparison.official.token_ids(prompt))
        yield Row(f"official token ids, {name}", "tokenizer", metrics, thresholds.TOKEN_IDS)


def embeddings(comparison: Comparison) -> Iterator[Row]:
    limit = comparison.limits["text_encoder"].text
    for name, prompt in comparison.prompts.items():
        sides = (comparison.ours.embeddings(prompt), comparison.official_text[name], comparison.text[name])
        yield _row(f"official embeddings, {name}", "text_encoder", limit, sides)


def schedule(comparison: Comparison) -> Iterator[Row]:
    if can_run(request := comparison.request):
        ours, official = (side.sigmas_and_timesteps(request) for side in (comparison.ours, comparison.official))
        sides = (ours[0], official[0], sigmas_and_timesteps(request)[0])
        yield _row("official sigmas", "sampler", thresholds.SIGMAS, sides)
        yield Row("official timesteps", "sampler", compare(ours[1], official[1]), thresholds.TIMESTEPS)


def encode(comparison: Comparison) -> Iterator[Row]:
    if comparison.images:
        video, limit = comparison.condition.video, comparison.limits["vae_encoder_first"].vae
        sides = (comparison.ours.encode(video), comparison.official.encode(video), comparison.condition.latents)
        yield _row("official encode of the reference's pixels", "vae_encoder_first", limit, sides)


def velocities(comparison: Comparison) -> Iterator[Row]:
    """Compare velocities at the first and last step of each expert in diffusers' run."""
    for expert, group in groupby(comparison.reference_steps, lambda step: step.expert):
        steps, limit = list(group), comparison.limits[expert].velocity
        for step in {steps[0].index: steps[0], steps[-1].index: steps[-1]}.values():
            inputs = (expert, step.before, step.timestep, comparison.text["prompt"], comparison.image_inputs)
            ours, official = comparison.ours.velocity(*inputs), comparison.official.velocity(*inputs)
            sides = (ours, official, comparison.reference.velocity(*inputs))
            yield _row(f"official velocity at t = {step.timestep:g}", expert, limit, sides)


def solver(comparison: Comparison) -> Iterator[Row]:
    """Compare our solver with the official one on the velocities of the official run."""
    if can_run(comparison.request):
        yield solver_row("official solver on its velocities", comparison, comparison.official_steps)


def latents(comparison: Comparison) -> Iterator[Row]:
    """Compare the latents of two independent runs after every step."""
    limit = comparison.limits["run"].latents
    if not can_run(comparison.request):
        return
    if comparison.stop_reason:
        yield Row("official latents of the run", "sampler", incomparable(comparison.stop_reason), limit)
        return
    for ours, theirs, diffusers in zip(
        comparison.our_steps, comparison.official_steps, comparison.reference_steps, strict=True
    ):
        sides, name = (ours.latents, theirs.after, diffusers.after), f"official latents after step {theirs.index + 1}"
        yield _row(name, theirs.expert, limit, sides)


def decode(comparison: Comparison) -> Iterator[Row]:
    limit = comparison.limits["vae_decoder_next"].vae
    sides = (comparison.our_decode, comparison.official.decode(comparison.latents), comparison.reference_frames)
    yield _row("official decode of the reference's latents", "vae_decoder_next", limit, sides, FRAME_RANGE)


def video(comparison: Comparison) -> Iterator[Row]:
    """Compare frames, end to end: the official pipeline's, or without it those of the run of official modules."""
    if can_run(comparison.request) and comparison.our_frames is not None:
        name, limit = "official frames, end to end", comparison.limits["run"].frames
        if can_generate(comparison.request):
            name, official = "official pipeline's frames", comparison.official.generate(comparison.request)
        else:
            official = comparison.official.decode(comparison.official_steps[-1].after)
        sides = (comparison.our_frames, official, comparison.reference_frames)
        yield _row(name, "video", limit, sides, FRAME_RANGE)


def _row(
    name: str, component: str, limit: Limit, sides: tuple[F32, F32, F32], signal_range: float | None = None
) -> Row:
    """Compare two of ``sides``: ours and the official code's. The third is diffusers', for the note."""
    ours, official, diffusers = sides
    note = f"diffusers is {compare(diffusers, official).relative_l2:.1e} from it"
    return Row(name, component, compare(ours, official, signal_range=signal_range), limit, note)
