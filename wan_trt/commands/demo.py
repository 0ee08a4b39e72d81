"""``wan-trt demo``: all stages on a tiny model with random weights."""

from pathlib import Path
from typing import Annotated

import typer

from wan22.errors import UserError
from wan22.files import claim, whole_folder, write_file
from wan22.specs import ModelSpec, Precision, spec_named
from wan_trt.commands import build, export, generate, synth, validate
from wan_trt.console import console

MARK = ".made-by-wan-trt-demo"
PROMPT = "A red panda rides a bicycle through the rain, cinematic light"


def run(
    folder: Annotated[Path, typer.Argument(help="Folder for checkpoint, engines, video and report.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="A tiny model.")] = "t2v-a14b-tiny",
    prompt: Annotated[str, typer.Option(help="Description of the video, in any language.")] = PROMPT,
    seed: Annotated[int, typer.Option(help="Seed of weights and noise.", min=0, max=2**64 - 1)] = 0,
) -> int:
    """Synthesise a checkpoint, export, build, generate a video and validate it against PyTorch."""
    with claim(folder / MARK, "the demo"):
        return _run(spec_named(model), folder, prompt, seed)


def _run(spec: ModelSpec, folder: Path, prompt: str, seed: int) -> int:
    name = spec.name
    work = _new_folder(folder / name)
    checkpoint, bundle, engines = (work / stage for stage in ("checkpoint", "onnx", "engines"))
    console.rule(f"{name}: checkpoint")
    synth.run(name, checkpoint, "official", seed)
    console.rule("export")
    export.run(str(checkpoint), bundle, Precision.FP32)
    console.rule("build")
    build.run(bundle, engines, "cpu")
    console.rule("generate")
    image = None if spec.takes.image == "no" else _picture(folder / "image.png", spec.sampling.sizes[0])
    generate.run(engines, folder / "out.mp4", prompt, image=image, seed=seed)
    console.rule("validate against PyTorch")
    return validate.run(engines, str(checkpoint), folder, prompt=prompt, image=image, seed=seed)


def _picture(path: Path, size: tuple[int, int]) -> Path:
    """Write the picture that a video of ``size`` starts from."""
    from validate.sample_image import picture_for

    write_file(path, picture_for(size))
    console.print(f"{path}: the image to start from")
    return path


def _new_folder(work: Path) -> Path:
    """An empty folder for the demo's files; only an earlier demo's is replaced."""
    if work.exists() and not (work / MARK).is_file():
        raise UserError(f"{work} exists", "a folder made by an earlier demo, or none", "name another folder")
    with whole_folder(work, MARK) as new:
        (new / MARK).touch()
    return work
