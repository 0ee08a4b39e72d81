"""The rungs against the official Wan2.2 code, where the user has a clone of it.

Inputs are those of the first ladder, so that a row here and its neighbour there differ in the reference alone; the note
says how far the two references are from each other. Precision is told from export there.
"""

from collections.abc import Iterator
from itertools import groupby

from validate.ladder import thresholds
from validate.ladder.comparison import Climb, solved
from validate.ladder.metrics import FRAME_RANGE, compare, incomparable
from validate.ladder.row import Row
from validate.ladder.thresholds import Limit
from validate.reference.parts import F32
from validate.reference.whole_run import lists


def token_ids(climb: Climb) -> Iterator[Row]:
    for name, prompt in climb.prompts.items():
        metrics = compare(climb.ours.token_ids(prompt), climb.official.token_ids(prompt))
        yield Row(f"official token ids, {name}", "tokenizer", metrics, thresholds.TOKEN_IDS)


def embeddings(climb: Climb) -> Iterator[Row]:
    limit = climb.limits["text_encoder"].text
    for name, prompt in climb.prompts.items():
        sides = (climb.ours.embeddings(prompt), climb.official_text[name], climb.text[name])
        yield _row(f"official embeddings, {name}", "text_encoder", limit, sides)


def schedule(climb: Climb) -> Iterator[Row]:
    if climb.official_runs:
        ours, official = climb.ours.lists(climb.request), climb.official.lists(climb.request)
        sides = (ours[0], official[0], lists(climb.request)[0])
        yield _row("official sigmas", "sampler", thresholds.SIGMAS, sides)
        yield Row("official timesteps", "sampler", compare(ours[1], official[1]), thresholds.TIMESTEPS)


def encode(climb: Climb) -> Iterator[Row]:
    if climb.images:
        video, limit = climb.condition.video, climb.limits["vae_encoder_first"].vae
        sides = (climb.ours.encode(video), climb.official.encode(video), climb.condition.latents)
        yield _row("official encode of the reference's pixels", "vae_encoder_first", limit, sides)


def velocities(climb: Climb) -> Iterator[Row]:
    """At the first and the last step that each expert makes in diffusers' run."""
    for expert, group in groupby(climb.reference_steps, lambda step: step.expert):
        steps, limit = list(group), climb.limits[expert].velocity
        for step in {steps[0].index: steps[0], steps[-1].index: steps[-1]}.values():
            inputs = (expert, step.before, step.timestep, climb.text["prompt"], climb.given)
            ours, official, diffusers = (
                side.velocity(*inputs) for side in (climb.ours, climb.official, climb.reference)
            )
            yield _row(f"official velocity at t = {step.timestep:g}", expert, limit, (ours, official, diffusers))


def solver(climb: Climb) -> Iterator[Row]:
    """Our solver on the velocities of the official run."""
    if climb.official_runs:
        yield solved("official solver on its velocities", climb, climb.official_steps)


def latents(climb: Climb) -> Iterator[Row]:
    """Two runs that each go their own way, after every step."""
    limit = climb.limits["run"].latents
    if not climb.official_runs:
        return
    if climb.stopped:
        yield Row("official latents of the run", "sampler", incomparable(climb.stopped), limit)
        return
    for ours, theirs, diffusers in zip(climb.our_steps, climb.official_steps, climb.reference_steps, strict=True):
        sides, name = (ours.latents, theirs.after, diffusers.after), f"official latents after step {theirs.index + 1}"
        yield _row(name, theirs.expert, limit, sides)


def decode(climb: Climb) -> Iterator[Row]:
    limit = climb.limits["vae_decoder_next"].vae
    sides = (climb.our_decode, climb.official.decode(climb.latents), climb.reference_frames)
    yield _row("official decode of the reference's latents", "vae_decoder_next", limit, sides, FRAME_RANGE)


def video(climb: Climb) -> Iterator[Row]:
    if climb.official_runs and climb.our_frames is not None:
        official = climb.official.decode(climb.official_steps[-1].after)
        sides = (climb.our_frames, official, climb.reference_frames)
        yield _row("official frames, end to end", "video", climb.limits["run"].frames, sides, FRAME_RANGE)


def _row(
    name: str, component: str, limit: Limit, sides: tuple[F32, F32, F32], signal_range: float | None = None
) -> Row:
    """``sides`` are ours, the official code's and diffusers'."""
    ours, official, diffusers = sides
    note = f"diffusers is {compare(diffusers, official).relative_l2:.1e} from it"
    return Row(name, component, compare(ours, official, signal_range=signal_range), limit, note)
