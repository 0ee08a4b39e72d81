"""The GPUs that engines are built for, with the figures behind plans and rooflines.

Peaks are dense (never "with sparsity") with float32 accumulation, which the builders choose: GeForce cards run FP8 with
float32 accumulation at half the advertised rate, but INT8, which is added up in int32, at twice the rate of that. If a
vendor prints only the sparse figure, the dense one is half of it. Memory is the nominal capacity; drivers and ECC use a
few per cent of it.
"""

import re
import subprocess
from dataclasses import dataclass, replace

from wan22.backends import Backend
from wan22.bundle import Manifest
from wan22.errors import UserError
from wan22.precision import Number, Precision

QUERY_GPU = ("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")
_NOT_A_VARIANT = "(?![ -](Ti|SUPER|Super|D|Laptop|Mobile|3e))"  # other chips or boards that share a name
FIRST_FP8 = (8, 9)  # compute capability
WITH_FP4 = ((10, 0), (10, 3), (12, 0), (12, 1))  # compute capabilities
FIRST_FLASH = "8.0"  # compute capability of ONNX Runtime's flash attention
FIRST_PCIE_5 = (9, 0)  # compute capability
LANES = {"rtx4060": 8}  # of PCIe, other than 16
UNIFIED = ("gb10",)  # host and GPU share one memory
RTX_CAPABILITIES = ("8.6", "8.9", "12.0")  # supported by TensorRT-RTX, which builds for them without a GPU
TENSORRT_CAPABILITIES = ("8.0", "9.0", "10.0", "10.3", "11.0", "12.1")


@dataclass(frozen=True)
class Target:
    name: str
    product: str  # part of the GPU's name in nvidia-smi
    backend: Backend
    compute_capability: str  # "8.9"; "" for a CPU
    memory_gib: float
    bandwidth_gb_s: float
    # dense peaks in TFLOPS, float32 or int32 accumulation; None: no such units, or no figure is known
    fp32_tflops: float | None
    bf16_tflops: float | None
    fp8_tflops: float | None
    int8_tflops: float | None
    fp4_tflops: float | None  # NVFP4
    source: str

    @property
    def sm(self) -> str:
        """The builders' name for the compute capability: ``SM89``."""
        return "SM" + self.compute_capability.replace(".", "")

    @property
    def bus_gb_s(self) -> float:
        """GB/s from pinned host memory: about 80 % of PCIe 4 or 5 with 16 lanes, or of the lanes that a card has."""
        if not self.compute_capability or self.name in UNIFIED:
            return self.bandwidth_gb_s
        of_generation = 50.0 if self._capability >= FIRST_PCIE_5 else 25.0
        return of_generation * LANES.get(self.name, 16) / 16

    @property
    def numbers(self) -> tuple[Number, ...]:
        """The number types of its matrix multiplications."""
        if self.backend == "onnxruntime":
            return (Number.FP32, Number.FP16)  # its CPU kernels support neither bfloat16 nor fast FP8
        if self.backend == "onnxruntime-gpu":
            return (Number.BF16, Number.FP16)  # its flash attention takes 16 bits, its products have no FP8
        always = (Number.FP32, Number.BF16, Number.FP16, Number.INT8)
        found = (*always, Number.FP8) if self._capability >= FIRST_FP8 else always
        return (*found, Number.NVFP4) if self._capability in WITH_FP4 else found

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return tuple(p for p in Precision if {p.linears, p.attention} <= set(self.numbers))

    @property
    def default_precision(self) -> Precision:
        return Precision.FP32 if self.backend == "onnxruntime" else Precision.BF16

    @property
    def recommended_precision(self) -> Precision:
        """The precision of the highest peaks, of several alike the one that errs least; the default without figures."""

        def by_peaks(precision: Precision) -> tuple[float, float, int]:
            linears, attention = map(self.peak_tflops, (precision.linears, precision.attention))
            return -(linears or 0.0), -(attention or 0.0), -precision.linears.significand

        accurate = [p for p in self.precisions if p.linears is not Number.NVFP4]  # chosen for its memory
        return min(accurate, key=by_peaks) if self.bf16_tflops else self.default_precision

    def text_encoder_precision(self, precision: Precision) -> Precision:
        """The text encoder's precision if the model is in ``precision``: TensorRT-RTX lacks its float32 attention."""
        if precision.wide == Precision.FP32 and self.backend == "tensorrt-rtx":
            return Precision.BF16
        return precision.wide

    @property
    def _capability(self) -> tuple[int, ...]:
        return tuple(map(int, self.compute_capability.split(".")))

    def peak_tflops(self, number: Number) -> float | None:
        """The dense peak of matrix multiplications with operands of this type."""
        sixteen = self.bf16_tflops
        by_number = {Number.FP32: self.fp32_tflops, Number.FP16: sixteen, Number.BF16: sixteen}
        quantised = {Number.FP8: self.fp8_tflops, Number.INT8: self.int8_tflops, Number.NVFP4: self.fp4_tflops}
        return (by_number | quantised)[number]


_AMPERE, _ADA = "NVIDIA Ampere GA102 whitepaper 2.1", "NVIDIA Ada GPU Architecture whitepaper 2.02"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper"
_TABLE = (
    Target("a100", "A100", "tensorrt", "8.0", 80, 2039, 19.5, 312, None, 624, None,
        "NVIDIA A100 80GB SXM datasheet (INT8 624 without sparsity)"),
    Target("a10g", "A10G", "tensorrt", "8.6", 24, 600, 31.5, 70, None, 140, None,
        "NVIDIA A10G datasheet (BF16 140 and INT8 280 with sparsity, halved)"),
    Target("l40", "L40", "tensorrt", "8.9", 48, 864, 90.5, 181, 362, 362, None,
        "NVIDIA L40 datasheet (BF16 362, FP8 and INT8 724 with sparsity, halved)"),
    Target("l40s", "L40S", "tensorrt", "8.9", 48, 864, 91.6, 362, 733, 733, None,
        "NVIDIA L40S datasheet"),
    Target("l4", "L4", "tensorrt", "8.9", 24, 300, 30.3, 121, 242.5, 242.5, None,
        "NVIDIA L4 datasheet (242 and 485 with sparsity, halved)"),
    Target("h100", "H100", "tensorrt", "9.0", 80, 3350, 67, 989.5, 1979, 1979, None,
        "NVIDIA H100 SXM datasheet (1979 and 3958 with sparsity, halved)"),
    Target("h20", "H20", "tensorrt", "9.0", 96, 4000, 44, 148, 296, 296, None,
        "NVIDIA H20 product brief (dense)"),
    Target("h200", "H200", "tensorrt", "9.0", 141, 4800, 67, 989.5, 1979, 1979, None,
        "NVIDIA H200 SXM datasheet (1979 and 3958 with sparsity, halved)"),
    Target("b200", "B200", "tensorrt", "10.0", 180, 7700, 75, 2250, 4500, 4500, 9000,
        "NVIDIA Blackwell datasheet, HGX B200 per GPU (BF16 4.5, FP8 and INT8 9, FP4 18 PFLOPS with sparsity, halved)"),
    Target("rtx3090", "GeForce RTX 3090", "tensorrt-rtx", "8.6", 24, 936, 35.6, 71, None, 284, None,
        f"{_AMPERE}, table 9"),
    Target("rtx4090", "GeForce RTX 4090", "tensorrt-rtx", "8.9", 24, 1008, 82.6, 165.2, 330.3, 660.6, None,
        f"{_ADA}, appendix A (FP8 with FP32 accumulate, INT8)"),
    Target("rtx4080", "GeForce RTX 4080", "tensorrt-rtx", "8.9", 16, 716.8, 48.7, 97.5, 194.9, 389.9, None,
        f"{_ADA}, GeForce RTX 4080 (FP8 with FP32 accumulate, INT8)"),
    Target("rtx4070ti", "GeForce RTX 4070 Ti", "tensorrt-rtx", "8.9", 12, 504.2, 40.1, 80.2, 160.4, 320.8, None,
        "NVIDIA GeForce RTX 4070 Ti specifications: 7680 cores at 2.61 GHz; tensor cores in the ratio of the RTX 4090"),
    Target("rtx4070", "GeForce RTX 4070", "tensorrt-rtx", "8.9", 12, 504.2, 29.1, 58.2, 116.4, 232.8, None,
        "NVIDIA GeForce RTX 4070 specifications: 5888 cores at 2.475 GHz; tensor cores in the ratio of the RTX 4090"),
    Target("rtx4060", "GeForce RTX 4060", "tensorrt-rtx", "8.9", 8, 272, 15.1, 30.2, 60.4, 120.8, None,
        "NVIDIA GeForce RTX 4060 specifications: 3072 cores at 2.46 GHz; tensor cores in the ratio of the RTX 4090"),
    Target("rtx5090", "GeForce RTX 5090", "tensorrt-rtx", "12.0", 32, 1792, 104.8, 209.5, 419, 838, 1676,
        f"{_BLACKWELL}, appendix A (FP8 and FP4 with FP32 accumulate, INT8)"),
    Target("rtx5080", "GeForce RTX 5080", "tensorrt-rtx", "12.0", 16, 960, 56.3, 112.6, 225.1, 450.2, 900.4,
        f"{_BLACKWELL}, GeForce RTX 5080 (FP8 and FP4 with FP32 accumulate, INT8)"),
    Target("rtx5070", "GeForce RTX 5070", "tensorrt-rtx", "12.0", 12, 672, 30.9, 61.8, 123.5, 247, 494,
        "NVIDIA GeForce RTX 5070 specifications: 6144 cores at 2.512 GHz; tensor cores in the ratio of the RTX 5090"),
    Target("rtx-pro-6000-blackwell", "RTX PRO 6000 Blackwell", "tensorrt-rtx", "12.0", 96, 1792, 126, 503.8, 1007.6,
        1007.6, 2015.2,
        "NVIDIA RTX Blackwell PRO GPU Architecture whitepaper, Workstation Edition"),
    Target("gb10", "GB10", "tensorrt", "12.1", 128, 273, 31, 125, 250, 250, 500,
        "NVIDIA DGX Spark datasheet: 1 PFLOPS FP4 with sparsity, halved; FP8 and INT8 derived as half, BF16 a quarter"),
    Target("cpu", "", "onnxruntime", "", 0, 0, None, None, None, None, None,
        "no figures: the reference backend"),
)  # fmt: skip
TARGETS = {target.name: target for target in _TABLE}


def _generic(capability: str, backend: Backend) -> Target:
    """Any GPU of one compute capability: the same engines, but unknown memory and speed."""
    name = f"sm{capability.replace('.', '')}"
    source = "no figures: any GPU of its compute capability"
    return Target(name, "", backend, capability, 0, 0, None, None, None, None, None, source)


_BY_CAPABILITY = {
    target.name: target
    for target in (
        *(_generic(capability, "tensorrt-rtx") for capability in RTX_CAPABILITIES),
        *(_generic(capability, "tensorrt") for capability in TENSORRT_CAPABILITIES),
    )
}


ON_CUDA = "cuda"  # ONNX Runtime's CUDA provider: "cuda" on any GPU, "cuda:h100" with the figures of one


def _on_cuda(card: str) -> Target | None:
    """ONNX Runtime on the GPU ``card`` of the table, or on any GPU without one; None if it is unknown."""
    if not card:
        return replace(_generic(FIRST_FLASH, "onnxruntime-gpu"), name=ON_CUDA, source="no figures: any NVIDIA GPU")
    found = TARGETS.get(card)
    return replace(found, name=f"{ON_CUDA}:{card}", backend="onnxruntime-gpu") if found and found.product else None


def target_named(name: str) -> Target:
    """The target called ``name``; ``auto`` is this machine's GPU, ``sm89`` any GPU of compute capability 8.9.

    ``cuda`` is ONNX Runtime on any GPU, ``cuda:h100`` the same with the figures of an H100.

    Raises:
        UserError: the name is unknown, or this machine's GPU is not in the table.
    """
    if name == "auto":
        return detect(_gpus())
    system, colon, card = name.partition(":")
    on_cuda = _on_cuda(card) if system == ON_CUDA and bool(colon) == bool(card) else None
    if found := TARGETS.get(name) or _BY_CAPABILITY.get(name.lower()) or on_cuda:
        return found
    capabilities = ", ".join(_BY_CAPABILITY)
    known = f"one of {', '.join(TARGETS)}, auto, cuda, cuda:GPU, or a compute capability: {capabilities}"
    raise UserError(f"target {name!r}", known, "name one of them with --target")


def check_bundle(target: Target, manifest: Manifest) -> None:
    """Refuse the ONNX bundle of ``manifest`` if ``target`` does not support the precision of a component.

    Raises:
        UserError: names the bundle's or the component's precision, and the export options to use instead.
    """
    experts, allowed = manifest.spec.experts, target.precisions
    beyond = [c for c in manifest.components if c.precision not in (allowed if c.name in experts else (*allowed, FP32))]
    if any(component.precision == manifest.precision for component in beyond):
        check_precision(target, manifest.precision, _AT_EXPORT)
    for component in beyond:
        check_precision(target, component.precision, _AT_EXPORT, f"{component.name} in ")
    for component in manifest.components:
        for linear, number in component.exceptions.items():
            if number not in target.numbers:
                wrong = f"{component.name} with {linear} in {number} for {target.name}"
                others = ", ".join(target.numbers)
                raise UserError(wrong, others, f"{_AT_EXPORT}use --keep-high-precision {linear}=bf16")
        found = component.precision
        if component.name == "text_encoder" and target.text_encoder_precision(found) != found.wide:
            wrong = f"text_encoder in {found} for {target.name} ({target.backend} has no kernel for its attention)"
            raise UserError(wrong, "bf16 or fp16", f"{_AT_EXPORT}use --text-encoder bf16, or --target {target.name}")


_AT_EXPORT = "in wan-trt export "
FP32 = Precision.FP32  # which every backend computes outside the transformers


def _next_best(target: Target, precision: Precision) -> Precision:
    """The precision to use instead: as few bits, and of those the smallest error; attention as in ``precision``."""
    if not precision.quantised:
        return target.default_precision
    alike = [p for p in target.precisions if p.attention in (precision.attention, precision.attention.wide)]
    alike.sort(key=lambda p: (p.linears.bits, -p.linears.significand, p.attention.bits))
    return alike[0] if alike and alike[0].quantised else target.default_precision


def number_of_peaked(target: str | None) -> Number:
    """The type of the linears that INT8 does not suit: FP8 unless the target called so has none."""
    return Number.FP8 if target is None or Number.FP8 in target_named(target).numbers else Number.BF16


def unsupported_reason(target: Target, precision: Precision) -> str:
    """Why ``target`` does not compute in ``precision``, which is none of its own."""
    if target.backend == "onnxruntime-gpu":
        return "ONNX Runtime has no products of 8 or 4 bits" if precision.quantised else "flash attention takes 16 bits"
    if target.backend == "onnxruntime":
        return "ONNX Runtime does not compute it on a CPU"
    if not precision.quantised:
        return "not supported there"
    lacking = next((n for n in (precision.linears, precision.attention) if n not in target.numbers), precision.linears)
    return f"compute capability {target.compute_capability} has no {lacking.upper()} units"


def check_precision(target: Target, precision: Precision, where: str = "", what: str = "precision ") -> None:
    """Refuse a precision that ``target`` does not support, and name the next best one.

    Args:
        target: the target.
        precision: the requested precision.
        where: the command that takes --precision, if it is another one.
        what: the thing with this precision, for the message.
    """
    if precision in target.precisions:
        return
    instead = _next_best(target, precision)
    allowed = ", ".join(target.precisions)
    another = ", or name another --target" if where else ""
    found = f"{what}{precision} for {target.name} ({unsupported_reason(target, precision)})"
    raise UserError(found, allowed, f"{where}use --precision {instead}{another}")


def detect(gpus: list[tuple[str, str]]) -> Target:
    """The target for the first of ``gpus`` (name, compute capability); ``cpu`` if there are none."""
    if not gpus:
        return TARGETS["cpu"]
    name, capability = gpus[0]
    for target in _TABLE:
        if target.product and re.search(rf"\b{target.product}\b{_NOT_A_VARIANT}", name):
            return target
    alike = [target for target in _TABLE if target.compute_capability == capability]
    alike.sort(key=lambda target: (target.backend == "tensorrt-rtx") != ("RTX" in name))
    by_capability = f"sm{capability.replace('.', '')}"
    same = [*(target.name for target in alike[:1]), *([by_capability] if by_capability in _BY_CAPABILITY else [])]
    remedy = f"use --target {' or '.join(same)}, of its compute capability" if same else "use another GPU"
    raise UserError(f"GPU {name!r} (compute capability {capability})", f"one of {', '.join(TARGETS)}", remedy)


def _gpus() -> list[tuple[str, str]]:
    """Names and compute capabilities of this machine's GPUs; empty without a working driver."""
    try:
        answer = subprocess.run(QUERY_GPU, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.rsplit(",", 1) for line in answer.stdout.splitlines() if "," in line]
    return [(name.strip(), capability.strip()) for name, capability in lines]
