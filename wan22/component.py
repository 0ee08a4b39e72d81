"""A component of a model in a bundle: its files, its inputs and outputs, and the stages that it may be cut into."""

from dataclasses import dataclass, field, replace

from wan22.precision import Number, Precision

BY_HEAD = "o_by_head"  # of a transformer in stages: the result of attention, between devices that divide the tokens


@dataclass(frozen=True)
class File:
    path: str  # relative to the bundle, forward slashes
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph. A dimension is a number, or a name that every tensor of the graph shares."""

    name: str
    dtype: str  # numpy's name: "float32", "int64"
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class Stage:
    """One graph of a transformer or VAE that is cut into parts, or its engine; a transformer's weights are inputs."""

    name: str
    graph: File
    inputs: tuple[Tensor, ...]  # other than weights
    outputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    groups: int = 1  # devices that divide the tokens; such a stage stands beside the one for a single device


@dataclass(frozen=True)
class Component:
    name: str
    graph: File
    weights: tuple[File, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    precision: Precision
    why_higher: str = ""  # the reason if its precision, or part of it, is above the bundle's
    # linears of a type other than its precision's, as "ffn.2" or "blocks.3.ffn.2"
    exceptions: dict[str, Number] = field(default_factory=dict, hash=False)
    low_rank: int = 0  # of the 16-bit branch beside every NVFP4 matrix
    halves: tuple[File, ...] = ()  # the same graph as two, if built so: for the prompt alone, and for a step
    stages: tuple[Stage, ...] = ()  # the same graph as stages; if it was built so, ``graph`` is one of theirs

    @property
    def in_stages(self) -> bool:
        """True for engines that are stages; a bundle of graphs has both, the whole graph and its stages."""
        return any(stage.graph == self.graph for stage in self.stages)

    @property
    def in_blocks(self) -> bool:
        """True for engines that are stages with their weights outside, which every block or layer calls."""
        return self.in_stages and any(stage.weights for stage in self.stages)

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def part(self, name: str) -> "Component":
        """The stage ``name`` as a component called ``dit.qkv``."""
        s, whole = self.stage(name), f"{self.name}.{name}"
        return replace(self, name=whole, graph=s.graph, inputs=s.inputs, outputs=s.outputs, halves=(), stages=())

    @property
    def groups(self) -> tuple[int, ...]:
        """The numbers of devices among which the stages can divide the tokens."""
        return tuple(sorted(stage.groups for stage in self.stages if stage.name == grouped_name("join", stage.groups)))

    @property
    def older_groups(self) -> tuple[int, ...]:
        """Those for which an older version made stages that no longer fit."""
        return tuple(sorted({stage.groups for stage in self.stages} - {1, *self.groups}))

    def in_groups(self, count: int) -> "Component":
        """The component with the stages of one device, or with those of ``count`` devices where they have a form."""
        found = {stage.name: stage for stage in self.stages if stage.groups == 1}
        for stage in (stage for stage in self.stages if stage.groups == count > 1):
            name = stage.name.removesuffix(grouped_name("", count))
            found[name] = replace(stage, name=name)
        return replace(self, stages=tuple(found.values()))

    def compiled(self) -> "tuple[Component, ...]":
        """What is compiled by itself: the stages, or the component."""
        return tuple(self.part(stage.name) for stage in self.stages) if self.in_stages else (self,)


def grouped_name(stage: str, count: int) -> str:
    """The name of the form of ``stage`` for ``count`` devices that divide the tokens, or of a dimension in it."""
    return stage if count == 1 else f"{stage}_of_{count}"
