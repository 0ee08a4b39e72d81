"""The model that Triton runs: it owns the engines and does one job at a time. Imported inside Triton's stub only.

``execute`` stays synchronous, because Triton counts a request as queued only until ``execute`` has returned for it: an
asynchronous one would empty the queue into this process, and size, priorities and timeouts would mean nothing.
"""

import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from triton_repo.job import Answer, CancelledError, Job, OutOfTimeError
from triton_repo.loading import load
from triton_repo.metrics import Heartbeat, Kind, Metrics, Outcome
from triton_repo.served_pipeline import ServedPipeline, go_on
from triton_repo.settings import Settings
from triton_repo.wanted import wanted
from wan22.errors import NonFiniteError, UserError

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
MAX_MESSAGE = 400  # characters of a request that a refusal may repeat


class Owner:
    """Triton calls ``initialize`` once, ``execute`` with requests, ``finalize`` at the end."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        try:
            self.settings = Settings.read({k: v["string_value"] for k, v in config["parameters"].items()})
            self.pipeline = self.open()
        except (UserError, NonFiniteError) as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self.metrics = Metrics(_family, args["model_name"], self.pipeline)
        self.heartbeat = Heartbeat(self.metrics.heartbeat.set)
        self.heartbeat.start()
        pb_utils.Logger.log_info(f"{args['model_name']}: {self.settings.model} from {self.settings.engines}")

    def open(self) -> ServedPipeline:
        return load(self.settings)

    def is_ready(self) -> bool:
        """Asked for readiness by Triton 26.03 and later."""
        return not (self.settings.drain_flag and Path(self.settings.drain_flag).exists())

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._serve(request)

    def finalize(self) -> None:
        self.heartbeat.stop()
        self.pipeline.__exit__(None, None, None)

    def _serve(self, request: Any) -> None:
        sender = request.get_response_sender()
        self.metrics.began()
        outcome, response = self._outcome(request, sender)
        self.pipeline.pause = go_on
        self.metrics.ended(outcome)
        pb_utils.Logger.log_info(f"job {request.request_id() or '-'}: {outcome}")
        sender.send(response, flags=FINAL)

    def _outcome(self, request: Any, sender: Any) -> tuple[Outcome, Any]:
        """How the job ended, and its last response; whatever happens, there is one."""
        try:
            return "done", _response(self._run(request, sender))
        except UserError as error:
            return "refused", _error(str(error), pb_utils.TritonError.INVALID_ARG)
        except CancelledError:
            return "cancelled", _error("cancelled", pb_utils.TritonError.CANCELLED)
        except OutOfTimeError as error:
            return "out_of_time", _error(str(error), pb_utils.TritonError.UNAVAILABLE)
        except NonFiniteError as error:
            pb_utils.Logger.log_error(str(error))
            return "failed", _error(str(error), pb_utils.TritonError.INTERNAL)
        except Exception:  # a bug or a broken device: the reason is for the log, not for strangers
            pb_utils.Logger.log_error(traceback.format_exc())
            return "failed", _error("the job failed, see the server's log", pb_utils.TritonError.INTERNAL)

    def _run(self, request: Any, sender: Any) -> Answer:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        manifest, limits = self.pipeline.bundle.manifest, self.settings.limits
        asked = wanted(tensors, manifest, limits)
        self.pipeline.tokenizer.encode(asked.request.prompt)  # refuses a prompt that cleaning leaves nothing of
        return Job(
            self.pipeline,
            asked,
            send=lambda answer: self._tell(sender, answer),
            is_cancelled=sender.is_cancelled,
            longest_s=limits.longest_job_s,
            on_step=self.metrics.step,
        ).run()

    def _tell(self, sender: Any, answer: Answer) -> None:
        self.metrics.got_on()
        sender.send(_response(answer))


def _response(answer: Answer) -> Any:
    tensors = (pb_utils.Tensor(name, np.asarray(value)) for name, value in answer.tensors().items())
    return pb_utils.InferenceResponse(list(tensors))


def _error(message: str, code: Any) -> Any:
    short = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…"
    return pb_utils.InferenceResponse([], error=pb_utils.TritonError(short, code))


def _family(name: str, told: str, kind: Kind) -> Any:
    kinds = {"counter": pb_utils.MetricFamily.COUNTER, "gauge": pb_utils.MetricFamily.GAUGE}
    return pb_utils.MetricFamily(name=name, description=told, kind=kinds[kind])
