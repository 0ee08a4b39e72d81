"""The official Wan2.2 code as a second reference: its wheel or the user's clone of it, run in a separate process.

The separate process keeps its imports and its packages, named ``wan``, away from ours. The code runs in float32 on the
CPU with weights from the same checkpoint under their official names. This project contains none of that code.
"""

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Self

from export.checkpoint.checkpoint import Checkpoint
from runtime.request import CompleteRequest
from validate.reference.checkpoint import stated_boundary
from validate.reference.official_modules import check_clone
from validate.reference.official_pipelines import Pipelines, WholeRun
from validate.reference.parts import F32, I64
from validate.reference.reference import NO_IMAGE, ImageInputs
from validate.reference.whole_run import ReferenceStep, guided_run
from wan22.errors import UserError

SOLVERS = ("unipc", "dpm++")  # all that the official code has

_modules: list[Pipelines] = []  # set only in the other process


def version_of(repo: Path) -> str:
    """The release of the wheel at ``repo`` or the commit checked out there, twelve digits; "" if neither is known."""
    for info in repo.glob("wan22-*.dist-info"):
        return info.stem.replace("-", " ")
    if not (repo / ".git").exists():  # git would answer for an enclosing repository
        return ""
    try:
        asked = subprocess.run(
            ["git", "-C", str(repo), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return f"commit {asked.stdout.strip()}" if asked.returncode == 0 else ""


def can_run(request: CompleteRequest) -> bool:
    """True if the official code supports the solver and schedule of the requested run; it has no step cache."""
    known = request.solver in SOLVERS and request.schedule == "official" and not request.sigmas
    return known and request.cache is None


def can_generate(request: CompleteRequest) -> bool:
    """True if the official pipelines can be called with ``request``: they draw the noise and fit the picture."""
    changed = request.noise is not None or request.last_image is not None or request.switch_step is not None
    return can_run(request) and not changed and (request.image is None or request.fit == "official")


class Official:
    """The interface of :class:`validate.reference.reference.Reference`, computed by the code at ``repo``.

    A context manager. Raises UserError if ``repo`` is not a clone or its dependencies are missing.
    """

    def __init__(self, repo: Path, checkpoint: Checkpoint) -> None:
        check_clone(repo)
        self.spec, self.boundary, self._repo = checkpoint.spec, stated_boundary(checkpoint), repo
        spawned = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, spawned, _leave_at_ctrl_c)
        self._arguments = (repo.resolve(), checkpoint)

    def __enter__(self) -> Self:
        try:
            self._process.submit(_open, *self._arguments).result()
        except BaseException:
            self._process.shutdown(cancel_futures=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown(cancel_futures=True)

    def token_ids(self, prompt: str) -> I64:
        ids: I64 = self._ask("token_ids", prompt)
        return ids

    def embeddings(self, token_ids: I64) -> F32:
        return self._array("embeddings", token_ids)

    def velocity(
        self, expert: str, latents: F32, timestep: float, text: F32, image_inputs: ImageInputs = NO_IMAGE
    ) -> F32:
        given = (image_inputs.condition, image_inputs.first_frame)
        return self._array("velocity", expert, latents, timestep, text, *given)

    def encode(self, video: F32) -> F32:
        return self._array("encode", video)

    def decode(self, latents: F32) -> F32:
        return self._array("decode", latents)

    def sigmas_and_timesteps(self, request: CompleteRequest) -> tuple[F32, I64]:
        """Sigmas [N+1] and timesteps [N]; starts a run in the other process. ``can_run`` must hold."""
        sigmas, timesteps = self._ask("start_run", request.solver, request.steps, request.shift)
        return sigmas, timesteps

    def run(
        self, request: CompleteRequest, text: F32, negative: F32 | None, image_inputs: ImageInputs = NO_IMAGE
    ) -> Iterator[ReferenceStep]:
        """Run :func:`validate.reference.whole_run.guided_run` with the official models and solver."""

        def step(velocity: F32, index: int, latents: F32) -> F32:
            return self._array("step", velocity, index, latents)

        timesteps = self.sigmas_and_timesteps(request)[1].tolist()
        return guided_run(self, request, timesteps, step, (text, negative), image_inputs)

    def generate(self, request: CompleteRequest) -> F32:
        """Frames ``[1, 3, F, H, W]`` of the official pipeline. ``can_generate`` must hold."""
        boundary = self.boundary if request.boundary is None else request.boundary
        run = WholeRun(
            request.prompt,
            request.negative_prompt,
            request.image,
            (request.width, request.height),
            request.frames,
            request.steps,
            request.shift,
            request.solver,
            request.seed,
            request.guidance,
            boundary,
        )
        return self._array("generate", run)

    def _array(self, method: str, *arguments: Any) -> F32:
        array: F32 = self._ask(method, *arguments)
        return array

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return self._process.submit(_call, method, arguments).result()
        except BrokenProcessPool:
            found = f"the process of {self._repo} was killed during {method}"
            raise UserError(found, "memory for its float32 weights", "use a machine with more memory") from None


def _leave_at_ctrl_c() -> None:
    """Exit silently on Ctrl-C: the terminal interrupts both processes, and the main one reports it."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def _open(repo: Path, checkpoint: Checkpoint) -> None:
    _modules.append(Pipelines(repo, checkpoint))


def _call(method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_modules[0], method)(*arguments)
