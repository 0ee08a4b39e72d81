"""``config.pbtxt`` of the served model, made with Triton's protobufs so that no field can be misspelt.

``max_batch_size: 0`` with ``dynamic_batching`` does not batch; it gives the model Triton's bounded queue with
priorities and timeouts. The queue works only while ``execute`` is synchronous.
"""

from typing import Any

from triton_repo.schema import INPUTS, OUTPUTS, Field
from triton_repo.settings import Settings

PRIORITIES = 2  # 1 runs first; 2 is the default
MICROSECONDS = 1_000_000


def owner_config(name: str, settings: Settings, *, on_gpu: bool, devices: int = 1) -> Any:
    """The ``ModelConfig`` of a model that answers requests of ``schema.INPUTS``, on so many ``devices``."""
    from tritonclient.grpc import model_config_pb2

    config = model_config_pb2.ModelConfig(name=name, backend="python", max_batch_size=0)
    config.model_transaction_policy.decoupled = True
    for field in INPUTS:
        config.input.add(optional=True, **_tensor(field))  # the model itself refuses missing inputs, and counts them
    for field in OUTPUTS:
        config.output.add(**_tensor(field))
    add_instance(config, on_gpu=on_gpu, devices=devices)
    _queue(config.dynamic_batching, settings)
    for key, value in settings.parameters().items():
        config.parameters[key].string_value = value
    return config


def as_text(config: Any) -> str:
    from google.protobuf import text_format  # type: ignore[import-untyped]

    return str(text_format.MessageToString(config))


def add_instance(config: Any, *, on_gpu: bool, devices: int = 1) -> None:
    """One instance, on the first visible GPU: a second one would hold the weights twice.

    A model on several GPUs opens them itself: for each that is named here, Triton would start an instance.
    """
    group = config.instance_group.add(count=1)
    group.kind = group.KIND_GPU if on_gpu else group.KIND_CPU
    if on_gpu and devices > 1:
        group.kind = group.KIND_MODEL
    elif on_gpu:
        group.gpus.append(0)


def _tensor(field: Field) -> dict[str, Any]:
    from tritonclient.grpc import model_config_pb2

    return {
        "name": field.name,
        "data_type": model_config_pb2.DataType.Value(f"TYPE_{field.dtype}"),
        "dims": [field.length],
    }


def _queue(batching: Any, settings: Settings) -> None:
    """Set up the queue. Clients can shorten a timeout only if a default is set."""
    batching.priority_levels = batching.default_priority_level = PRIORITIES
    policy = batching.default_queue_policy
    policy.timeout_action = policy.REJECT
    policy.default_timeout_microseconds = settings.limits.queue_timeout_s * MICROSECONDS
    policy.allow_timeout_override = True
    policy.max_queue_size = settings.limits.max_queue_size
