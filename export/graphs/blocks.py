"""The transformer cut into stages: one graph per part of a block, which every block calls with its weights as inputs.

A block is cut at self-attention into ``qkv``, ``attend`` and ``rest``. ``patches`` and ``velocity`` are the ends of a
forward; ``time`` runs once per schedule, ``text`` once per prompt, ``text_kv`` once per prompt and block. The axes of
tokens are dynamic: ``positions`` may be a slice of the sequence, ``keys`` is all of it.

Each rule below saves copies of all tokens in compiled engines:

* q, k and v are ``[positions, heads, head]``, the layout that attention kernels read and write.
* The rotated pair is cast before it is split, and v gets its heads without a further Reshape.
* FP8 operands of attention are dequantised before anything else.
* The two time rows of TI2V are blended with the mask ``first_frame``.
* Matrices stay ``[out, in]``, as stored; codes are dequantised with the constant 1 and scaled in float32.
* The result of attention and the text are quantised where they are made, not where they are read.

Several devices can divide the tokens (Ulysses). Each has the rows of its tokens in ``qkv`` and ``rest``, and all tokens
of its heads in ``attend``. In this form q, k and v leave ``qkv`` as ``[groups, positions, heads / groups, head]``: a
group of heads is one contiguous message. The result leaves ``attend`` in 16 bits as the kernel of attention writes it,
head by head, so that a head's part of a message is contiguous. ``join`` makes of all heads the rows that ``rest``
takes, as ``attend`` does on one device: FP8 scales whole rows. So ``rest`` has no other form, and no kernel is added.

In FP8 attention, softmax ignores any constant vector subtracted from K, so ``k_center`` need not be its exact mean, and
``v_scale`` only must not overflow: neither needs a second pass over the tokens. Cross-attention is in 16 bits.
"""

from collections.abc import Callable, Sequence

import onnx_ir as ir

from export.graphs.attention import attention, attention_of_fp8
from export.graphs.builder import FLOAT, GraphBuilder
from export.graphs.dit import Ends
from export.graphs.dit_block import Blocks, Modulation, Tables
from export.graphs.linear import CODES, FLOAT8, Linears, Operand, Quantised
from wan22.component import BY_HEAD, File, Stage, Tensor, grouped_name
from wan22.parallel import group_sizes
from wan22.parts import DitSpec
from wan22.specs import PATCH, TEXT_TOKENS

BLOCK = "blocks.0"  # stands for every block: its weights lose this prefix


class StageGraph(GraphBuilder):
    """A graph whose weights are inputs, named as in the checkpoint without ``blocks.N.``."""

    weights_are_inputs = True

    def __init__(self, name: str, groups: int = 1) -> None:
        super().__init__(name)
        self.groups = groups

    def weight(self, key: str, shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
        name = key.removeprefix(f"{BLOCK}.")
        if name not in self.weights:
            self.weights[name] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        return self.weights[name]

    def joined(self, keys: Sequence[str], shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
        """One input for the consecutive tensors ``keys``: ``self_attn.qkv.weight`` for q, k and v."""
        module, _, leaf = keys[0].rsplit(".", 2)
        parts = "".join(key.rsplit(".", 2)[1] for key in keys)
        return self.weight(f"{module}.{parts}.{leaf}", (len(keys) * shape[0], *shape[1:]), dtype)

    def edges(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Inputs, weights last, and outputs."""
        self.graph.inputs.extend(value for value in self.weights.values() if not value.is_graph_input())
        return super().edges()

    def stage(self, graph: File) -> Stage:
        """The manifest's entry for this graph in the file ``graph``."""
        inputs, outputs = self.edges()
        given = len(inputs) - len(self.weights)
        return Stage(str(self.graph.name), graph, inputs[:given], outputs, inputs[given:], self.groups)


def stage_graphs(
    spec: DitSpec, compute: ir.DataType = FLOAT, quantised: Quantised | None = None
) -> dict[str, StageGraph]:
    """The stages of a transformer, by name, in the order of their first call; then those of every size of a group.

    All blocks must compute alike: see :attr:`export.graphs.linear.Quantised.uniform`.
    """
    stages: dict[str, Callable[[_Stage], None]] = {
        "time": _time,
        "text": _text,
        "text_kv": _text_kv,
        "patches": _patches,
        "qkv": _qkv,
        "attend": _attend,
        "rest": _rest,
        "velocity": _velocity,
    }
    shared = {"qkv": _qkv, "attend": _attend, "join": _join}
    grouped = {(name, groups): write for groups in group_sizes(spec) for name, write in shared.items()}
    graphs = {}
    for (name, groups), write in ({(name, 1): write for name, write in stages.items()} | grouped).items():
        stage = _Stage(grouped_name(name, groups), spec, compute, quantised, groups)
        write(stage)
        graphs[str(stage.g.graph.name)] = stage.g
    return graphs


class _Stage:
    """A graph under construction, with the inputs that several stages have."""

    def __init__(
        self, name: str, spec: DitSpec, compute: ir.DataType, quantised: Quantised | None, groups: int = 1
    ) -> None:
        self.g, self.spec, self.groups = StageGraph(name, groups), spec, groups
        self.linears = Linears(self.g, compute, quantised)
        self.fp8_attention = quantised is not None and quantised.self_attention
        self.operands = FLOAT8 if self.fp8_attention else compute  # type of q, k and v

    def input(self, name: str, dims: Sequence[int | str], dtype: ir.DataType = FLOAT) -> ir.Value:
        return self.g.input(name, dtype, dims)

    @property
    def rows(self) -> str:
        """The dimension of the tokens of one device; in ``attend`` those of all."""
        return grouped_name("positions", self.groups)

    def heads(self, rows: str | int) -> list[int | str]:
        return [rows, self.spec.heads, self.spec.head_width]

    def output_rows(self, name: str, x: ir.Value, rows: str | int, key: str) -> None:
        """Output ``x [rows, D]``, the input of the linear ``key`` in another stage, as codes if that multiplies any."""
        width, number = self.spec.width, self.linears.number(key)
        if number is None or number not in CODES:
            self.g.output(name, self.g.cast(x, self.linears.compute), [rows, width], self.linears.compute)
            return
        made, scale = self.linears.quantise_rows(self.g.cast(self.linears.prepared(x, key, width), FLOAT), number)
        self.g.output(name, made, [rows, width], CODES[number].dtype)
        self.g.output(f"{name}_scale", scale, [rows, 1])

    def input_rows(self, name: str, rows: str | int, key: str) -> ir.Value | Operand:
        """The input that :meth:`output_rows` of another stage outputs."""
        width, number = self.spec.width, self.linears.number(key)
        if number is None or number not in CODES:
            return self.input(name, [rows, width], self.linears.compute)
        codes = self.input(name, [rows, width], CODES[number].dtype)
        return self.linears.quantised_rows(codes, self.input(f"{name}_scale", [rows, 1]), number)

    @property
    def own_heads(self) -> int:
        """Those of one device of a group."""
        return self.spec.heads // self.groups

    def messages(self) -> list[int | str]:
        """All heads of the device's tokens; for a group, by the device that attends to them."""
        if self.groups == 1:
            return self.heads(self.rows)
        return [self.groups, self.rows, self.own_heads, self.spec.head_width]

    def by_group(self, x: ir.Value) -> ir.Value:
        """``[positions, heads, head]`` → :meth:`messages`."""
        if self.groups == 1:
            return x
        parted = self.g.reshape(x, [-1, self.groups, self.own_heads, self.spec.head_width])
        return self.g.transpose(parted, 1, 0, 2, 3)

    def time_modulation(self) -> ir.Value:
        return self.input("time_modulation", [self.spec.time_rows, 6 * self.spec.width])

    def nothing(self) -> Modulation:
        return Modulation(self.g, self.spec, Tables(None, None, None))

    def modulation(self, *, rotates: bool = False) -> Modulation:
        """With the inputs that depend on positions: the mask of the first frame (TI2V), rotations for ``qkv``."""
        g, half, cos, sin = self.g, self.spec.head_width // 2, None, None
        if rotates:
            cos, sin = (self.input(f"rope_{name}", [self.rows, half]) for name in ("cos", "sin"))
            cos, sin = (g.reshape(table, [-1, 1, 1, half, 1]) for table in (cos, sin))
        first = self.input("first_frame", [self.rows, 1]) if self.spec.time_rows > 1 else None
        return Modulation(g, self.spec, Tables(cos, sin, first))

    def blocks(self, modulated: Modulation | None = None) -> Blocks:
        return Blocks(self.spec, self.linears, modulated or self.nothing())

    def ends(self, modulated: Modulation | None = None) -> Ends:
        return Ends(self.spec, self.linears, modulated or self.nothing())


def _time(s: _Stage) -> None:
    time, modulation = s.ends().time_embedding(s.input("time_features", ["steps", s.spec.freq_width]))
    s.g.output("time", time, ["steps", s.spec.width])
    s.g.output("time_modulation", modulation, ["steps", 6 * s.spec.width])


def _text(s: _Stage) -> None:
    context = s.ends().project_text(s.input("text", [1, TEXT_TOKENS, s.spec.text_width]))
    s.output_rows("context", context, TEXT_TOKENS, f"{BLOCK}.cross_attn.k")


def _text_kv(s: _Stage) -> None:
    compute, entering = s.linears.compute, s.input_rows("context", TEXT_TOKENS, f"{BLOCK}.cross_attn.k")
    k, v = s.blocks().text_keys_and_values(f"{BLOCK}.cross_attn", entering)
    s.g.output("text_k", s.g.cast(k, compute), s.heads(TEXT_TOKENS), compute)
    s.g.output("text_v", s.g.cast(v, compute), s.heads(TEXT_TOKENS), compute)


def _patches(s: _Stage) -> None:
    features = PATCH[1] * PATCH[2] * s.spec.in_channels
    patches = s.input("patches", ["positions", features])
    x = s.ends().linear(patches, "patch_embedding", (features, s.spec.width), s.linears.compute)
    s.g.output("x", s.g.cast(x, FLOAT), ["positions", s.spec.width])


def _qkv(s: _Stage) -> None:
    g, key, compute = s.g, f"{BLOCK}.self_attn", s.linears.compute
    x, modulation, blocks = (
        s.input("x", [s.rows, s.spec.width]),
        s.time_modulation(),
        s.blocks(s.modulation(rotates=True)),
    )
    rotated, qkv = blocks.project_qkv(key, blocks.modulated(x, *blocks.time_rows(BLOCK, modulation)[:2]))
    v = blocks.values_of(qkv)
    if s.fp8_attention:
        q, k = (g.reshape(half, [-1, *blocks.heads]) for half in g.split(rotated, 2, 1))
        center, v_scale = (
            g.reshape(s.input(name, [1, s.spec.width]), [1, *blocks.heads]) for name in ("k_center", "v_scale")
        )
        q_scale, k_scale = (g.weight(f"{key}.{name}_scale", (), FLOAT) for name in "qk")
        made = {
            "q": s.linears.quantise(s.by_group(q), q_scale),
            "k": s.linears.quantise(s.by_group(g.op("Sub", k, center)), k_scale),
            "v": s.linears.quantise(s.by_group(g.op("Div", v, v_scale)), g.constant(1.0, FLOAT)),
        }
    else:
        q, k = (g.reshape(half, [-1, *blocks.heads]) for half in g.split(g.cast(rotated, compute), 2, 1))
        made = {"q": s.by_group(q), "k": s.by_group(k), "v": s.by_group(g.cast(v, compute))}
    for name, value in made.items():
        g.output(name, value, s.messages(), s.operands)


def _attend(s: _Stage) -> None:
    g, compute, key = s.g, s.linears.compute, f"{BLOCK}.self_attn"
    of_rows = (("q", "positions"), ("k", "keys"), ("v", "keys"))
    q, k, v = (s.input(name, [rows, s.own_heads, s.spec.head_width], s.operands) for name, rows in of_rows)
    if s.groups > 1:
        fp8 = s.fp8_attention
        y = attention_of_fp8(s.linears, key, q, k, v) if fp8 else attention(g, compute, q, k, v, by_head=True)
        g.output(BY_HEAD, g.cast(y, compute), [s.own_heads, "positions", s.spec.head_width], compute)
        return
    if s.fp8_attention:
        v_scale = g.reshape(s.input("v_scale", [1, s.spec.width]), [1, s.spec.heads, s.spec.head_width])
        y = attention_of_fp8(s.linears, key, q, k, v, v_scale)
    else:
        y = attention(g, compute, q, k, v)
    s.output_rows("o", g.reshape(y, [-1, s.spec.width]), "positions", f"{key}.o")


def _join(s: _Stage) -> None:
    g, width = s.g, s.spec.width
    o = s.input(BY_HEAD, [s.spec.heads, s.rows, s.spec.head_width], s.linears.compute)
    rows = g.reshape(g.transpose(o, 1, 0, 2), [-1, width])
    if s.fp8_attention:
        rows = g.mul(g.cast(rows, FLOAT), s.input("v_scale", [1, width]))
    s.output_rows("o", rows, s.rows, f"{BLOCK}.self_attn.o")


def _rest(s: _Stage) -> None:
    g, width, compute, cross = s.g, s.spec.width, s.linears.compute, f"{BLOCK}.cross_attn"
    x = s.input("x", ["positions", width])
    attended = s.input_rows("o", "positions", f"{BLOCK}.self_attn.o")
    modulation = s.time_modulation()
    text_k, text_v = (s.input(name, s.heads(TEXT_TOKENS), compute) for name in ("text_k", "text_v"))
    blocks = s.blocks(s.modulation())
    rows = blocks.time_rows(BLOCK, modulation)
    x = blocks.add_self_attention(x, blocks.project_out(f"{BLOCK}.self_attn", attended), rows)
    q = blocks.text_queries(cross, blocks.modulated.layer_norm(x, f"{BLOCK}.norm3"))
    y = g.reshape(attention(g, compute, q, text_k, text_v), [-1, width])
    x = g.add(x, blocks.project_out(cross, y))
    g.output("x_out", blocks.add_feed_forward(BLOCK, x, rows), [s.rows, width])


def _velocity(s: _Stage) -> None:
    x, time = s.input("x", ["positions", s.spec.width]), s.input("time", [s.spec.time_rows, s.spec.width])
    patches = s.ends(s.modulation()).velocity_patches(x, time)
    s.g.output("patches", patches, ["positions", PATCH[1] * PATCH[2] * s.spec.out_channels])
