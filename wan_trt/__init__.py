"""Wan2.2 from PyTorch checkpoints to ONNX, engines and Triton: the command line and the public names.

``wan_trt.export_checkpoint``, ``build_engines``, ``calibrate``, ``apply_lora``, ``pack``, ``Pipeline``, ``generate``,
``validate`` and ``synthesise`` are the functions behind the subcommands. They load on first use, so importing this
package is cheap. ``__version__`` is the version of the installed package.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "ApplyOptions": "wan_trt.recipes.apply_lora",
    "BlockOptions": "runtime.block_backend",
    "BuildOptions": "engines.build",
    "Caching": "wan22.caching",
    "CalibrateOptions": "wan_trt.recipes.calibrate",
    "ExportOptions": "export.options",
    "LoraChoice": "export.lora.merge",
    "Pipeline": "runtime.pipeline",
    "Precision": "wan22.precision",
    "Request": "runtime.request",
    "SPECS": "wan22.specs",
    "UserError": "wan22.errors",
    "ValidateOptions": "validate",
    "apply_lora": "wan_trt.recipes.apply_lora",
    "build_engines": "engines.build",
    "calibrate": "wan_trt.recipes.calibrate",
    "export_checkpoint": "export.exporter",
    "generate": "runtime.generate",
    "pack": "wan_trt.recipes.pack",
    "synthesise": "export.synth.checkpoint",
    "validate": "validate",
}
__all__ = sorted(_WHERE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from wan22 import version

        return version()
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
