"""Every command that writes, on tiny models, and what may lie in the folder that it writes to."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import av

from wan22.bundle import MANIFEST

ROOT = Path(__file__).parents[2]
VIDEO = ("--size", "64x64", "--frames", "5", "--steps", "2")
BLOCKS_VIDEO = ("--size", "256x160", "--frames", "5..17")
JOBS = "".join(
    f'{{"name": "{name}", "prompt": "A fox", "size": "64x64", "num_frames": 5, "steps": 2}}\n' for name in "ab"
)


@dataclass(frozen=True)
class Inputs:
    """The folders of one tiny model, made once."""

    checkpoint: Path
    graphs: Path
    engines: Path
    prompts: Path
    blocks: Path | None = None  # engines in blocks for a GPU, where TensorRT-RTX is installed
    lora: Path | None = None
    jobs: Path | None = None  # of a batch


@dataclass(frozen=True)
class Command:
    """``words`` of a command line that writes ``outputs`` into the folder it is given."""

    words: Callable[[Inputs, Path], list[object]]
    outputs: tuple[str, ...]
    overwrite: bool = False  # an earlier result is there
    piecemeal: bool = False  # a folder that gets its files one after the other, each of them whole
    resumes: bool = False  # what is under way stays for the next run
    costly: bool = False  # only tried where more moments than by default are asked for


COMMANDS = {
    "synth": Command(lambda its, to: ["synth", "t2v-a14b-tiny", to / "c"], ("c",)),
    "export": Command(
        lambda its, to: ["export", its.checkpoint, to / "b", "--precision", "fp32"], ("b",), resumes=True
    ),
    "export --overwrite": Command(
        lambda its, to: ["export", its.checkpoint, to / "b", "--precision", "fp32", "--overwrite"],
        ("b",),
        overwrite=True,
        resumes=True,
    ),
    "build": Command(lambda its, to: ["build", its.graphs, to / "e"], ("e",)),
    "build --overwrite": Command(
        lambda its, to: ["build", its.graphs, to / "e", "--overwrite"], ("e",), overwrite=True
    ),
    "generate mp4": Command(lambda its, to: ["generate", its.engines, "a", "-o", to / "x.mp4", *VIDEO], ("x.mp4",)),
    "generate over mp4": Command(
        lambda its, to: ["generate", its.engines, "a", "-o", to / "x.mp4", *VIDEO], ("x.mp4",), overwrite=True
    ),
    "generate frames": Command(lambda its, to: ["generate", its.engines, "a", "-o", to / "x", *VIDEO], ("x",)),
    "generate npz": Command(lambda its, to: ["generate", its.engines, "a", "-o", to / "x.npz", *VIDEO], ("x.npz",)),
    "pack": Command(lambda its, to: ["bundle", "pack", its.engines, to / "p"], ("p",)),
    "pack --overwrite": Command(
        lambda its, to: ["bundle", "pack", its.engines, to / "p", "--overwrite"], ("p",), overwrite=True
    ),
    "triton": Command(
        lambda its, to: ["triton", its.engines, to / "r", "--kubernetes", to / "k", "--overwrite"],
        ("r", "k"),
        overwrite=True,
    ),
    "calibrate": Command(
        lambda its, to: [
            *("calibrate", its.graphs, to / "s.json", "--prompts", its.prompts, "--means", to / "m.safetensors"),
            *("--size", "64x64", "--frames", "1", "--steps", "4"),
        ],
        ("s.json", "m.safetensors"),
    ),
    "validate": Command(
        lambda its, to: [
            *("validate", its.engines, its.checkpoint, "-o", to / "r", "--calls", to / "calls", "--overwrite"),
            *("--size", "64x64", "--frames", "1", "--steps", "2"),
        ],
        ("r", "calls"),
        piecemeal=True,
    ),
    "bench": Command(
        lambda its, to: [
            *("bench", its.engines, "--only", "text_encoder", "--runs", 1, "--whole-runs", 0, "--no-memory"),
            *("--size", "64x64", "--frames", "1", "-o", to / "b.json"),
        ],
        ("b.json",),
    ),
    "bench --sweep": Command(
        lambda its, to: [
            *("bench", its.engines, "--sweep", "frames", "--values", "1,5", "--only", "text_encoder", "--runs", 1),
            *("--size", "64x64", "--whole-runs", 0, "--no-memory", "-o", to / "b.json", "--plot", to / "p.png"),
        ],
        ("b.json", "p.png"),
    ),
    "inspect": Command(
        lambda its, to: ["inspect", its.blocks, "--component", "text_encoder", "--html", to / "page.html"],
        ("page.html",),
    ),
    "lora apply": Command(lambda its, to: ["lora", "apply", its.blocks, its.lora, "-o", to / "styled"], ("styled",)),
    "demo": Command(lambda its, to: ["demo", to / "demo"], ("demo",), overwrite=True, piecemeal=True),
}

# what test_kills.py alone tries: commands whose work other processes do, and variants of those above
KILLED = {
    **COMMANDS,
    "batch": Command(lambda its, to: ["batch", its.jobs, to / "o", "--engines", its.engines], ("o",), piecemeal=True),
    "mlperf": Command(
        lambda its, to: ["mlperf", its.engines, "-o", to / "m", "--prompts", its.prompts, "--samples", 1, *VIDEO],
        ("m",),
    ),
    "generate --parallel": Command(
        lambda its, to: [
            *("generate", its.engines, "a", "-o", to / "x.mp4", *VIDEO, "--parallel", "cfg2", "--gpus", "0,1")
        ],
        ("x.mp4",),
        costly=True,
    ),
    "export int8": Command(
        lambda its, to: ["export", its.checkpoint, to / "b", "--precision", "int8"],
        ("b",),
        resumes=True,
        costly=True,
    ),
    "build --lora-slots": Command(
        lambda its, to: [
            *("build", its.blocks.with_name("b16"), to / "e", "--target", "rtx4090", *BLOCKS_VIDEO),
            *("--lora-slots", 16),
        ],
        ("e",),
        costly=True,
    ),
}
NEED_BLOCKS = ("inspect", "lora apply", "build --lora-slots")


@dataclass(frozen=True)
class Ended:
    """How one command line ended."""

    status: int  # as waitpid says it: 0, 256 times the exit code, or the signal
    calls: int  # to the disk that may fail
    text: str
    seconds: float

    @property
    def code(self) -> int:
        return os.waitstatus_to_exitcode(self.status)


class Forking:
    """Runs command lines in forks of one process that has imported everything (:mod:`tests.faults.forking`)."""

    def __init__(self, place: Path, preload: Path | None = None) -> None:
        self.log, self.tmp = place / "log", place / "tmp"
        self.tmp.mkdir(parents=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.tmp), "OMP_NUM_THREADS": "2"}
        self.preload = preload
        if preload is not None:
            environment["LD_PRELOAD"] = str(preload)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forking"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip

    def run(
        self, words: list[object], kill_after_s: float | None = None, kill_with: int = signal.SIGKILL, **disk: object
    ) -> Ended:
        """``disk``: see :mod:`tests.faults.forking`. The signal goes to the command and what it has started."""
        assert self._process.stdin and self._process.stdout
        asked = {"argv": [str(word) for word in words], "log": str(self.log), "tmp": str(self.tmp), **disk}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        child, started = int(self._process.stdout.readline()), time.monotonic()
        timer = threading.Timer(kill_after_s or 600, _kill, (child, kill_with))
        timer.start()
        status, calls = json.loads(self._process.stdout.readline())
        seconds = time.monotonic() - started
        timer.cancel()
        timer.join()
        return Ended(status, calls, self.log.read_text(errors="replace"), seconds)

    def close(self) -> None:
        self._process.communicate()


def _kill(child: int, kill_with: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, kill_with)


def make_inputs(forking: Forking, place: Path) -> Inputs:
    """A checkpoint, its graphs and its engines; where TensorRT-RTX is installed engines in blocks for a GPU too."""

    def run(*words: object) -> None:
        ended = forking.run(list(words))
        assert ended.code == 0, ended.text

    place.mkdir(parents=True)
    checkpoint, graphs, engines, prompts, jobs = (place / name for name in ("c", "b", "e", "prompts", "jobs"))
    run("synth", "t2v-a14b-tiny", checkpoint)
    run("export", checkpoint, graphs, "--precision", "fp32")
    run("build", graphs, engines)
    prompts.write_text("A fox in the snow\n")
    jobs.write_text(JOBS)
    try:
        import tensorrt_rtx  # noqa: F401
    except ImportError:
        return Inputs(checkpoint, graphs, engines, prompts, jobs=jobs)
    blocks, lora = _blocks(run, place, checkpoint), _lora(place / "l.safetensors")
    return Inputs(checkpoint, graphs, engines, prompts, blocks, lora, jobs)


def _blocks(run: Callable[..., None], place: Path, checkpoint: Path) -> Path:
    run("export", checkpoint, place / "b16", "--precision", "bf16")
    run("build", place / "b16", place / "e16", "--target", "rtx4090", *BLOCKS_VIDEO)
    return place / "e16"


def _lora(path: Path) -> Path:
    import numpy as np
    from safetensors.numpy import save_file

    from wan22.specs import SPECS

    dit = SPECS["t2v-a14b-tiny"].dit
    save_file({"diffusion_model.blocks.0.ffn.0.diff": np.full((dit.ffn_width, dit.width), 0.1, np.float32)}, path)
    return path


# -- what may lie there


def damage(command: Command, to: Path, reference: Path, *, ended: bool) -> list[str]:
    """What in ``to`` is neither whole, beside the same in ``reference``, nor missing where it may be.

    Args:
        command: what was run.
        to: the folder it wrote to.
        reference: a folder that it wrote to undisturbed.
        ended: it has ended well, so everything must be there and nothing else.
    """
    found = []
    for name in command.outputs:
        must = ended or (command.overwrite and not command.piecemeal)
        found += list(_damaged(to / name, reference / name, must=must, some=command.piecemeal and not ended))
    if ended:
        known = {path.name for path in reference.iterdir()}
        found += [f"left over: {path.name}" for path in to.iterdir() if path.name not in known]
        found += [f"left over: {path.relative_to(to)}" for path in to.rglob(".*.partial")]
    return found


def _damaged(path: Path, reference: Path, *, must: bool, some: bool) -> Iterator[str]:
    """``some``: not all files need be there."""
    if not path.exists():
        if must:
            yield f"missing: {path.name}"
    elif reference.is_dir():
        ours, theirs = (
            {file.relative_to(root) for file in root.rglob("*") if file.is_file() and ".partial" not in str(file)}
            for root in (path, reference)
        )
        yield from (f"missing: {path.name}/{name}" for name in theirs - ours if not some)
        yield from (f"unknown: {path.name}/{name}" for name in ours - theirs)
        yield from (f"half: {path.name}/{name}" for name in ours & theirs if not _whole(path / name, reference / name))
    elif not _whole(path, reference):
        yield f"half: {path.name}"


def _whole(path: Path, reference: Path) -> bool:
    """Equal to the reference, or where runs differ in times and dates at least complete."""
    content = path.read_bytes()
    if content == reference.read_bytes():
        return True
    readers: dict[str, Callable[[], bool]] = {
        ".json": lambda: bool(json.loads(content)),
        ".jsonl": lambda: all(map(json.loads, content.splitlines())) and content[-1:] in (b"", b"\n"),
        ".xml": lambda: ElementTree.fromstring(content) is not None,
        # compilers choose kernels by their times, so two builds may differ
        ".plan": lambda: hashlib.sha256(content).hexdigest() in (path.parent / MANIFEST).read_text(),
        # its metadata has the hash of engines, whose manifest has the build's seconds
        ".mp4": lambda: _pictures(path) == _pictures(reference),
    }
    try:
        if path.suffix in readers:
            return readers[path.suffix]()
    except (ValueError, ElementTree.ParseError, av.FFmpegError):
        return False
    if path.name.startswith("mlperf_log"):  # of LoadGen: times
        return abs(len(content) - reference.stat().st_size) < 0.2 * reference.stat().st_size
    ends = {".html": b"</html>", ".md": reference.read_bytes().rstrip()[-1:], ".png": b"IEND\xaeB`\x82"}
    if path.suffix in ends:
        return content.rstrip().endswith(ends[path.suffix])
    return path.suffix in (".safetensors", ".log") and abs(len(content) - reference.stat().st_size) < 100


def _pictures(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]


def fresh(command: Command, to: Path, reference: Path) -> None:
    """``to`` as it is before the command: empty, or with an earlier result."""
    shutil.rmtree(to, ignore_errors=True)
    if command.overwrite:
        shutil.copytree(reference, to)
    else:
        to.mkdir(parents=True)
