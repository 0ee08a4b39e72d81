"""Judges videos with VBench, as the accuracy run of MLPerf's text-to-video benchmark is judged.

    python -m studies.vbench videos --engines engines --noise latent.pt

Renders the prompts of VBench that ``videos`` lacks, in the benchmark's setting, then runs VBench's own code in its own
environment. ``videos`` may also be the folder of ``wan-trt mlperf --accuracy``: every video names its prompt. Renders
one prompt after the other, and a command that was stopped goes on.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table

from runtime.recipe import read_recipe
from studies.vbench.models import DIMENSIONS, MODELS, check_models, entries, package_in, usual_environment
from wan22.errors import UserError, shortened
from wan22.files import write_file
from wan22.progress import Progress
from wan_trt import arguments as given
from wan_trt.console import bars, console
from wan_trt.guard import command_of

PROGRAM = "python -m studies.vbench"
SCORE = Path(__file__).with_name("score.py")
REFERENCE, SHARE = 70.48, 0.99  # mean of the benchmark's reference in bfloat16, and the share of it that passes
SETTING = {"size": (1280, 720), "frames": 81, "seed": 42}
STEPS, PROMPTS = 20, 248


@dataclass(frozen=True)
class Scores:
    """VBench's scores by dimension, 0 to 1, and what they are of."""

    scores: Mapping[str, float]
    videos: int
    setting: Mapping[str, Any]  # of the videos, from their recipes
    lacks: tuple[str, ...]  # what MLPerf's setting has and these videos have not

    @property
    def mean(self) -> float:
        """MLPerf's figure: the mean of the dimensions, as a percentage."""
        return 100 * sum(self.scores.values()) / len(self.scores)

    def as_json(self) -> bytes:
        content = {"mean": self.mean, "scores": self.scores, "videos": self.videos, "setting": self.setting}
        return json.dumps(content | {"lacks": self.lacks}, indent=2, ensure_ascii=False).encode() + b"\n"


def run(
    videos: Annotated[Path, typer.Argument(help="Folder of the videos, made if need be.", show_default=False)],
    engines: Annotated[Path | None, typer.Option(help="Engines that render the prompts without a video.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON of the scores.")] = Path("vbench.json"),
    prompts: Annotated[int | None, typer.Option(help="Only the first of VBench's prompts.", min=1)] = None,
    dimension: Annotated[list[str] | None, typer.Option(help="Only this dimension; repeatable.")] = None,
    beside: Annotated[Path | None, typer.Option(help="Scores of other videos, of which 99 % are wanted.")] = None,
    environment: Annotated[Path | None, typer.Option(help="Environment of VBench; by default .venv-vbench.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Folder of VBench's networks; by default ~/.cache/vbench.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device of VBench: cuda or cpu.")] = "cuda",
    render_only: Annotated[bool, typer.Option("--render-only", help="Render, and judge nothing.")] = False,
    list_models: Annotated[bool, typer.Option("--list-models", help="Print the networks and their sources.")] = False,
    list_prompts: Annotated[bool, typer.Option("--list-prompts", help="Print the prompts, one a line.")] = False,
    size: given.Size = None,
    frames: given.Frames = None,
    preset: given.Preset = "mlperf",
    steps: given.Steps = None,
    seed: given.Seed = 42,
    noise: given.Noise = None,
    negative_prompt: given.NegativePrompt = None,
) -> int:
    """Render VBench's prompts and judge the videos with VBench."""
    asked = given.request_from(locals())
    dimensions = _dimensions(dimension or [])
    package = package_in(environment or usual_environment())
    wanted = entries(package, dimensions)[:prompts]
    if list_models or list_prompts:
        for line in [f"{m.path}  {m.source}" for m in MODELS] if list_models else [e["prompt_en"] for e in wanted]:
            console.print(line)
        return 0
    models = models or Path.home() / ".cache" / "vbench"
    if not render_only:
        check_models(models, dimensions)
    aim = _aim(beside)
    with bars() as progress:
        if engines is not None:
            _render(engines, videos, [entry["prompt_en"] for entry in wanted], asked, progress)
        found = _videos(videos, [entry["prompt_en"] for entry in wanted])
        if render_only:
            console.print(f"{len(found)} videos: {videos}")
            return 0
        judged = [name for name in dimensions if any(name in entry["dimension"] for entry in wanted)]
        python = package.parents[3] / "bin" / "python"
        scores = _judged(python, _job(wanted, found, judged, models, device), progress)
    result = Scores(scores, len(found), *_setting(videos, found, len(dimensions)))
    write_file(output, result.as_json(), "the scores")
    console.print(_table(result))
    return _verdict(result, aim)


def _dimensions(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in DIMENSIONS:
            raise UserError(f"dimension {name!r}", f"one of {', '.join(DIMENSIONS)}", "name one with --dimension")
    return [name for name in DIMENSIONS if not names or name in names]


def _aim(beside: Path | None) -> tuple[float, str] | None:
    """The least mean that passes, and what it is a share of; None for MLPerf's own."""
    if beside is None:
        return None
    try:
        mean = json.loads(beside.read_text(encoding="utf-8"))["mean"]
        return SHARE * float(mean), f"{mean:.2f} of {beside}"
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{beside}: no scores", f"a JSON file of {PROGRAM}", "name another with --beside") from None


def _render(engines: Path, folder: Path, prompts: Sequence[str], asked: Any, progress: Progress) -> None:
    """Make the videos that ``folder`` lacks, ``0000.mp4`` for the first prompt.

    Raises:
        UserError: a video there was made by other engines or in another setting.
    """
    from runtime.generate import generate
    from runtime.pipeline import Pipeline
    from runtime.recipe import recipe_of
    from runtime.video import QUALITY

    folder.mkdir(parents=True, exist_ok=True)
    there = _by_prompt(folder)
    with Pipeline.open(engines) as pipeline:
        for index, prompt in enumerate(prompts):
            progress("render", index, len(prompts), "videos")
            request = replace(asked, prompt=prompt)
            if prompt not in there:
                generate(pipeline, request, folder / f"{index:04}.mp4")
                continue
            usual = recipe_of(pipeline.complete(request), pipeline.bundle.manifest, pipeline.spec.sampling.fps, QUALITY)
            if read_recipe(there[prompt]) != usual:
                expected = "a video of these engines in this setting"
                raise UserError(f"{there[prompt]} is of another run", expected, "name another folder")
    progress("render", len(prompts), len(prompts), "videos")


def _by_prompt(folder: Path) -> dict[str, Path]:
    """The videos in ``folder`` by the prompts in their metadata."""
    return {read_recipe(path).prompt: path for path in sorted(folder.glob("*.mp4"))}


def _videos(folder: Path, prompts: Sequence[str]) -> dict[str, Path]:
    """The videos of ``prompts``, all of them. Raises UserError if some are missing."""
    there = _by_prompt(folder) if folder.is_dir() else {}
    if missing := [prompt for prompt in prompts if prompt not in there]:
        found = f"{folder} lacks {len(missing)} of {len(prompts)} videos, the first of {shortened(missing[0])!r}"
        raise UserError(found, "a video of every prompt", "render them with --engines, or judge fewer with --prompts")
    return {prompt: there[prompt].absolute() for prompt in prompts}


def _job(
    wanted: Sequence[Mapping[str, Any]], videos: Mapping[str, Path], dimensions: list[str], models: Path, device: str
) -> dict[str, Any]:
    listed = [dict(entry) for entry in wanted]
    return {
        "entries": listed,
        "named": {f"{prompt}-0.mp4": str(path) for prompt, path in videos.items()},  # as VBench looks for them
        "dimensions": dimensions,
        "models": str(models.absolute()),
        "device": device,
    }


def _judged(python: Path, job: dict[str, Any], progress: Progress) -> dict[str, float]:
    """Runs ``score.py`` with VBench's ``python``. Raises UserError with the last line of what went wrong there."""
    with tempfile.TemporaryDirectory(prefix="wan-trt-vbench-") as temporary:
        folder = Path(temporary)
        (folder / "videos").mkdir()
        for name, path in job.pop("named").items():
            (folder / "videos" / name).symlink_to(path)
        (folder / "full_info.json").write_text(json.dumps(job.pop("entries")), encoding="utf-8")
        places = {"full_info": folder / "full_info.json", "videos": folder / "videos", "folder": folder}
        job |= {name: str(path) for name, path in places.items()}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        surroundings = {"VBENCH_CACHE_DIR": job["models"], "TORCH_HOME": str(folder / "torch")}
        surroundings |= {"HF_HOME": f"{job['models']}/huggingface", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
        command, total = [str(python), str(SCORE), str(folder / "job.json")], len(job["dimensions"])
        with (
            (folder / "errors.txt").open("w+") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | surroundings, cwd=folder
            ) as process,
        ):
            try:
                progress("judge", 0, total, "dimensions")
                for done, _ in enumerate((line for line in process.stdout or () if line.startswith("scored ")), 1):
                    progress("judge", done, total, "dimensions")
            except BaseException:
                process.kill()
                raise
            if process.wait() != 0:
                errors.seek(0)
                *_, last = ["no message", *filter(None, map(str.strip, errors))]
                remedy = f"run {python} -c 'import vbench', or leave a --dimension out"
                raise UserError(f"VBench failed: {shortened(last, 200)}", "its scores", remedy)
        scores: dict[str, float] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        return scores


def _setting(folder: Path, videos: Mapping[str, Path], dimensions: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What all videos have in common, and what they lack of MLPerf's setting.

    Raises:
        UserError: they have not been made alike.
    """
    recipes = [msgspec.structs.replace(read_recipe(path), prompt="") for path in videos.values()]
    if odd := [path for path, recipe in zip(videos.values(), recipes, strict=True) if recipe != recipes[0]]:
        raise UserError(f"{odd[0]} is of another run than others in {folder}", "videos of one run", "remove it")
    recipe = recipes[0]
    checks = {
        f"the model t2v-a14b, not {recipe.model}": recipe.model == "t2v-a14b",
        "1280x720 and 81 frames": (recipe.size, recipe.frames) == (SETTING["size"], SETTING["frames"]),
        f"the preset mlperf with {STEPS} steps": recipe.preset == "mlperf" and recipe.steps in (None, STEPS),
        "its fixed latent": bool(recipe.noise),
        f"its {PROMPTS} prompts, not {len(videos)}": len(videos) == PROMPTS,
        f"its {len(DIMENSIONS)} dimensions, not {dimensions}": dimensions == len(DIMENSIONS),
        "no step cache": recipe.cache is None,
    }
    return msgspec.to_builtins(recipe), tuple(lack for lack, there in checks.items() if not there)


def _table(result: Scores) -> Table:
    table = Table("dimension", "score", title=f"VBench, {result.videos} videos")
    for name, score in result.scores.items():
        table.add_row(name, f"{100 * score:.2f}")
    table.add_row("mean", f"{result.mean:.2f}")
    return table


def _verdict(result: Scores, aim: tuple[float, str] | None) -> int:
    """Prints whether the mean passes; 1 if not. Without MLPerf's setting and without ``aim`` nothing is judged."""
    if aim is None and result.lacks:
        console.print(f"not MLPerf's figure; the videos lack {'; '.join(result.lacks)}")
        return 0
    least, of = aim or (SHARE * REFERENCE, f"{REFERENCE}, MLPerf's reference")
    console.print(f"{'passes' if result.mean >= least else 'fails'}: at least {least:.4f}, 99 % of {of}")
    return int(result.mean < least)


app = command_of(run, PROGRAM)

if __name__ == "__main__":
    app()
