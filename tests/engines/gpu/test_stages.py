"""The stages of a real-size block as compiled for absent GPUs: kernels, scratch memory, no copy of a weight."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from engines.gpu.attention import drop_batch, writes_its_output
from engines.gpu.tensorrt_backend import EngineOptions, build_engine
from engines.inspect.log import read_log
from engines.inspect.report import FusionReport
from engines.lora_slots import add_slots, with_slots
from engines.targets import TARGETS
from export.graphs.blocks import stage_graphs
from export.graphs.builder import BFLOAT16
from export.graphs.text_encoder import text_stages
from tests.engines.conftest import QUANTISED
from wan22.block_memory import BlockChoice, block_memory, text_layer_bytes, text_layers
from wan22.component import File
from wan22.precision import Precision
from wan22.specs import SPECS

MIB = 2**20
TOKENS = {"t2v-a14b": 75_600, "ti2v-5b": 27_280}  # 720p
STAGES = ("qkv", "attend", "rest")
KERNELS = {
    Precision.BF16: (6, 2, 15), Precision.FP8: (4, 2, 12), Precision.FP8_ATTN: (4, 2, 12),
    Precision.INT8: (4, 2, 12), Precision.INT8_FP8_ATTN: (4, 2, 12),
}  # fmt: skip
SCRATCH_MIB = {  # of qkv, attend and rest
    ("t2v-a14b", Precision.BF16): (2961, 738, 5687),
    ("t2v-a14b", Precision.FP8): (2594, 738, 4838),
    ("t2v-a14b", Precision.FP8_ATTN): (2594, 738, 4838),
    ("ti2v-5b", Precision.FP8_ATTN): (569, 160, 1521),
}


@pytest.fixture
def compiled(tmp_path):
    """``compiled(model, target, precision, tokens, stages)`` → the compiled stages and their plans, in order."""
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")

    def build(model, target, precision, tokens, stages=STAGES, rank=0, low_rank=0):
        names = ("positions", "positions_of_4", "keys")
        profile = {**dict.fromkeys(names, (256, tokens, tokens)), "steps": (1, 40, 80)}
        quantised, found = QUANTISED[precision], []
        if low_rank:
            quantised = replace(quantised, low_rank=low_rank)
        for name, g in stage_graphs(SPECS[model].dit, BFLOAT16, quantised).items():
            if name not in stages:
                continue
            for scale in ("self_attn.q_scale", "self_attn.k_scale"):
                if value := g.weights.pop(scale, None):
                    value.const_value = ir.tensor(np.array(0.05, np.float32), name=scale)
                    g.graph.initializers[scale] = value
            inputs, _ = g.edges()
            aim, stage = replace(TARGETS[target], backend="tensorrt-rtx"), g.stage(File("", "", 0))
            if writes_its_output(stage, aim):
                drop_batch(g.graph)
            if rank:
                add_slots(ir.Model(g.graph, ir_version=11), with_slots(stage, rank, "bfloat16"))
                g.weights |= {str(value.name): value for value in g.graph.inputs if ".lora_" in str(value.name)}
            g.save(tmp_path / f"{name}.onnx")
            options = EngineOptions(aim, (profile,), inputs)
            built = build_engine(tmp_path / f"{name}.onnx", tmp_path / f"{name}.plan", options)
            found.append((read_log(built.log), built, {key: tuple(v.shape) for key, v in g.weights.items()}))
        return found

    return build


def copied_matrices(compiled, weights):
    matrices = {name for name, shape in weights.items() if len(shape) == 2}
    return [k.name for k in compiled.kernels if k.role == "copy" and matrices & {o.name for o in k.inputs}]


@pytest.mark.parametrize(("model", "precision"), SCRATCH_MIB, ids=str)
@pytest.mark.parametrize("target", ["rtx4090", "rtx5090"])
def test_a_block_has_as_few_kernels_as_inside_a_whole_model(compiled, model, precision, target):
    built = compiled(model, target, precision, TOKENS[model])
    assert tuple(len(found.kernels) for found, _, _ in built) == KERNELS[precision]
    for (found, _, _), most in zip(built, SCRATCH_MIB[model, precision], strict=True):
        assert found.scratch_bytes <= (most + 1) * MIB
    assert sum(plan.size_bytes for _, plan, _ in built) < 5e6
    assert not [name for found, _, weights in built for name in copied_matrices(found, weights)]
    assert all(found.weights_bytes < MIB for found, _, _ in built)
    if precision is not Precision.BF16:  # its kernels name a bias first
        assert {k.dtype for found, _, _ in built for k in found.kernels if k.role == "gemm"} == {"fp8"}
    attend, _, _ = built[1]
    (mha,) = [k for k in attend.kernels if k.role == "attention"]
    assert mha.dtype == ("fp8" if precision is Precision.FP8_ATTN else "bf16")
    assert mha.flops == 4.0 * TOKENS[model] ** 2 * SPECS[model].dit.width


@pytest.mark.parametrize(
    ("target", "precision", "model"),
    [
        ("a100", Precision.INT8, "t2v-a14b"),
        ("rtx3090", Precision.INT8, "t2v-a14b"),
        ("rtx4090", Precision.INT8_FP8_ATTN, "t2v-a14b"),
        ("rtx5090", Precision.INT8_FP8_ATTN, "t2v-a14b"),
        ("rtx5090", Precision.INT8, "ti2v-5b"),
    ],
)
def test_int8_is_fused_like_fp8_on_every_architecture(compiled, target, precision, model):
    built = compiled(model, target, precision, TOKENS[model])
    splits_time_rows = (0, 0, model == "ti2v-5b")  # two of them, in a kernel of its own
    expected = tuple(np.add(KERNELS[precision], splits_time_rows))
    assert tuple(len(found.kernels) for found, _, _ in built) == expected
    scratch = SCRATCH_MIB["t2v-a14b", Precision.FP8] if model == "t2v-a14b" else (569, 160, 1521)
    for (found, _, _), most in zip(built, scratch, strict=True):
        assert found.scratch_bytes <= (most + 1) * MIB
    assert not [name for found, _, weights in built for name in copied_matrices(found, weights)]
    gemms = [k for found, _, _ in built for k in found.kernels if k.role == "gemm"]
    assert [k.dtype for k in gemms] == ["int8"] * 6
    (mha,) = [k for k in built[1][0].kernels if k.role == "attention"]
    assert mha.dtype == ("fp8" if precision is Precision.INT8_FP8_ATTN else "bf16")
    for found, _, _ in built:
        report = FusionReport("high_noise.rest", TARGETS[target], found, precision)
        assert report.problems == []


@pytest.mark.parametrize(
    ("target", "precision", "kernels", "scratch"),
    [
        ("rtx4090", Precision.FP8, (6, 23), (4454, 6832)),
        ("rtx5090", Precision.INT8, (6, 23), (4454, 6832)),
        ("rtx4090", Precision.BF16, (8, 23), (5176, 6942)),
    ],
)
def test_a_lora_is_two_small_products_that_read_what_the_large_one_reads(compiled, target, precision, kernels, scratch):
    built = compiled("t2v-a14b", target, precision, TOKENS["t2v-a14b"], ("qkv", "rest"), rank=32)
    assert tuple(len(found.kernels) for found, _, _ in built) == kernels
    spec, tokens = SPECS["t2v-a14b"].dit, TOKENS["t2v-a14b"]
    for (found, _, weights), most in zip(built, scratch, strict=True):
        assert found.scratch_bytes <= (most + 1) * MIB
        assert not copied_matrices(found, weights)
        read = {operand.name for kernel in found.kernels if kernel.role == "gemm" for operand in kernel.inputs}
        assert {name for name in weights if ".lora_" in name} <= read  # by products, in place
        if precision.quantised:  # in 16 bits V is copied without slots as well
            assert not [k.name for k in found.kernels if k.role == "copy" and k.size_bytes > tokens * spec.width]
    whole = max(found.scratch_bytes for found, _, _ in built)
    assert whole <= block_memory(spec, precision, tokens, BlockChoice(0, 1), 0, beside=1).scratch
    main = {k.dtype for found, _, _ in built for k in found.kernels if k.role == "gemm" and "lora" not in k.name}
    assert main <= {precision.linears, "bf16", "fp32"}
    assert precision.linears in main


@pytest.mark.parametrize(
    ("precision", "kernels", "products"),
    [
        (Precision.NVFP4_FP8_ATTN, (9, 3, 33), {"nvfp4": 6}),
        (Precision.NVFP4_FFN_FP8_ATTN, (4, 2, 20), {"int8": 4, "nvfp4": 2}),
    ],
)
def test_nvfp4_multiplies_4_bit_codes_that_are_inputs(compiled, precision, kernels, products):
    built = compiled("t2v-a14b", "rtx5090", precision, TOKENS["t2v-a14b"])
    assert tuple(len(found.kernels) for found, _, _ in built) == kernels
    assert Counter(k.dtype for found, _, _ in built for k in found.kernels if k.role == "gemm") == products
    spec, tokens = SPECS["t2v-a14b"].dit, TOKENS["t2v-a14b"]
    planned = block_memory(spec, precision, tokens, BlockChoice(0, 1), 0)
    assert 0.97 * planned.scratch < max(found.scratch_bytes for found, _, _ in built) <= planned.scratch
    codes = {name for _, _, weights in built for name in weights if name.endswith(".weight") and "norm" not in name}
    read = {o.name for found, _, _ in built for k in found.kernels if k.role == "gemm" for o in k.inputs}
    assert codes <= read  # in place; the small scales of groups are put into another order
    (mha,) = [k for k in built[1][0].kernels if k.role == "attention"]
    assert mha.dtype == "fp8"


@pytest.mark.parametrize(
    ("model", "precision", "slots", "kernels", "products"),
    [
        ("t2v-a14b", Precision.NVFP4_FP8_ATTN, 0, (11, 44), 6),
        ("t2v-a14b", Precision.NVFP4_FFN_FP8_ATTN, 0, (4, 25), 2),
        ("ti2v-5b", Precision.NVFP4, 0, (11, 44), 6),
        ("ti2v-5b", Precision.NVFP4, 16, (14, 59), 6),
    ],
)
def test_a_branch_is_two_small_products_beside_each_in_4_bits(compiled, model, precision, slots, kernels, products):
    built = compiled(model, "rtx5090", precision, TOKENS[model], ("qkv", "rest"), slots, low_rank=32)
    assert tuple(len(found.kernels) for found, _, _ in built) == kernels
    gemms = [k for found, _, _ in built for k in found.kernels if k.role == "gemm"]
    assert [k.dtype for k in gemms].count("nvfp4") == products
    of_branches = {name for _, _, weights in built for name in weights if ".low_rank_" in name}
    reading = [{o.name for o in k.inputs} & of_branches for k in gemms]
    assert len(of_branches) == sum(map(len, reading)) == 2 * products  # each by a product of its own, in place
    assert max(map(len, reading)) == 1
    spec, tokens = SPECS[model].dit, TOKENS[model]
    planned = block_memory(spec, precision, tokens, BlockChoice(0, 1), 0, beside=2 if slots else 1)
    assert 0.9 * planned.scratch < max(found.scratch_bytes for found, _, _ in built) <= planned.scratch
    for found, _, weights in built:
        assert not copied_matrices(found, {name: shape for name, shape in weights.items() if name in of_branches})
        assert FusionReport(f"{model}.rest", TARGETS["rtx5090"], found, precision).problems == []


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8, Precision.FP8_ATTN], ids=str)
@pytest.mark.parametrize("target", ["rtx4090", "rtx5090"])
def test_one_of_four_devices_has_the_kernels_of_one_in_a_quarter_of_the_memory(compiled, capsys, target, precision):
    model, devices, tokens = "t2v-a14b", 4, TOKENS["t2v-a14b"]
    rest, qkv, join = compiled(model, target, precision, tokens // devices, ("qkv_of_4", "join_of_4", "rest"))
    (attend,) = compiled(model, target, precision, tokens, ("attend_of_4",))
    built = [qkv, attend, join, rest]
    of_qkv, of_attend, of_join, of_rest = (len(found.kernels) for found, _, _ in built)
    assert (of_qkv, of_attend + of_join, of_rest) == KERNELS[precision]
    (mha,) = attend[0].kernels
    assert mha.role == "attention"
    assert mha.dtype == ("fp8" if precision is Precision.FP8_ATTN else "bf16")
    assert mha.flops == 4.0 * tokens**2 * SPECS[model].dit.width / devices
    assert not [name for found, _, weights in built for name in copied_matrices(found, weights)]
    scratch = [found.scratch_bytes / MIB for found, _, _ in built]
    with capsys.disabled():
        counts = f"{of_qkv} + {of_attend} + {of_join} + {of_rest} kernels"
        shown = ", ".join(f"{size:,.0f}" for size in scratch)
        print(f"\n{target}, {precision}: qkv, attend, join, rest on each of {devices} devices: {counts}, {shown} MiB")
    alone = (*SCRATCH_MIB[model, precision][:2], 0, SCRATCH_MIB[model, precision][2])
    assert all(size <= most / devices + 12 for size, most in zip(scratch, alone, strict=True))


def test_where_attention_needs_the_axis_of_a_batch_it_is_one_kernel_and_a_copy(compiled):
    model, precision = "t2v-a14b", Precision.BF16
    ((found, _, _),) = compiled(model, "rtx3090", precision, TOKENS[model], ("attend_of_4",))
    assert [kernel.role for kernel in found.kernels] == ["attention", "copy"]


def test_an_eighth_of_the_tokens_takes_an_eighth_of_the_scratch_memory(compiled):
    precision, slices = Precision.FP8_ATTN, 8
    built = compiled("t2v-a14b", "rtx4090", precision, TOKENS["t2v-a14b"] // slices, ("qkv", "rest"))
    whole = SCRATCH_MIB["t2v-a14b", precision]
    for (found, _, _), most in zip(built, (whole[0], whole[2]), strict=True):
        assert found.scratch_bytes <= (most / slices + 10) * MIB  # tables of time and small tensors do not shrink


@pytest.mark.parametrize("target", ["rtx4090", "rtx5090"])
def test_the_other_stages_are_a_few_kernels_each(compiled, target):
    few = {"time": 6, "text": 5, "text_kv": 2, "patches": 3, "velocity": 3}
    built = compiled("t2v-a14b", target, Precision.FP8, TOKENS["t2v-a14b"], few)
    assert [len(found.kernels) for found, _, _ in built] == list(few.values())
    assert not [name for found, _, weights in built for name in copied_matrices(found, weights)]


@pytest.mark.parametrize(
    ("fp8", "kernels", "gemms"), [(False, 15, {"bf16": 6, "fp32": 1}), (True, 17, {"bf16": 4, "fp8": 3})]
)
def test_a_layer_of_the_text_encoder_reads_its_matrices_in_place(tmp_path, fp8, kernels, gemms):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    spec = SPECS["t2v-a14b"].text_encoder
    g = text_stages(spec, BFLOAT16, fp8_feed_forward=fp8)["layer"]
    inputs, _ = g.edges()
    g.save(tmp_path / "layer.onnx")
    options = EngineOptions(TARGETS["rtx4090"], ({"tokens": (1, 64, 512)},), inputs)
    compiled = read_log(build_engine(tmp_path / "layer.onnx", tmp_path / "layer.plan", options).log)
    report = FusionReport("text_encoder.layer", TARGETS["rtx4090"], compiled, Precision.FP8 if fp8 else Precision.BF16)
    assert (len(compiled.kernels), report.by_dtype("gemm"), report.problems) == (kernels, gemms, [])
    assert not copied_matrices(compiled, {key: tuple(value.shape) for key, value in g.weights.items()})
    step_bytes = text_layer_bytes(spec, Precision.FP8 if fp8 else Precision.BF16)
    assert step_bytes == pytest.approx(sum(value_bytes(value) for value in g.weights.values()), rel=1e-6)
    planned = text_layers(spec, Precision.BF16, step_bytes).memory(BlockChoice(0, 1))
    assert 0.4 * planned.scratch < compiled.scratch_bytes <= planned.scratch


def value_bytes(value):
    return int(np.prod(tuple(value.shape))) * value.dtype.itemsize
