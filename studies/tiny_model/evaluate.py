"""Renders held-out prompts with the product and lets the judge say what the clips show.

The prompts combine colour, shape and motion as no training clip does; the noise of prompt *n* is that of seed *n*.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.arrays import F32
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.video import to_uint8
from studies.tiny_model.clips import random_clip
from studies.tiny_model.judge import Verdict, judge
from studies.tiny_model.scenes import Content

SHOWN = (0, 4, 8, 12, 16)  # frames of a strip


def held_out(count: int) -> Iterator[Content]:
    """The contents that are judged, each colour, shape and motion held out of training."""
    for index in range(count):
        yield random_clip(f"judged-{index}", held_out=True)[0]


@dataclass(frozen=True, eq=False)
class Rendered:
    frames: F32  # [1, 3, F, H, W] in [-1, 1]
    forwards: int  # of the transformer
    seconds: float


def render(pipeline: Pipeline, request: Request) -> Rendered:
    """The video of a request, with what it took."""
    started, forwards = time.perf_counter(), 0
    complete = request.completed(pipeline.spec)
    for step in pipeline.denoise(complete):
        whole = 1 if complete.guidance[step.expert] == 1 else 2
        forwards += 0 if step.cached else 1 if step.late_cfg else whole
    frames = np.concatenate(list(pipeline.decode(step.latents)), axis=2)
    return Rendered(frames, forwards, time.perf_counter() - started)


def rendered(pipeline: Pipeline, request: Request) -> NDArray[np.uint8]:
    """The clip ``[F, H, W, 3]`` of a request."""
    return to_uint8(render(pipeline, request).frames)


def strip(clip: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A few frames side by side."""
    return np.concatenate([clip[index] for index in SHOWN], axis=1)


def evaluate(engines: Path, count: int, steps: int | None, folder: Path) -> list[tuple[Content, Verdict]]:
    """Renders and judges ``count`` prompts; ``folder`` gets strips of ten clips per picture."""
    folder.mkdir(parents=True, exist_ok=True)
    verdicts, strips = [], []
    with Pipeline.open(engines) as pipeline:
        for seed, content in enumerate(held_out(count)):
            clip = rendered(pipeline, Request(content.caption, seed=seed, steps=steps))
            verdicts.append((content, judge(content, clip)))
            strips.append(strip(clip))
            print(f"{seed:3}  {_line(content, verdicts[-1][1])}", flush=True)
            if len(strips) == 10:
                Image.fromarray(np.concatenate(strips)).save(folder / f"{seed - 9:03}.png")
                strips = []
    return verdicts


def _line(content: Content, verdict: Verdict) -> str:
    wrong = [name for name in ("colour", "shape", "motion") if not getattr(verdict, name)]
    seen = verdict.seen
    said = f"sees {seen.colour} {seen.shape}, {seen.motion}" if seen.shape else "sees no object"
    return f"{content.caption}: " + ("right" if not wrong else f"{' and '.join(wrong)} wrong, {said}")


def summary(verdicts: list[tuple[Content, Verdict]]) -> dict[str, float]:
    """Shares of clips, 0…1, with all three right and with each of them right."""
    counts = Counter(name for _, v in verdicts for name in ("right", "colour", "shape", "motion") if getattr(v, name))
    return {name: counts[name] / len(verdicts) for name in ("right", "colour", "shape", "motion")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", type=Path, help="engine bundle of the tiny model")
    parser.add_argument("folder", type=Path, help="where strips and verdicts go")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, help="the model's own if not given")
    arguments = parser.parse_args()
    verdicts = evaluate(arguments.engines, arguments.prompts, arguments.steps, arguments.folder)
    report = [asdict(content) | {"seen": asdict(verdict.seen), "right": verdict.right} for content, verdict in verdicts]
    (arguments.folder / "verdicts.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, share in summary(verdicts).items():
        print(f"{name}: {100 * share:.0f} %")


if __name__ == "__main__":
    main()
