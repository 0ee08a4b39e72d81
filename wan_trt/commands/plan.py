"""``wan-trt plan``: the cost of a model on a target, without its weights."""

import json
from typing import Annotated

import typer

from wan22.quantities import parse_bytes
from wan22.specs import Precision, spec_named
from wan_trt.arguments import PRECISIONS, Frames, Size, Vram, size_of
from wan_trt.console import console


def run(
    model: Annotated[str, typer.Argument(help="A model, such as t2v-a14b.", show_default=False)],
    target: Annotated[
        str, typer.Option(help="GPU such as rtx4090 or h100, cuda (ONNX Runtime on any GPU), cpu, or auto.")
    ],
    precision: Annotated[
        Precision | None,
        typer.Option(metavar="PRECISION", help=f"{PRECISIONS}; by default fp32 for cpu, bf16 for a GPU."),
    ] = None,
    size: Size = None,
    frames: Frames = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    vram: Vram = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Print sizes, memory, arithmetic and roofline times of a model, without weights or a GPU."""
    from engines.plan import make_plan
    from engines.plan_view import as_text
    from engines.targets import target_named

    spec = spec_named(model)
    width, height = size_of(size) or spec.sampling.sizes[0]
    video = (width, height, spec.sampling.frames if frames is None else frames)
    budget = None if vram is None else parse_bytes(vram, "--vram")
    aim = target_named(target)
    plan = make_plan(spec, aim, precision or aim.default_precision, video, steps, budget)
    if as_json:
        print(json.dumps(plan.as_json()))
        return
    for part in as_text(plan):
        console.print(part)
