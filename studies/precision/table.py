"""The table of precisions: what each costs and saves, on the worst of several twins."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from rich.table import Table

from engines.gpu.tensorrt_backend import EngineOptions, build_engine
from engines.inspect.log import read_log
from engines.plan import make_plan
from engines.precision_figures import PrecisionFigures
from engines.targets import TARGETS, Target
from export.graphs.blocks import stage_graphs
from export.precisions import compute_type, usual_quantised
from studies.precision.result import Study
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.progress import Progress, silent
from wan22.residency import dit_weights_bytes
from wan22.specs import T2V_A14B, ModelSpec

CARDS = {
    "rtx3090": "3090", "rtx4090": "4090", "rtx5090": "5090", "rtx-pro-6000-blackwell": "PRO 6000", "a100": "A100",
    "h100": "H100", "b200": "B200",
}  # fmt: skip
BUILT_FOR = ("rtx3090", "rtx4090", "rtx5090")  # one of each architecture that TensorRT-RTX builds for
OF_A_BLOCK = ("qkv", "attend", "rest")
TOKENS = 75_600  # 1280x720, 81 frames
Kernels = dict[Precision, dict[str, tuple[int, ...]]]  # by precision and card


def figures_of(studies: Mapping[str, Study], kernels: Kernels) -> list[PrecisionFigures]:
    """The figures of every precision that an export makes; ``studies`` by model."""
    found = []
    for result in next(iter(studies.values())).results:
        if (precision := result.variant.precision) is not None:
            alike = {m: next(r for r in s.results if r.variant.precision is precision) for m, s in studies.items()}
            errors = {model: each.worst for model, each in alike.items()}
            latents = {model: each.psnr_db for model, each in alike.items()}
            found.append(PrecisionFigures(precision, result.variant.aim, errors, latents, kernels.get(precision, {})))
    return found


def kernels_of(precisions: Sequence[Precision], progress: Progress = silent) -> Kernels:
    """The kernels of a block of T2V-A14B at 720p as TensorRT-RTX compiles them; none without it."""
    todo = [(p, name) for p in precisions for name in BUILT_FOR if p in TARGETS[name].precisions]
    found: Kernels = {}
    for done, (precision, name) in enumerate(todo):
        try:
            found.setdefault(precision, {})[name] = block_kernels(T2V_A14B, TARGETS[name], precision)
        except UserError:  # the compiler is not installed
            return {}
        progress("compile blocks", done + 1, len(todo), "blocks")
    return found


def block_kernels(spec: ModelSpec, target: Target, precision: Precision, tokens: int = TOKENS) -> tuple[int, ...]:
    """The kernels of ``qkv``, ``attend`` and ``rest`` of a block in its real size."""
    profile = dict.fromkeys(("positions", "keys"), (256, tokens, tokens))
    graphs, counts = stage_graphs(spec.dit, compute_type(precision), usual_quantised(precision)), []
    with tempfile.TemporaryDirectory() as folder:
        for name in OF_A_BLOCK:
            g = graphs[name]
            for scale in ("self_attn.q_scale", "self_attn.k_scale"):  # a build makes constants of them
                if (value := g.weights.pop(scale, None)) is not None:
                    value.const_value = ir.tensor(np.array(0.05, np.float32), name=scale)
                    g.graph.initializers[scale] = value
            inputs, _ = g.edges()
            path = Path(folder) / f"{name}.onnx"
            g.save(path)
            built = build_engine(path, path.with_suffix(".plan"), EngineOptions(target, (profile,), inputs))
            counts.append(len(read_log(built.log).kernels))
    return tuple(counts)


def tables_of(figures: Sequence[PrecisionFigures], spec: ModelSpec = T2V_A14B) -> tuple[Table, Table]:
    """Accuracy and kernels; size, and the rooflines of a step at the model's first size."""
    models = list(figures[0].velocity)
    short = [model.rpartition("-")[2].upper() for model in models]
    title = "Velocity error of the worst step, PSNR of latents, kernels of a block"
    accuracy = Table("precision", *short, "aim", *(f"{each}, dB" for each in short), "kernels", title=title)
    speed = Table("precision", "GB", *CARDS.values(), title=f"{spec.name}: roofline seconds of a step")
    for each in figures:
        missed = "" if each.meets_aim else " missed"
        row = [str(each.precision), *(f"{each.velocity[m]:.2%}" for m in models), f"{each.aim:.1%}{missed}"]
        size = len(spec.experts) * dit_weights_bytes(spec.dit, each.precision)
        kernels = dict.fromkeys("+".join(map(str, n)) for n in each.kernels.values())
        accuracy.add_row(*row, *(f"{each.latents_db[m]:.1f}" for m in models), "; ".join(kernels))
        seconds = []
        for card in CARDS:
            allowed = each.precision in TARGETS[card].precisions
            found = make_plan(spec, TARGETS[card], each.precision).step_seconds if allowed else None
            seconds.append("" if found is None else f"{found:.1f}")
        speed.add_row(str(each.precision), f"{size / 1e9:.1f}", *seconds)
    return accuracy, speed
