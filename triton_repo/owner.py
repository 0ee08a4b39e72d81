"""The Triton model that owns the engines and runs one job at a time. Only Triton's stub can import this module.

``execute`` is synchronous, because Triton counts a request as queued until ``execute`` takes it: an asynchronous one
would empty the queue into this process and defeat its size limit, priorities and timeouts. With an expert on each of
several devices it returns when its job has passed to the last one (:mod:`triton_repo.relay`).
"""

import json
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from runtime.request import CompleteRequest
from triton_repo.failure import Failure
from triton_repo.job import Answer, CancelledError, Job, OutOfTimeError
from triton_repo.job_request import parse_request
from triton_repo.loading import load
from triton_repo.metrics import Heartbeat, Kind, Metrics, Outcome
from triton_repo.model_status import StatusFile, end_with_server
from triton_repo.probe import MAX_FAILURES
from triton_repo.served_pipeline import ServedPipeline, go_on
from triton_repo.settings import Settings
from wan22.errors import NonFiniteError, UserError

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Owner:
    """A Triton model: ``initialize`` is called once, ``execute`` with requests, ``finalize`` at the end."""

    def initialize(self, args: dict[str, str]) -> None:
        end_with_server()
        self.status = StatusFile(args["model_name"])
        config = json.loads(args["model_config"])
        try:
            self.settings = Settings.read({k: v["string_value"] for k, v in config["parameters"].items()})
            self.pipeline = self.open()
        except UserError as error:
            self.status.failed(error.found, error.expected, error.remedy)
            raise pb_utils.TritonModelException(str(error)) from None
        except NonFiniteError as error:
            self.status.failed(str(error), "finite numbers", "run wan-trt validate to find the cause")
            raise pb_utils.TritonModelException(str(error)) from None
        self.metrics = Metrics(_family, args["model_name"], self.pipeline)
        self.heartbeat = Heartbeat(self.metrics.beat)
        self.heartbeat.start()
        self.jobs = 0
        pb_utils.Logger.log_info(f"{args['model_name']}: {self.settings.model} from {self.settings.engines}")

    def open(self) -> ServedPipeline:
        return load(self.settings)

    def is_ready(self) -> bool:
        """True if the model accepts jobs; Triton 26.03 and later call this."""
        draining = self.settings.drain_flag and Path(self.settings.drain_flag).exists()
        return not draining and self.metrics.failures_in_a_row < MAX_FAILURES

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            if self.pipeline.relay is None:
                self._serve(request)
            else:
                self.pipeline.relay.run(partial(self._serve, request))

    def finalize(self) -> None:
        if self.pipeline.relay is not None:
            self.pipeline.relay.wait()
        self.heartbeat.stop()
        self.pipeline.__exit__(None, None, None)

    def _serve(self, request: Any) -> None:
        sender = request.get_response_sender()
        self.jobs += 1
        name = request.request_id() or str(self.jobs)
        in_events = pb_utils.get_input_tensor_by_name(request, "errors_as_events")
        wants_events = in_events is not None and bool(in_events.as_numpy().any())
        self.metrics.began()
        self.status.began(name)
        outcome, last = self._outcome(name, request, sender)
        self.pipeline.pause = go_on
        self.metrics.ended(outcome, lost=self._lost)
        pb_utils.Logger.log_info(f"job {name}: {outcome}")
        sender.send(_last_response(last, wants_events=wants_events), flags=FINAL)
        self.status.ended(name)

    @property
    def _lost(self) -> bool:
        """True if a device of several has failed, so that no further job can succeed."""
        group = self.pipeline.backend.group
        return group is not None and bool(group.closed)

    def _outcome(self, name: str, request: Any, sender: Any) -> tuple[Outcome, Answer | Failure]:
        """The outcome of the job and the last response to its client, for every kind of failure."""
        try:
            return "done", self._run(name, request, sender)
        except UserError as error:
            lost = Failure("INTERNAL", error.found, error.expected, error.remedy)
            return ("failed", lost) if self._lost else ("refused", Failure.of(error))
        except CancelledError:
            return "cancelled", Failure("CANCELLED", "cancelled")
        except OutOfTimeError as error:
            return "out_of_time", Failure(error.code, str(error))
        except NonFiniteError as error:
            pb_utils.Logger.log_error(f"job {name}: {error}")
            return "failed", Failure("INTERNAL", str(error), "finite numbers", "see the server's log")
        except Exception as error:  # a bug or a broken device: only the log gets the reason
            pb_utils.Logger.log_error(f"job {name}: {traceback.format_exc()}")
            # MemoryError is of the device too: CuPy raises a kind of it
            found = "out of memory" if isinstance(error, MemoryError) else "the job failed"
            return "failed", Failure("INTERNAL", found, "a video", "see the server's log")

    def _run(self, name: str, request: Any, sender: Any) -> Answer:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        manifest, limits = self.pipeline.bundle.manifest, self.settings.limits
        asked = parse_request(tensors, manifest, limits, self.pipeline.weight_sets.names)

        def send(answer: Answer) -> None:
            self.metrics.got_on()
            sender.send(_response(answer))

        return Job(
            self.pipeline,
            asked,
            send=send,
            is_cancelled=sender.is_cancelled,
            longest_s=limits.longest_job_s,
            on_step=self.metrics.step,
            facts={"job": name, "cut": self._cut(asked.request)},
        ).run()

    def _cut(self, request: CompleteRequest) -> list[str]:
        """The names of prompts with too many tokens. Raises UserError for a prompt that is empty after cleaning."""
        encode = self.pipeline.tokenizer.encode
        cut = {
            "prompt": encode(request.prompt).truncated,
            "negative_prompt": encode(request.negative_prompt, allow_empty=True).truncated,
        }
        return [name for name, truncated in cut.items() if truncated]


def _response(answer: Answer) -> Any:
    tensors = (pb_utils.Tensor(name, np.asarray(value)) for name, value in answer.tensors().items())
    return pb_utils.InferenceResponse(list(tensors))


def _last_response(last: Answer | Failure, *, wants_events: bool) -> Any:
    if isinstance(last, Answer):
        return _response(last)
    if wants_events:
        return _response(Answer(last.event()))
    names = {"INVALID_ARGUMENT": "INVALID_ARG", "DEADLINE_EXCEEDED": "UNAVAILABLE"}  # Triton has no code for deadlines
    code = getattr(pb_utils.TritonError, names.get(last.code, last.code))
    return pb_utils.InferenceResponse([], error=pb_utils.TritonError(last.message, code))


def _family(name: str, description: str, kind: Kind) -> Any:
    kinds = {"counter": pb_utils.MetricFamily.COUNTER, "gauge": pb_utils.MetricFamily.GAUGE}
    return pb_utils.MetricFamily(name=name, description=description, kind=kinds[kind])
