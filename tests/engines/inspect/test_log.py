"""Compiled kernels are counted, assigned to blocks and weighted, and their faults are found."""

import json

import pytest

from engines.inspect.log import parse
from engines.inspect.report import FusionReport
from engines.inspect.views import as_html, as_text, by_dtype, problems_as_text
from engines.targets import TARGETS
from wan22.errors import UserError
from wan22.precision import Precision

# the most kernels that a block may have: a model of one block, whose ends count for it, in TensorRT-RTX 1.7.1
KERNELS = {Precision.BF16: 18, Precision.FP8: 19, Precision.FP8_ATTN: 21}
SCRATCH_BYTES = 6.5e9
PRECISIONS = list(KERNELS)
EVERY_TARGET = pytest.mark.parametrize("target", ["rtx4090", "rtx5090"])
EVERY_PRECISION = pytest.mark.parametrize("precision", PRECISIONS, ids=str)


def check_block(report, precision):
    kernels = report.typical_block
    linears = [k for k in kernels if k.role == "gemm"]
    attentions = [k for k in kernels if k.role == "attention"]
    assert report.problems == []
    assert len(kernels) <= KERNELS[precision]
    assert len(linears) <= 7
    assert {k.dtype for k in linears} == ({"bf16"} if precision == Precision.BF16 else {"fp8"})
    assert [k.dtype for k in attentions] == ["fp8" if precision == Precision.FP8_ATTN else "bf16"] * 2


@pytest.mark.parametrize(
    ("model", "target", "precision"),
    [
        ("t2v-a14b-tiny", "rtx4090", Precision.BF16),
        ("t2v-a14b-tiny", "rtx5090", Precision.FP8),
        ("i2v-a14b-tiny", "rtx5090", Precision.BF16),
        ("ti2v-5b-tiny", "rtx4090", Precision.FP8_ATTN),
    ],
)
def test_tiny_blocks_compile_to_few_kernels_with_fused_attention(compiled, model, target, precision):
    check_block(compiled(model, target, precision), precision)


@pytest.mark.slow
@EVERY_PRECISION
@EVERY_TARGET
@pytest.mark.parametrize(
    ("model", "size", "frames", "tokens"),
    [("t2v-a14b", "480x480..1280x720", "17..81", 75_600), ("ti2v-5b", "480x480..1280x704", "17..121", 27_280)],
    ids=["a14b", "5b"],
)
def test_a_real_size_block_stays_within_kernels_and_scratch_memory(
    compiled, model, size, frames, tokens, target, precision
):
    report = compiled(model, target, precision, size, frames, layers=1)
    check_block(report, precision)
    assert report.compiled.tokens == tokens
    assert report.compiled.scratch_bytes <= SCRATCH_BYTES
    assert sum(k.role == "gemm" for k in report.typical_block) == 7


def test_flops_of_a_block_are_those_of_the_formulas(compiled):
    report = compiled("t2v-a14b-tiny", "rtx4090", Precision.FP8, "256x160", "17", layers=1)
    width, ffn, tokens, text = 256, 512, 800, 512
    linears = 2 * tokens * (6 * width**2 + 2 * width * ffn) + 4 * text * width**2
    attention = 4 * tokens**2 * width + 4 * tokens * text * width
    assert sum(k.flops for k in report.typical_block) == pytest.approx(linears + attention)


def test_the_report_is_told_in_text_json_and_html(compiled):
    report = compiled("t2v-a14b-tiny", "rtx4090", Precision.FP8_ATTN)
    told = json.loads(json.dumps(report.as_json()))
    assert told["attention"] == {"fp8": 4}
    assert len(told["all_kernels"]) == told["kernels"]
    assert len(as_text(report)) == 2
    page = as_html([report], "Fusion <of> tiny")
    assert "Fusion &lt;of&gt; tiny" in page
    assert page.count('class="bar') == len(report.typical_block)
    roles = {kernel.role for kernel in report.typical_block}
    assert all(f'<i class="{role}"></i>{role}' in page for role in roles)
    assert "prefers-color-scheme: dark" in page
    assert by_dtype({"bf16": 1, "fp8": 7}) == "7 fp8, 1 bf16"


# -- faults, in logs that the compiler does not write for our graphs

EDGES = "I/O Tensors:\n Name: rope_cos, IOMode: Input, DataType: Float, MaxShape: [5,10,16,64], Format"


def kernel(name, kind="kgen", inputs=(), outputs=(), nodes=()):
    def told(operands):
        return ", ".join(
            f"{{ Name: {n}, Dimensions: [{d}], Strides: [1], Datatype: {t}, Format: x }}" for n, d, t in operands
        )

    layers = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {name}_myl0_0, LayerType: {kind}, Inputs: [ {told(inputs)}], Constants: [], "
        f"Outputs: [ {told(outputs)}], TacticName: t, StreamId: 0, Metadata: {layers}\n"
    )


def report_of(*lines):
    return FusionReport("dit", TARGETS["rtx4090"], parse("Layers:\n" + "".join(lines) + EDGES), Precision.FP8)


@pytest.mark.parametrize("dims", ["40,-1,-1", "40,800,800"])
def test_a_matrix_of_tokens_times_tokens_is_an_error(dims):
    line = kernel("__myl_Fc", outputs=[("s", dims, "BFloat16")], nodes=["blocks.0/self_attn/MatMul"])
    assert report_of(line).problems == [
        "__myl_Fc_myl0_0 writes tokens x tokens: [40, 800, 800] bf16, 48.83 MiB",
    ]


@pytest.mark.parametrize(("tokens", "problems"), [(32, 0), (4096, 1)])
def test_few_tokens_may_be_as_many_as_another_dimension(tokens, problems):
    edges = f"I/O Tensors:\n Name: rope_cos, IOMode: Input, DataType: Float, MaxShape: [1,1,{tokens},64], Format"
    line = kernel("qkv/Gemm", "gemm", outputs=[("small", f"{tokens},{tokens}", "BFloat16")])
    report = FusionReport("dit", TARGETS["rtx5090"], parse(f"Layers:\n{line}{edges}"), Precision.NVFP4)
    assert len(report.problems) == problems


def test_softmax_outside_an_attention_kernel_is_an_error():
    line = kernel("__myl_MaxrSubExpSoft", nodes=["blocks.0/self_attn/Softmax"])
    report = report_of(line)
    assert report.problems == ["blocks.0/self_attn/Softmax is not inside an attention kernel"]
    assert [str(each) for each in problems_as_text([report, report])] == [f"problem: dit: {report.problems[0]}"] * 2


@pytest.mark.parametrize(("name", "kind"), [("blocks.0/ffn/0/MatMul", "gemm"), ("_gemm_mha_v2", "kgen")])
def test_fp8_that_was_lost_is_an_error(name, kind):
    nodes = ["blocks.0/ffn/0/MatMul", "blocks.0/ffn/0/DequantizeLinear_1"]
    ends = {"inputs": [(n, "8,8", "BFloat16") for n in "abc"], "outputs": [("y", "8,8", "BFloat16")]}
    assert "multiplies bf16 instead of FP8" in report_of(kernel(name, kind, nodes=nodes, **ends)).problems[0]


def test_large_copies_are_listed_and_small_ones_are_not():
    large = kernel("__myl_TranCast", inputs=[("a", "4096,8192", "Float")], outputs=[("b", "8192,4096", "Half")])
    small = kernel("__myl_Cast", inputs=[("a", "512,64", "Float")], outputs=[("b", "512,64", "Half")])
    report = report_of(large, small)
    assert [k.steps for k in report.unfused] == [["Tran", "Cast"]]
    assert report.summary()["copies"] == 2


def test_a_kernel_that_joins_all_blocks_belongs_to_none():
    nodes = [f"blocks.{n}/cross_attn/k/Gemm" for n in range(3)]
    ends = {"inputs": [("a", "8,8", "Half")], "outputs": [("y", "8,24", "Half")]}
    assert [k.block for k in report_of(kernel("kv", "gemm", nodes=nodes, **ends)).compiled.kernels] == ["all blocks"]


def test_a_log_of_a_build_that_failed_is_refused():
    with pytest.raises(UserError, match="lists no compiled kernels"):
        parse("[ERROR] it went wrong")
