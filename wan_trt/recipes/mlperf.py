"""Drive engines with LoadGen, the load generator of MLPerf Inference, in the setting of its text-to-video benchmark.

LoadGen decides when a sample is due, measures it, and writes its own logs. A sample is one prompt: text encoder,
denoising, decoder and the mp4 file are inside its time. Nothing is kept between samples, and all have the same noise.

A run of this is no submission: that takes the 248 prompts of the benchmark, its fixed latent, its minimum duration, an
accuracy run whose videos VBench judges, compliance tests and a review. The folder says what a run lacks.
"""

import json
import re
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runtime.block_backend import BLOCKS_AS_FIT, BlockOptions
from runtime.block_backend import check_options as check_blocks
from runtime.built_for import fill_defaults
from runtime.generate import generate
from runtime.pipeline import Pipeline
from runtime.request import Request
from validate.bench.child_process import child_process
from wan22.backends import require_module
from wan22.bundle import Bundle, open_bundle
from wan22.errors import NonFiniteError, UserError
from wan22.files import whole_folder
from wan22.outputs import check_no_source
from wan22.progress import Progress, silent

Scenario = Literal["SingleStream", "Offline"]
PROMPTS, STEPS, VIDEO, MIN_DURATION_S, SEED = 248, 20, (1280, 720, 81), 600, 42  # of the benchmark
SUMMARY, SETTINGS = "mlperf_log_summary.txt", "mlperf.json"
ALMOST_NO_RATE = 1e-6  # samples a second: the number of samples decides how long a run is
MOST_SAMPLES, MOST_SECONDS = 1_000_000, 86_400  # LoadGen plans every sample in memory, with about 460 bytes each
FASTEST_SAMPLE_NS = 1_000_000  # LoadGen plans a sample for each of these in the duration
AUDIT_BYTES = 1024 * 1024
AUDIT_LINE = re.compile(r"^[ \t]*[^\s.#]+\.[^\s.]+\.[^\s.]+[ \t]+=[ \t]+\S", re.MULTILINE)  # *.*.mode = 2


@dataclass(frozen=True)
class MlperfOptions:
    scenario: Scenario = "SingleStream"
    samples: int = 1
    accuracy: bool = False  # every prompt once, and no performance
    min_duration_s: float = 0.0  # LoadGen repeats samples until it has passed
    audit: Path | None = None  # the audit.config of a compliance test
    overwrite: bool = False
    command: str = "wan_trt.recipes.mlperf.run_mlperf(...)"
    blocks: BlockOptions = BLOCKS_AS_FIT  # memory and devices


@dataclass(frozen=True)
class MlperfResult:
    folder: Path
    valid: bool  # by LoadGen's rules
    summary: dict[str, str]  # its lines
    videos: int
    lacks: tuple[str, ...]  # what the benchmark's setting has and this run does not

    @property
    def figure(self) -> str:
        """The figure of the scenario, from LoadGen's summary."""
        latency, rate = (self.summary.get(key) for key in ("90.0th percentile latency (ns)", "Samples per second"))
        found = [] if latency is None else [f"90th percentile latency: {float(latency) / 1e9:.4g} s"]
        return ", ".join(found if rate is None else [*found, f"Samples per second: {float(rate):.4g}"])


def run_mlperf(
    engines: Path,
    folder: Path,
    prompts: Sequence[str],
    request: Request,
    options: MlperfOptions,
    progress: Progress = silent,
) -> MlperfResult:
    """Run LoadGen on the engines at ``engines`` and write its logs, the videos and our settings to ``folder``.

    Raises:
        UserError: LoadGen is missing; the engines do not support the request, or ``folder`` holds them. Nothing is
            written then.
    """
    check_no_source(folder, engines, options.audit)
    loadgen = require_module("mlperf_loadgen", "mlcommons-loadgen", "LoadGen for wan-trt mlperf")
    bundle, request = open_bundle(engines, "engines"), replace(request, cache=None)
    check_blocks(bundle, options.blocks)
    fill_defaults(replace(request, prompt=prompts[0]), bundle.manifest)
    lacks = tuple(_lacks(bundle, request, len(prompts), options))
    with whole_folder(folder, SETTINGS if options.overwrite else "") as new:
        with child_process(_run_loadgen, engines, new, prompts, request, options) as (receiver, process):
            videos = _listen(receiver, process, len(prompts) if options.accuracy else options.samples, progress)
        summary = _read_summary(new / SUMMARY)
        facts = _facts(bundle, loadgen, request, options) | {"lacks": lacks, "summary": summary}
        (new / SETTINGS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return MlperfResult(folder, summary.get("Result is") == "VALID", summary, videos, lacks)


def _listen(receiver: Connection, process: BaseProcess, wanted: int, progress: Progress) -> int:
    """Wait for the end of the run; return the number of videos. Raises what stopped a sample."""
    made = 0
    while True:
        try:
            message = receiver.recv()
        except EOFError:
            process.join()
            found = f"the process of LoadGen ended with code {process.exitcode}"
            raise UserError(found, "enough memory for the engines", "use a smaller --size or fewer --frames") from None
        if isinstance(message, Exception):
            raise message
        if message is None:
            return made
        made += 1
        progress("samples", min(made, wanted), wanted, "videos")


# -- in the process of LoadGen, which cannot be told to stop


def _run_loadgen(
    sender: Connection, engines: Path, folder: Path, prompts: Sequence[str], request: Request, options: MlperfOptions
) -> None:
    """Run LoadGen; send the index of every video, then None, or the exception that ends the run."""
    try:
        loadgen = import_module("mlperf_loadgen")
        with Pipeline.open(engines, blocks=options.blocks) as pipeline:
            samples = _Samples(loadgen, sender, lambda index: _make(pipeline, folder, index, prompts[index], request))
            system = loadgen.ConstructSUT(samples.issue, lambda: None)
            library = loadgen.ConstructQSL(len(prompts), len(prompts), lambda _: None, lambda _: None)
            audit = str(options.audit) if options.audit else ""
            settings, logs = _test_settings(loadgen, options), _log_settings(loadgen, folder)
            loadgen.StartTestWithLogSettings(system, library, settings, logs, audit)
            loadgen.DestroyQSL(library)
            loadgen.DestroySUT(system)
        sender.send(None)
    except Exception as error:
        sender.send(_portable(error))


def _make(pipeline: Pipeline, folder: Path, index: int, prompt: str, request: Request) -> None:
    generate(pipeline, replace(request, prompt=prompt), folder / f"{index:04}.mp4")


class _Samples:
    """LoadGen's calls. An exception must not pass through it, so after one nothing is answered any more."""

    def __init__(self, loadgen: Any, sender: Connection, make: Callable[[int], None]) -> None:
        self._loadgen, self._sender, self._make = loadgen, sender, make

    def issue(self, samples: Sequence[Any]) -> None:
        for sample in samples:
            try:
                self._make(sample.index)
            except Exception as error:
                self._sender.send(_portable(error))
                threading.Event().wait()  # until the parent ends this process
            self._sender.send(sample.index)
            made = np.array([sample.index], np.int64)
            answer = self._loadgen.QuerySampleResponse(sample.id, made.ctypes.data, made.nbytes)
            self._loadgen.QuerySamplesComplete([answer])


def _portable(error: Exception) -> Exception:
    """``error`` as the parent can raise it; a bug with its traceback."""
    known = isinstance(error, UserError | NonFiniteError | MemoryError)
    return error if known else RuntimeError(traceback.format_exc())


def _test_settings(loadgen: Any, options: MlperfOptions) -> Any:
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, options.scenario)
    mode = loadgen.TestMode
    settings.mode = mode.AccuracyOnly if options.accuracy else mode.PerformanceOnly
    settings.min_duration_ms = round(1000 * options.min_duration_s)
    settings.min_query_count = options.samples
    settings.offline_expected_qps = ALMOST_NO_RATE
    at_most = round(1e9 * options.min_duration_s / MOST_SAMPLES)
    settings.single_stream_expected_latency_ns = max(FASTEST_SAMPLE_NS, at_most)
    return settings


def _log_settings(loadgen: Any, folder: Path) -> Any:
    output = loadgen.LogOutputSettings()
    output.outdir, output.copy_summary_to_stdout = str(folder), False
    settings = loadgen.LogSettings()
    settings.log_output, settings.enable_trace = output, False
    return settings


def _read_summary(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _lacks(bundle: Bundle, request: Request, prompts: int, options: MlperfOptions) -> list[str]:
    """What a performance run in the benchmark's setting has and this run does not."""
    spec, video = bundle.manifest.spec, request.shape(bundle.manifest.spec)
    checks = {
        f"the model t2v-a14b, not {spec.name}": spec.name == "t2v-a14b",
        f"a video of 1280x720, 81 frames, not {video[0]}x{video[1]}, {video[2]}": video == VIDEO,
        f"the preset mlperf, not {request.preset or 'the default'}": request.preset == "mlperf",
        f"{STEPS} steps, not {request.steps}": request.steps in (None, STEPS),
        f"its {PROMPTS} prompts, not {prompts}": prompts == PROMPTS,
        "its fixed latent (--noise)": request.noise is not None,
        f"a duration of {MIN_DURATION_S} s": options.accuracy or options.min_duration_s >= MIN_DURATION_S,
        "an accuracy run, judged by VBench": options.accuracy,
    }
    return [lack for lack, there in checks.items() if not there]


def _facts(bundle: Bundle, loadgen: Any, request: Request, options: MlperfOptions) -> dict[str, Any]:
    build = bundle.manifest.build
    return {
        "command": options.command,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "loadgen": str(getattr(loadgen, "__version__", "")) or _version(),
        "model": bundle.manifest.spec.name,
        "precision": bundle.manifest.precision_text,
        "target": build.target if build else "",
        "bundle": bundle.manifest.own_sha256,
        "scenario": options.scenario,
        "mode": "accuracy" if options.accuracy else "performance",
        "samples": options.samples,
        "request": {key: value for key, value in asdict(replace(request, noise=None)).items() if value is not None},
        "caches": "none",
    }


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mlcommons-loadgen")
    except PackageNotFoundError:
        return ""


def check_options(options: MlperfOptions) -> None:
    """Raises UserError for numbers that LoadGen does not take and for an audit file without a setting."""
    if not 1 <= options.samples <= MOST_SAMPLES:
        raise UserError(f"{options.samples} samples", f"1 to {MOST_SAMPLES}", "choose another --samples")
    if not 0 <= options.min_duration_s <= MOST_SECONDS:
        found = f"a duration of {options.min_duration_s:g} s"
        raise UserError(found, f"0 to {MOST_SECONDS} s", "choose another --min-duration-s")
    if options.audit is None:
        return
    if not options.audit.is_file():
        raise UserError(f"{options.audit}: no such file", "the audit.config of a test", "name another")
    with options.audit.open("rb") as file:
        content = file.read(AUDIT_BYTES).decode(errors="replace")
    if not AUDIT_LINE.search(content):
        found = f"{options.audit}: no line such as '*.*.mode = 2'"
        raise UserError(found, "the audit.config of a test", "name another")
