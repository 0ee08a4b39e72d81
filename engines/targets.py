"""The GPUs that engines are made for, and the figures that plans and rooflines are computed from.

Peaks are dense (never "with sparsity") with float32 accumulation, which is what the builders choose: GeForce cards run
FP8 with float32 accumulation at half the rate that is advertised. Where a vendor prints only the sparse figure, the
dense one is half of it. Memory is the nominal capacity; drivers and ECC keep a few per cent of it for themselves.
"""

import re
import subprocess
from dataclasses import dataclass

from wan22.backends import Backend
from wan22.errors import UserError
from wan22.specs import Number, Precision

QUERY_GPU = ("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")
_NOT_A_VARIANT = "(?! (Ti|D|Laptop|Mobile))"  # chips of their own that share a name


@dataclass(frozen=True)
class Target:
    name: str
    product: str  # contained in the name that nvidia-smi gives the GPU
    backend: Backend
    compute_capability: str  # "8.9"; "" where there is none
    memory_gib: float
    bandwidth_gb_s: float
    # dense peaks in TFLOPS, float32 accumulation; None: the hardware has no such units, or no figure is known
    fp32_tflops: float | None
    bf16_tflops: float | None
    fp8_tflops: float | None
    source: str

    @property
    def sm(self) -> str:
        """The builders' name of the compute capability: ``SM89``."""
        return "SM" + self.compute_capability.replace(".", "")

    @property
    def numbers(self) -> tuple[Number, ...]:
        """What its matrix multiplications take."""
        if self.backend == "onnxruntime":
            return (Number.FP32, Number.FP16)  # its CPU kernels know neither bfloat16 nor fast FP8
        sixteen = (Number.FP32, Number.BF16, Number.FP16)
        return (*sixteen, Number.FP8) if self.fp8_tflops else sixteen

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return tuple(p for p in Precision if {p.linears, p.attention} <= set(self.numbers))

    def peak_tflops(self, number: Number) -> float | None:
        """Dense peak of matrix multiplications of such operands."""
        sixteen = self.bf16_tflops
        by_number = {Number.FP32: self.fp32_tflops, Number.FP16: sixteen, Number.BF16: sixteen}
        return (by_number | {Number.FP8: self.fp8_tflops})[number]


_AMPERE, _ADA = "NVIDIA Ampere GA102 whitepaper 2.1", "NVIDIA Ada GPU Architecture whitepaper 2.02"
_TABLE = (
    Target(
        "a100", "A100", "tensorrt", "8.0", 80, 2039, 19.5, 312, None,
        "NVIDIA A100 80GB SXM datasheet",
    ),
    Target(
        "l40s", "L40S", "tensorrt", "8.9", 48, 864, 91.6, 362, 733,
        "NVIDIA L40S datasheet",
    ),
    Target(
        "l4", "L4", "tensorrt", "8.9", 24, 300, 30.3, 121, 242.5,
        "NVIDIA L4 datasheet (242 and 485 with sparsity, halved)",
    ),
    Target(
        "h100", "H100", "tensorrt", "9.0", 80, 3350, 67, 989.5, 1979,
        "NVIDIA H100 SXM datasheet (1979 and 3958 with sparsity, halved)",
    ),
    Target(
        "h200", "H200", "tensorrt", "9.0", 141, 4800, 67, 989.5, 1979,
        "NVIDIA H200 SXM datasheet (1979 and 3958 with sparsity, halved)",
    ),
    Target(
        "b200", "B200", "tensorrt", "10.0", 180, 7700, 75, 2250, 4500,
        "NVIDIA Blackwell datasheet, HGX B200 per GPU (4.5 and 9 PFLOPS with sparsity, halved)",
    ),
    Target(
        "rtx3090", "GeForce RTX 3090", "tensorrt-rtx", "8.6", 24, 936, 35.6, 71, None,
        f"{_AMPERE}, table 9",
    ),
    Target(
        "rtx4090", "GeForce RTX 4090", "tensorrt-rtx", "8.9", 24, 1008, 82.6, 165.2, 330.3,
        f"{_ADA}, appendix A (FP8 with FP32 accumulate)",
    ),
    Target(
        "rtx5090", "GeForce RTX 5090", "tensorrt-rtx", "12.0", 32, 1792, 104.8, 209.5, 419,
        "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A (FP8 with FP32 accumulate)",
    ),
    Target(
        "rtx-pro-6000-blackwell", "RTX PRO 6000 Blackwell", "tensorrt-rtx", "12.0", 96, 1792, 126, 503.8, 1007.6,
        "NVIDIA RTX Blackwell PRO GPU Architecture whitepaper, Workstation Edition",
    ),
    Target(
        "gb10", "GB10", "tensorrt", "12.1", 128, 273, 31, 125, 250,
        "NVIDIA DGX Spark datasheet: 1 PFLOPS FP4 with sparsity; BF16 and FP8 derived as its 1/8 and 1/4",
    ),
    Target(
        "cpu", "", "onnxruntime", "", 0, 0, None, None, None,
        "no figures: the reference backend",
    ),
)  # fmt: skip
TARGETS = {target.name: target for target in _TABLE}


def target_named(name: str) -> Target:
    """The target called ``name``; ``auto`` is the one in this machine.

    Raises:
        UserError: an unknown name, or a machine whose GPU is not in the table.
    """
    if name == "auto":
        return detect(_gpus())
    if name not in TARGETS:
        raise UserError(f"target {name!r}", f"one of {', '.join(TARGETS)}, auto", "name one of them with --target")
    return TARGETS[name]


def check_precision(target: Target, precision: Precision) -> None:
    """Refuses a precision that ``target`` cannot compute in, naming the next best one."""
    if precision in target.precisions:
        return
    instead = precision.wide if precision.wide in target.precisions else Precision.FP32
    units = f"compute capability {target.compute_capability} has no {precision.linears.upper()} units"
    why = units if precision.quantised else "not computed there"
    if target.backend == "onnxruntime":
        why = "ONNX Runtime does not compute it on a CPU"
    allowed = ", ".join(target.precisions)
    raise UserError(f"precision {precision} for {target.name} ({why})", allowed, f"use --precision {instead}")


def detect(gpus: list[tuple[str, str]]) -> Target:
    """The target for a machine with these GPUs (name, compute capability); the first counts, none means ``cpu``."""
    if not gpus:
        return TARGETS["cpu"]
    name, capability = gpus[0]
    for target in _TABLE:
        if target.product and re.search(rf"\b{target.product}\b{_NOT_A_VARIANT}", name):
            return target
    alike = [target for target in _TABLE if target.compute_capability == capability]
    alike.sort(key=lambda target: (target.backend == "tensorrt-rtx") != ("RTX" in name))
    remedy = f"--target {alike[0].name} has its compute capability" if alike else "choose a GPU of the table"
    raise UserError(f"GPU {name!r} (compute capability {capability})", f"one of {', '.join(TARGETS)}", remedy)


def _gpus() -> list[tuple[str, str]]:
    """Names and compute capabilities of this machine's GPUs; empty where there is no working driver."""
    try:
        answer = subprocess.run(QUERY_GPU, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.rsplit(",", 1) for line in answer.stdout.splitlines() if "," in line]
    return [(name.strip(), capability.strip()) for name, capability in lines]
