"""Measures everything that needs a GPU, within a time budget; prints a table and writes a JSON file.

    python -m studies.gpu --budget-s 600 -o gpu.json

Weights are random, so nothing is downloaded. Each stage runs in a separate process and may fail alone: a refusal by the
GPU is a result too. Small stages come first; the last ones, full models, use the remaining time. The file is rewritten
after every stage, so a run that ends early keeps its results. ``--dry-run`` runs the code of every stage on the CPU at
tiny sizes and records no figures.
"""

import json
import platform
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from studies.gpu.stage import Stage, StageResult, StageSettings, run_stage
from studies.gpu.view import table_of
from validate.bench.machine import machine, versions
from wan22.errors import UserError
from wan22.files import write_file
from wan_trt.console import command_line, console
from wan_trt.guard import command_of

P480, P720, P5B_480, P5B = (832, 480, 81), (1280, 720, 81), (832, 480, 121), (1280, 704, 121)
TRANSFORMER = "studies.gpu.transformer"
STAGES = (
    Stage("cuda", "CUDA provider", "studies.gpu.provider", "load"),
    Stage("rtx", "TensorRT-RTX engine", "studies.gpu.rtx", "attempt"),
    Stage("sampler", "sampler", "studies.gpu.sampler", "overhead"),
    Stage("swap", "expert swap", "studies.gpu.swap", "rate"),
    Stage("a14b-blocks", "T2V-A14B, two blocks", TRANSFORMER, "compare_blocks", ("t2v-a14b", (P480, P720))),
    Stage("5b-blocks", "TI2V-5B, two blocks", TRANSFORMER, "compare_blocks", ("ti2v-5b", (P5B_480, P5B))),
    Stage("vae", "streaming VAE decode", "studies.gpu.decoder", "streaming"),
    Stage("5b", "TI2V-5B, whole", TRANSFORMER, "whole_model", ("ti2v-5b", (P5B_480, P5B))),
    Stage("video", "TI2V-5B, a video", "studies.gpu.video", "whole_video"),
    Stage("a14b", "T2V-A14B, whole expert", TRANSFORMER, "whole_model", ("t2v-a14b", (P480, P720))),
)
PROGRAM = "python -m studies.gpu"
NOT_MEASURED = "no GPU: nothing measured"
PACKAGES = ("onnxruntime-gpu", "cupy-cuda13x", "cupy-cuda12x", "tensorrt_rtx")


def run(
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")] = Path("gpu.json"),
    budget_s: Annotated[float, typer.Option(min=1, help="Seconds for all stages; the rest is skipped.")] = 600,
    only: Annotated[list[str] | None, typer.Option(help="Run only this stage; repeatable.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run the code at tiny sizes on the CPU; measure nothing.")
    ] = False,
) -> int:
    """Measure transformers, sampler and VAE on this machine's GPU, and check that TensorRT-RTX engines load."""
    stages = _select_stages(only or [])
    gpu = {} if dry_run else _gpu()
    answers = [StageResult(stage, "skipped", "the run ended before it") for stage in stages]
    circumstances, code = _circumstances(gpu, dry_run), 0
    _write(output, {**circumstances, "stages": []})  # fails before the work if the file cannot be written
    shown = _without_figures if dry_run else list
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an early end keeps the results so far
    try:
        for _ in _measure(answers, StageSettings(dry_run), time.monotonic() + budget_s):
            _write(output, {**circumstances, "stages": [answer.as_json() for answer in shown(answers)]})
    except KeyboardInterrupt:
        code = 130
    answers = shown(answers)
    _write(output, {**circumstances, "stages": [answer.as_json() for answer in answers]})
    console.print(table_of(answers))
    console.print(f"{NOT_MEASURED if dry_run else gpu['name']}: {output}")
    return code or int(dry_run and any(answer.status == "failed" for answer in answers))


def _select_stages(names: Sequence[str]) -> list[Stage]:
    known = [stage.name for stage in STAGES]
    for name in names:
        if name not in known:
            raise UserError(f"stage {name!r}", f"one of {', '.join(known)}", "name one of them with --only")
    return [stage for stage in STAGES if not names or stage.name in names]


def _gpu() -> dict[str, Any]:
    """Properties of the GPU. Raises UserError if PyTorch sees none."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("no GPU that PyTorch can use", "an NVIDIA GPU with its driver", "--dry-run tries the code out")
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": str(torch.version.cuda),
    }


def _measure(answers: Sequence[StageResult], setting: StageSettings, deadline: float) -> Iterator[None]:
    """Run the stages, yielding after each. A stage gets half of the remaining time, the last one all of it."""
    for number, answer in enumerate(answers, 1):
        left = deadline - time.monotonic()
        if left <= 0:
            answer.reason = "no time left"
            continue
        console.print(f"{number}/{len(answers)} {answer.stage.title}, {left:.0f} s left")
        answer.status, answer.reason = "interrupted", ""
        run_stage(answer, setting, left if answer is answers[-1] else left / 2)
        yield


def _without_figures(answers: Sequence[StageResult]) -> list[StageResult]:
    shown = []
    for answer in answers:
        rows = [replace(row, value=None, note="ran") if row.value is not None else row for row in answer.measurements]
        status = "ran" if answer.status == "measured" else answer.status
        shown.append(replace(answer, status=status, measurements=rows))
    return shown


def _circumstances(gpu: dict[str, Any], dry_run: bool) -> dict[str, Any]:
    found = versions()
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "kind": "gpu_run",
        "verdict": NOT_MEASURED if dry_run else "measured",
        "command": command_line(PROGRAM),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"kernel": platform.release()},
        "gpu": gpu,
        "versions": found,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=2).encode() + b"\n", "output")


app = command_of(run, PROGRAM)

if __name__ == "__main__":
    app()
