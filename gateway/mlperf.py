"""The request of MLPerf's load generator for text to video (mlcommons/endpoints, ``api_type: videogen``)."""

from typing import Any

from gateway.api_error import invalid
from gateway.body import canonical
from gateway.served import ServedModel
from wan22.sampling import presets_for

PRESET = "mlperf"
DEFAULTS: dict[str, Any] = {
    "size": "720x1280", "seconds": 5.0, "fps": 16, "num_inference_steps": 20, "guidance_scale": 4.0,
    "guidance_scale_2": 3.0, "seed": 42,
}  # fmt: skip
TURNED = {"720x1280": "1280x720"}  # its size says height x width, its videos are 1280 wide
ANSWERS = ("video_bytes", "video_path")


def benchmark_values(given: dict[str, Any], model: ServedModel) -> tuple[dict[str, Any], bool]:
    """The canonical values, and whether the answer is to name the video in place of holding it.

    Raises:
        ApiError: a field is unknown or cannot be honoured.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    answer = asked.pop("response_format", "video_bytes")
    if answer not in ANSWERS:
        raise invalid("response_format", f"response_format {str(answer)[:40]!r} | expected one of {', '.join(ANSWERS)}")
    if "size" in asked:
        asked["size"] = TURNED.get(asked["size"], asked["size"]) if isinstance(asked["size"], str) else asked["size"]
    given_values, defaults = canonical(asked), canonical(DEFAULTS | {"size": TURNED[DEFAULTS["size"]]})
    if len(model.manifest.spec.experts) == 1:
        defaults.pop("guidance_scale_2", None)
    if "num_frames" in given_values:
        defaults.pop("seconds", None)
    usable = presets_for(model.manifest.spec.task)
    if PRESET in usable:
        defaults["preset"] = PRESET
    return defaults | given_values, answer == "video_path"
