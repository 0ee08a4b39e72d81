"""A part of an export: graphs that share one weights file, and the tensors in that file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from export.checkpoint.checkpoint import Checkpoint, Weights
from export.files.tensor_file import Pieces, Planned, Stored
from export.graphs.blocks import StageGraph
from export.graphs.builder import GraphBuilder
from export.graphs.linear import coded_matrices
from export.graphs.weights_file import declare_weights
from export.quantise.inputs import MeasuredInput
from export.quantise.quantised_weights import QuantisedWeights, remade_biases
from export.shared_files import find_shareable
from wan22.precision import Number, Precision
from wan22.strips import VaeStage


@dataclass(frozen=True)
class ExportPart:
    weights: str  # key of Checkpoint.weights
    precision: Precision
    graphs: dict[str, GraphBuilder]
    stages: Mapping[str, StageGraph] = field(default_factory=dict)  # the same transformer in parts, if it has any
    exceptions: Mapping[str, Number] = field(default_factory=dict)  # linears of a type other than the precision's
    # what the graphs use of measurements on the inputs of linears, by linear
    input_scales: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, MeasuredInput] = field(default_factory=dict)
    low_rank: int = 0  # of the branches beside NVFP4 matrices
    # tensors left in the checkpoint's files
    shared: Mapping[str, Stored] = field(default_factory=dict)
    # of every graph of a VAE
    vae_stages: Mapping[str, Mapping[VaeStage, GraphBuilder]] = field(default_factory=dict)

    @cached_property
    def declared(self) -> dict[str, Planned]:
        return declare_weights(self.graphs.values())

    @property
    def written(self) -> dict[str, Planned]:
        return {key: planned for key, planned in self.declared.items() if key not in self.shared}

    @cached_property
    def quantised(self) -> dict[str, Number]:
        """The matrices stored as codes, and their number type."""
        return {key: number for graph in self.graphs.values() for key, number in coded_matrices(graph).items()}

    @cached_property
    def remade(self) -> frozenset[str]:
        """Official names of tensors that differ from the checkpoint's."""
        quantised = self.quantised
        return frozenset(quantised) | remade_biases(quantised, self.input_scales, self.inputs)

    def share(self, weights: Weights) -> "ExportPart":
        """A copy of this part that shares as many tensors of ``weights`` as possible."""
        same = {key: planned for key, planned in self.declared.items() if key not in self.remade}
        return replace(self, shared=find_shareable(weights, same))

    @property
    def shared_files(self) -> list[Path]:
        return sorted({stored.path for stored in self.shared.values()})

    def pieces(self, source: Checkpoint) -> Pieces:
        """A reader of the declared tensors, which come from the checkpoint or are computed for quantised graphs."""
        weights = source.weights[self.weights]
        if not self.quantised:
            return weights.pieces
        measured = self.input_scales, self.inputs, self.low_rank
        made = QuantisedWeights(weights.read, source.spec.dit, self.quantised, *measured, weights.codes)
        stored = frozenset(weights.names()) - self.remade
        return lambda key: weights.pieces(key) if key in stored else made.pieces(key)
