"""What weights outside of an engine cost: kernels per block beside those of the same graph with its weights inside."""

import statistics
from dataclasses import replace
from pathlib import Path

from engines.gpu.tensorrt_backend import EngineOptions, build_engine, log_beside
from engines.inspect.first_blocks import first_blocks
from engines.inspect.log import read_log
from engines.inspect.report import FusionReport
from wan22.bundle import Bundle, Component
from wan22.files import scratch_folder
from wan22.progress import Progress

BLOCKS_TO_COMPARE = 3  # a first, a last and one in between


def kernels_per_block(
    source: Bundle, component: Component, external: Path, options: EngineOptions, progress: Progress
) -> dict[str, int]:
    """By style of weights: of the engine ``external``, and of ``component``'s first blocks with weights
    inside.
    """
    with scratch_folder("compare") as place:
        graph = first_blocks(source.path(component.graph), place, BLOCKS_TO_COMPARE)
        inside = place / f"{component.name}-embedded.plan"
        build_engine(graph, inside, replace(options, timing_cache=None), progress)
        return {
            "embedded": per_block(component, inside, options),
            "external": per_block(component, external, options),
        }


def per_block(component: Component, engine: Path, options: EngineOptions) -> int:
    """Kernels of a block in the middle of a compiled transformer, from the builder's log."""
    report = FusionReport(component.name, options.target, read_log(log_beside(engine)), component.precision)
    return statistics.median_high(report.kernels_per_block)
