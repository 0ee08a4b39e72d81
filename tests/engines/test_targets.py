"""The target table and what it refuses."""

import pytest

from engines import targets
from engines.targets import TARGETS, check_precision, detect, target_named
from wan22.errors import UserError
from wan22.precision import Precision

GPUS = [target for target in TARGETS.values() if target.name != "cpu"]


def test_the_table_holds_every_target_of_the_product():
    wanted = "a100 a10g l40 l40s l4 h100 h20 h200 b200 rtx3090 rtx4090 rtx4080 rtx4070ti rtx4070 rtx4060 rtx5090"
    wanted += " rtx5080 rtx5070 gb10 cpu rtx-pro-6000-blackwell"
    assert set(TARGETS) == set(wanted.split())


def test_an_unknown_target_lists_the_choices():
    with pytest.raises(UserError, match=r"target 'rtx9090' \| expected one of a100, .*rtx5090.*, cpu, auto"):
        target_named("rtx9090")


@pytest.mark.parametrize("name", ["a100", "rtx3090"])
def test_fp8_on_ampere_names_the_precision_to_use_instead(name):
    for refused in (Precision.FP8, Precision.FP8_ATTN, Precision.INT8_FP8_ATTN):
        with pytest.raises(UserError, match=r"no FP8 units.*use --precision int8$"):
            check_precision(TARGETS[name], refused)


def test_int8_is_recommended_where_it_is_as_fast_as_anything():
    found = {name: TARGETS[name].recommended_precision for name in ("rtx3090", "a100", "rtx4090", "h100", "cpu")}
    assert found == {
        "rtx3090": Precision.INT8, "a100": Precision.INT8, "rtx4090": Precision.INT8_FP8_ATTN,
        "h100": Precision.INT8_FP8_ATTN, "cpu": Precision.FP32,
    }  # fmt: skip


def test_the_cpu_computes_fp32_only_among_the_wide_ones():
    check_precision(TARGETS["cpu"], Precision.FP32)
    with pytest.raises(UserError, match="use --precision fp32"):
        check_precision(TARGETS["cpu"], Precision.BF16)


@pytest.mark.parametrize("target", [t for t in GPUS if t.fp8_tflops], ids=lambda t: t.name)
def test_dense_fp8_is_twice_dense_bf16(target):
    """A sparse figure slipped into one of the columns would break the ratio that all tensor cores have."""
    assert target.fp8_tflops / target.bf16_tflops == pytest.approx(2, rel=0.02)
    check_precision(target, Precision.FP8)


@pytest.mark.parametrize("target", GPUS, ids=lambda t: t.name)
def test_dense_int8_is_in_the_ratio_of_its_architecture(target):
    """GeForce from Ada on multiplies INT8 at twice the rate of FP8 with float32 accumulation, all others alike."""
    geforce = target.product.startswith("GeForce")
    ratio = 4 if geforce else 2
    assert target.int8_tflops / target.bf16_tflops == pytest.approx(ratio, rel=0.02)
    if target.fp4_tflops:
        assert target.fp4_tflops / target.int8_tflops == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("target", GPUS, ids=lambda t: t.name)
def test_every_figure_of_a_gpu_has_a_source(target):
    assert target.source.startswith("NVIDIA")
    assert min(target.memory_gib, target.bandwidth_gb_s, target.fp32_tflops, target.bf16_tflops) > 0


def test_hopper_and_data_centre_blackwell_are_not_offered_to_tensorrt_rtx():
    assert {t.backend for t in GPUS if t.compute_capability in ("8.0", "9.0", "10.0")} == {"tensorrt"}


@pytest.mark.parametrize(
    ("name", "capability", "target"),
    [
        ("NVIDIA GeForce RTX 4090", "8.9", "rtx4090"),
        ("NVIDIA H100 80GB HBM3", "9.0", "h100"),
        ("NVIDIA L40S", "8.9", "l40s"),
        ("NVIDIA L4", "8.9", "l4"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "12.0", "rtx-pro-6000-blackwell"),
        ("NVIDIA GB10", "12.1", "gb10"),
        ("NVIDIA GeForce RTX 4080", "8.9", "rtx4080"),
        ("NVIDIA GeForce RTX 4070 Ti", "8.9", "rtx4070ti"),
        ("NVIDIA GeForce RTX 5080", "12.0", "rtx5080"),
        ("NVIDIA A10G", "8.6", "a10g"),
        ("NVIDIA L40", "8.9", "l40"),
        ("NVIDIA H20", "9.0", "h20"),
        ("NVIDIA H200", "9.0", "h200"),
    ],
)
def test_auto_knows_the_gpu_by_its_name(name, capability, target):
    assert detect([(name, capability)]).name == target


def test_auto_without_a_gpu_is_the_cpu(monkeypatch):
    monkeypatch.setattr(targets, "QUERY_GPU", ("no-such-program-anywhere",))
    assert target_named("auto").name == "cpu"


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4070 SUPER", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4080 SUPER"],
)
def test_auto_points_a_gpu_outside_the_table_to_its_sibling(name):
    with pytest.raises(UserError, match=r"RTX 40.*compute capability 8.9.*--target rtx4090"):
        detect([(name, "8.9")])


def test_a_gpu_that_nobody_listed_is_pointed_to_its_compute_capability():
    with pytest.raises(UserError, match=r"use --target sm103, of its compute capability"):
        detect([("NVIDIA B300", "10.3")])


@pytest.mark.parametrize(
    ("name", "capability", "backend"),
    [("sm86", "8.6", "tensorrt-rtx"), ("sm89", "8.9", "tensorrt-rtx"), ("SM90", "9.0", "tensorrt")],
)
def test_a_compute_capability_is_a_target_without_figures(name, capability, backend):
    target = target_named(name)
    assert (target.compute_capability, target.backend, target.sm) == (capability, backend, name.upper())
    assert (Precision.FP8 in target.precisions) == (capability != "8.6")
    assert target.peak_tflops(Precision.BF16) is None


@pytest.mark.parametrize("target", GPUS, ids=lambda t: t.name)
def test_every_gpu_has_fp8_figures_exactly_where_it_has_fp8_units(target):
    assert (target.fp8_tflops is not None) == (Precision.FP8 in target.precisions)


def test_fp32_needs_another_text_encoder_on_tensorrt_rtx():
    assert TARGETS["rtx4090"].text_encoder_precision(Precision.FP32) == Precision.BF16
    assert TARGETS["h100"].text_encoder_precision(Precision.FP32) == Precision.FP32


def test_auto_reads_what_nvidia_smi_prints(monkeypatch):
    monkeypatch.setattr(targets, "QUERY_GPU", ("printf", "NVIDIA A100-SXM4-80GB, 8.0\nNVIDIA T4, 7.5\n"))
    assert target_named("auto").name == "a100"
