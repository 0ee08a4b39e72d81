"""``wan-trt demo``: all stages on a tiny model, by default one with trained weights."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from wan22.errors import UserError
from wan22.files import claim, whole_folder, write_file
from wan22.precision import Precision
from wan22.quantities import counted
from wan22.specs import ModelSpec, spec_named
from wan_trt.commands import build, export, generate, synth, validate
from wan_trt.console import console

MARK = ".made-by-wan-trt-demo"
TRAINED = "t2v-a14b-toy"
# The trained model knows shapes in front of walls (docs/tiny_model.md); the others know nothing and render noise.
PROMPTS = (
    "a large yellow ball moves right slowly in front of a dark grey wall",
    "a large white square bounces in front of a dark green wall, warm light",
    "a large purple triangle moves left quickly in front of a brown wall, warm light",
    "a large red ball stands still in front of a light grey wall, camera zooms in",
)
PROMPT = "A red panda rides a bicycle through the rain, cinematic light"
STRIP_FRAMES = 6


def run(
    folder: Annotated[Path, typer.Argument(help="Folder for checkpoint, engines, video and report.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="A tiny model.")] = TRAINED,
    prompt: Annotated[str | None, typer.Option(help="Description of the video; four built-in ones by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise, and of random weights.", min=0, max=2**64 - 1)] = 0,
) -> int:
    """Write a tiny checkpoint, export and build it, generate videos and validate one against PyTorch."""
    with claim(folder / MARK, "the demo"):
        return _run(spec_named(model), folder, prompt, seed)


def _run(spec: ModelSpec, folder: Path, prompt: str | None, seed: int) -> int:
    from validate.sample_image import picture_for

    name = spec.name
    prompt, *others = (prompt,) if prompt else PROMPTS if name == TRAINED else (PROMPT,)
    work = _new_folder(folder / name)
    checkpoint, bundle, engines = (work / stage for stage in ("checkpoint", "onnx", "engines"))
    console.rule(f"{name}: checkpoint")
    synth.run(name, checkpoint, "official", seed)
    console.rule("export")
    export.run(str(checkpoint), bundle, Precision.FP32)
    console.rule("build")
    build.run(bundle, engines, "cpu")
    console.rule("generate")
    image = None
    if spec.takes.image != "no":
        image = folder / "image.png"
        write_file(image, picture_for(spec.sampling.sizes[0]))
        console.print(f"{image}: the image to start from")
    generate.run(engines, folder / "out.mp4", prompt, image=image, seed=seed)
    videos = [folder / "out.mp4", *(folder / f"out-{number}.mp4" for number in range(2, 2 + len(others)))]
    for text, video in zip(others, videos[1:], strict=True):
        generate.run(engines, video, text, seed=seed)
    write_file(folder / "filmstrip.png", _filmstrip(videos))
    console.print(f"{folder / 'filmstrip.png'}: frames of {counted(len(videos), 'video')}")
    console.rule("validate against PyTorch")
    return validate.run(engines, str(checkpoint), folder, prompt=prompt, image=image, seed=seed, overwrite=True)


def _filmstrip(videos: Sequence[Path]) -> bytes:
    """A PNG with a row of frames per video."""
    import av
    from PIL import Image

    rows = []
    for video in videos:
        with av.open(str(video)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        rows.append([frames[i * (len(frames) - 1) // (STRIP_FRAMES - 1)] for i in range(STRIP_FRAMES)])
    width, height = rows[0][0].size
    strip = Image.new("RGB", (width * STRIP_FRAMES, height * len(rows)))
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            strip.paste(image, (column * width, row * height))
    content = io.BytesIO()
    strip.save(content, "png")
    return content.getvalue()


def _new_folder(work: Path) -> Path:
    """An empty folder for the demo's files; only an earlier demo's is replaced."""
    if work.exists() and not (work / MARK).is_file():
        raise UserError(f"{work} exists", "a folder made by an earlier demo, or none", "name another folder")
    with whole_folder(work, MARK) as new:
        (new / MARK).touch()
    return work
