"""Who renders a batch beside servers: processes on this machine, or actors of a Ray cluster."""

import logging
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from runtime.block_backend import BLOCKS_AS_FIT, BlockOptions, check_options
from runtime.generate import Encoding, generate
from runtime.pipeline import Pipeline
from runtime.video import QUALITY
from triton_repo.job_request import request_of
from triton_repo.schema import VIDEO_FORMATS
from validate.bench.child_process import child_process
from wan22.backends import require_module
from wan22.bundle import Manifest, open_bundle
from wan22.errors import UserError
from wan22.files import scratch_folder
from wan22.residency import ResidencyChoice
from wan_trt.recipes.batch.jobs import Job
from wan_trt.recipes.batch.run import Worker, WorkerLostError, Workers

CONNECT_S, START_S = 5.0, 120.0  # for an actor of Ray, whose place may have gone with a node


@dataclass(frozen=True)
class Opening:
    """How a worker opens the engines."""

    engines: Path
    residency: ResidencyChoice = "auto"
    blocks: BlockOptions = BLOCKS_AS_FIT
    threads: int = 0  # of ONNX Runtime on the CPU; 0 means one for every core


class Renderer:
    """The engines of one device, opened once."""

    def __init__(self, opening: Opening) -> None:
        """Open nothing yet."""
        if opening.threads:
            from runtime.engine_onnxruntime import use_threads

            use_threads(opening.threads)
        self._pipeline = Pipeline.open(opening.engines, residency=opening.residency, blocks=opening.blocks)

    def render(self, job: Job, folder: Path) -> bytes:
        """The video of ``job``, made in the empty ``folder``. Raises UserError or NonFiniteError if it cannot be."""
        request, settings = request_of(job.settings, self._pipeline.spec), job.settings
        encoding = Encoding(settings.get("fps"), settings.get("quality", QUALITY))  # type: ignore[arg-type]
        path = folder / f"video{VIDEO_FORMATS[job.format]}"
        try:
            generate(self._pipeline, request, path, encoding)
            return path.read_bytes()
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def local_workers(opening: Opening, count: int = 1, devices: Sequence[str] = ()) -> "Iterator[Workers]":
    """Processes on this machine: one for each of ``devices``, numbers of GPUs, or ``count`` that share the cores.

    On the CPU threads of 0 are an equal share of the cores for each.
    """
    manifest = _checked(opening)
    if not opening.threads and not devices and count > 1:
        opening = replace(opening, threads=max(1, len(os.sched_getaffinity(0)) // count))

    with scratch_folder("batch") as folder:  # this process's, and so goes with workers that are killed

        def open_worker(index: int) -> Any:
            device = devices[index] if devices else ""
            return _process(f"gpu-{device}" if device else f"process-{index}", device, opening, folder)

        count = len(devices) or count or 1
        yield Workers(count, manifest.own_sha256, open_worker, manifest, gpus=1 if devices else 0)


def _checked(opening: Opening) -> Manifest:
    """The manifest of the engines. Raises UserError for options that they do not have."""
    bundle = open_bundle(opening.engines, "engines")
    check_options(bundle, opening.blocks)
    return bundle.manifest


def _runs_on_gpu(manifest: Manifest) -> bool:
    return manifest.build is not None and manifest.build.target != "cpu"


def visible_gpus(engines: Path, asked: str = "") -> tuple[str, ...]:
    """The numbers in ``asked``, as "0,1", else of all GPUs that are there; none for engines of the CPU.

    Raises:
        UserError: not numbers, or engines for the CPU.
    """
    on_gpu = _runs_on_gpu(open_bundle(engines, "engines").manifest)
    if asked and not on_gpu:
        raise UserError(f"--gpus for {engines}", "engines for GPUs", "leave it out; --workers N divides the cores")
    if asked and not all(number.strip().isdecimal() for number in asked.split(",")):
        raise UserError(f"--gpus {asked!r}", "numbers of GPUs", "write 0,1")
    if asked or not on_gpu:
        return tuple(number.strip() for number in asked.split(",")) if asked else ()
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return tuple(number for number in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if number)
    cupy = require_module("cupy", "cupy-cuda13x", "CuPy, to count the GPUs")
    return tuple(str(index) for index in range(cupy.cuda.runtime.getDeviceCount()))


@contextmanager
def _process(name: str, device: str, opening: Opening, folder: Path) -> "Iterator[Worker]":
    with child_process(_serve, device, opening, folder / name, folder=folder) as (pipe, process):
        worker = _Process(name, pipe, process)
        try:
            worker.answer()
        except WorkerLostError as error:
            raise UserError(f"{name}: {error}", "a process that opens the engines", "see its messages") from None
        yield worker


class _Process:
    def __init__(self, name: str, pipe: Connection, process: Any) -> None:
        self.name, self._pipe, self._child = name, pipe, process

    def render(self, job: Job) -> bytes:
        try:
            self._pipe.send(job)
        except OSError:
            raise WorkerLostError("its process ended") from None
        return self.answer()

    def stop(self) -> None:
        self._child.kill()

    def answer(self) -> bytes:
        """What the process sends next; raises the exception that it sends."""
        try:
            made: bytes | Exception = self._pipe.recv()
        except (EOFError, OSError):
            self._child.join(10)
            raise WorkerLostError(f"its process ended with {self._child.exitcode}") from None
        if isinstance(made, Exception):
            raise made
        return made


def _serve(pipe: Connection, device: str, opening: Opening, folder: Path) -> None:
    """In the child: say that it is ready, and render what comes."""
    if device:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    shutil.rmtree(folder, ignore_errors=True)  # of one that was lost
    folder.mkdir()
    try:
        renderer = Renderer(opening)
        pipe.send(b"")
        while True:
            job = pipe.recv()
            try:
                pipe.send(renderer.render(job, folder))
            except Exception as error:
                pipe.send(error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}"))
    except UserError as error:
        pipe.send(error)
    except EOFError:
        return


@contextmanager
def ray_workers(opening: Opening, address: str, count: int = 0) -> "Iterator[Workers]":
    """Actors of the Ray cluster at ``address``, or "auto"; the engines are there on every node.

    On GPU targets an actor takes a GPU, else an equal share of the cores. ``count`` 0: one per GPU, or per node.
    """
    import ray

    manifest = _checked(opening)
    try:
        if "://" not in address and ":" in address:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (OSError, ValueError) as error:  # ConnectionError among them
        raise UserError(f"Ray at {address}: {error}", "a running cluster", "run ray start --head") from None
    try:
        total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]  # type: ignore[no-untyped-call]
        on_gpu = _runs_on_gpu(manifest)
        count = count or (int(total.get("GPU", 0)) if on_gpu else len(nodes))
        if count < 1:
            raise UserError(
                f"a Ray cluster without GPUs for {opening.engines}", "one with GPUs", "build for --target cpu"
            )
        share = max(1, int(total.get("CPU", 1)) // count)
        needs = {"num_gpus": 1} if on_gpu else {"num_cpus": share}
        actor = ray.remote(_Actor)

        def open_worker(_index: int) -> Any:
            options = {**needs, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
            made = actor.options(**options).remote(replace(opening, threads=0 if on_gpu else share))
            return _on_ray(ray, made)

        yield Workers(count, manifest.own_sha256, open_worker, manifest, gpus=1 if on_gpu else 0)
    finally:
        ray.shutdown()


class _Actor:
    """In Ray: one renderer."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._renderer: Renderer | None = None

    def open(self) -> tuple[str, str]:
        """The node's name, and why it cannot render; "" if it can."""
        try:
            self._renderer = Renderer(self._opening)
        except UserError as error:
            return socket.gethostname(), error.found
        return socket.gethostname(), ""

    def render(self, job: Job) -> bytes:
        assert self._renderer is not None
        with scratch_folder("batch") as folder:  # the next one on this node removes what a killed actor leaves
            return self._renderer.render(job, folder)


@contextmanager
def _on_ray(ray: Any, actor: Any) -> "Iterator[Worker]":
    try:
        node, problem = ray.get(actor.open.remote(), timeout=START_S)
    except ray.exceptions.GetTimeoutError:
        raise UserError("an actor of Ray without a place", "free cores or GPUs", "start a node, or wait") from None
    except ray.exceptions.RayActorError as error:
        raise UserError(f"an actor of Ray ended: {error}", "a node that runs it", "see Ray's log") from None
    if problem:
        raise UserError(f"node {node}: {problem}", "the engines on every node", "copy them, or use shared storage")
    try:
        yield _RayWorker(ray, actor, f"{node}-{actor._actor_id.hex()[:8]}")
    finally:
        ray.kill(actor)


class _RayWorker:
    def __init__(self, ray: Any, actor: Any, name: str) -> None:
        self._ray, self._actor, self.name = ray, actor, name

    def stop(self) -> None:
        self._ray.kill(self._actor)

    def render(self, job: Job) -> bytes:
        try:
            made: bytes = self._ray.get(self._actor.render.remote(job))
        except self._ray.exceptions.RayActorError as error:
            raise WorkerLostError(str(error).strip().partition("\n")[0]) from None
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        return made
