"""Plans agree with the facts about the models, and say what fits."""

import json
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from engines.block_weights import layout_of
from engines.plan import card_plans, dit_scratch_bytes, dit_weights_bytes, make_plan
from engines.plan_view import as_text, cards_as_text
from engines.targets import TARGETS, target_named
from export.graphs.blocks import stage_graphs
from export.graphs.builder import BFLOAT16
from export.graphs.dit import dit_graph
from export.graphs.weights_file import declare_weights
from export.precisions import usual_quantised
from wan22.block_memory import block_step_bytes
from wan22.component import File
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.quantities import human_bytes
from wan22.specs import SPECS, T2V_A14B, TI2V_5B

FP8 = Precision.FP8
HD, SD = (1280, 720, 81), (832, 480, 81)


@pytest.mark.parametrize(
    ("spec", "video", "petaflop"), [(T2V_A14B, HD, 522), (T2V_A14B, SD, 134), (TI2V_5B, (1280, 704, 121), 52)]
)
def test_arithmetic_of_a_whole_video(spec, video, petaflop):
    plan = make_plan(spec, TARGETS["h100"], Precision.BF16, video)
    assert plan.request.steps * plan.step_flops / 1e15 == pytest.approx(petaflop, rel=6e-3)


@pytest.mark.parametrize("precision", [p for p in Precision if p.wide is Precision.BF16])
@pytest.mark.parametrize("name", ["t2v-a14b", "i2v-a14b", "ti2v-5b"])
def test_weights_are_what_the_graph_stores(name, precision):
    """All but the scalar scales of FP8 attention, a few hundred bytes."""
    spec = SPECS[name].dit
    graph = dit_graph(spec, BFLOAT16, None, usual_quantised(precision))
    stored = sum(s.size_bytes for s in declare_weights([graph]).values())
    assert dit_weights_bytes(spec, precision) == pytest.approx(stored, abs=4096)


@pytest.mark.parametrize("precision", [Precision.NVFP4, Precision.NVFP4_FFN_FP8_ATTN], ids=str)
@pytest.mark.parametrize("spec", [T2V_A14B, TI2V_5B], ids=["a14b", "5b"])
def test_branches_take_what_the_graph_and_the_blocks_store(spec, precision):
    quantised = replace(usual_quantised(precision), low_rank=32)
    declared = declare_weights([dit_graph(spec.dit, BFLOAT16, None, quantised)])
    stored = sum(each.size_bytes for each in declared.values())
    assert dit_weights_bytes(spec.dit, precision, 32) == pytest.approx(stored, abs=4096)
    stages = [g.stage(File("", "", 0)) for g in stage_graphs(spec.dit, BFLOAT16, quantised).values() if g.groups == 1]
    read = layout_of(stages, spec.dit.layers).step_bytes
    assert block_step_bytes(spec.dit, precision, 32) == pytest.approx(read, rel=1e-3)
    plan = make_plan(spec, TARGETS["rtx5090"], precision)
    beside = replace(plan, request=replace(plan.request, low_rank=32))
    assert beside.in_blocks.block_bytes == block_step_bytes(spec.dit, precision, 32)
    assert beside.weights_bytes[spec.experts[0]] == dit_weights_bytes(spec.dit, precision, 32)
    assert beside.in_blocks.least_bytes > plan.in_blocks.least_bytes
    branches = [each.shape for name, each in declared.items() if "low_rank" in name and "cross_attn.kv" not in name]
    flops = 2 * 2 * plan.tokens * sum(math.prod(shape) for shape in branches)  # with and without guidance
    longer = flops / (plan.request.target.bf16_tflops * 1e12)
    assert beside.step_seconds - plan.step_seconds == pytest.approx(longer, rel=1e-6)


@pytest.mark.parametrize(
    ("spec", "count", "built_bytes"),
    [
        (T2V_A14B, 75_600, {Precision.BF16: 7.813e9, Precision.FP8: 7.029e9, Precision.FP8_ATTN: 6.640e9}),
        (TI2V_5B, 27_280, {Precision.BF16: 1.821e9, Precision.FP8: 2.039e9, Precision.FP8_ATTN: 2.038e9}),
    ],
    ids=["a14b", "5b"],
)
def test_scratch_memory_is_near_that_of_three_block_builds(spec, count, built_bytes):
    """Built with TensorRT-RTX 1.7.1 for SM89."""
    for precision, built in built_bytes.items():
        assert dit_scratch_bytes(spec.dit, count, precision) == pytest.approx(built, rel=0.15)


@pytest.mark.parametrize(("rank", "built_bytes"), [(0, 2.262e9), (32, 2.885e9)])
def test_scratch_memory_of_nvfp4_is_near_that_of_two_block_builds(rank, built_bytes):
    """Built with TensorRT-RTX 1.7.1 for SM120."""
    assert dit_scratch_bytes(TI2V_5B.dit, 27_280, Precision.NVFP4, rank) == pytest.approx(built_bytes, rel=0.05)


def test_the_experts_of_720p_do_not_share_a_4090_but_one_in_fp8_runs():
    plan = make_plan(T2V_A14B, TARGETS["rtx4090"], Precision.FP8_ATTN, HD)
    assert plan.fits == {
        "everything resident": False,
        "one expert resident": False,
        "one component at a time": True,
    }


def test_both_experts_share_a_b200():
    assert all(make_plan(T2V_A14B, TARGETS["b200"], Precision.BF16, HD).fits.values())


def test_a_model_with_one_transformer_has_no_choice_of_experts():
    assert "one expert resident" not in make_plan(TI2V_5B, TARGETS["rtx5090"], Precision.FP8).vram


def test_a_faster_type_takes_less_time_and_fewer_bytes():
    plans = [
        make_plan(T2V_A14B, TARGETS["rtx5090"], p, SD) for p in (Precision.BF16, Precision.FP8, Precision.FP8_ATTN)
    ]
    times, sizes = ([getattr(plan, name) for plan in plans] for name in ("step_seconds", "bundle_bytes"))
    assert times == sorted(times, reverse=True)
    assert times[0] / times[2] == pytest.approx(2, rel=0.01)
    assert sizes[0] > 1.5 * sizes[1]


def test_a_mixture_takes_the_time_of_its_linears():
    both = (Precision.NVFP4, Precision.NVFP4_FFN, Precision.INT8)
    nvfp4, mixed, int8 = (make_plan(T2V_A14B, TARGETS["rtx5090"], p, SD).step_seconds for p in both)
    assert nvfp4 < mixed < int8
    shares = 4 * 13824 / (12 * 5120 + 4 * 13824)  # of the feed-forward in the linears of a token (wan22.md §2.8)
    assert (int8 - mixed) / (int8 - nvfp4) == pytest.approx(shares, rel=0.02)  # the text's linears are the rest


def test_the_cpu_has_no_figures_for_time():
    plan = make_plan(SPECS["t2v-a14b-tiny"], TARGETS["cpu"], Precision.FP32)
    assert (plan.step_seconds, plan.video_seconds) == (None, None)


def test_a_limit_for_blocks_shows_no_residency_of_whole_engines():
    console = Console(record=True, width=200)
    console.print(*as_text(make_plan(TI2V_5B, TARGETS["rtx5090"], Precision.FP8, vram=8 * 2**30)))
    text = console.export_text()
    assert "resident blocks" in text
    assert "whole, " not in text
    assert "--residency" not in text


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_every_target_has_a_plan_that_says_what_auto_chooses(target):
    plan = make_plan(TI2V_5B, target, target.default_precision)
    console = Console(record=True, width=200)
    console.print(*as_text(plan))
    text = console.export_text()
    assert ("whole, " in text) == plan.has_blocks == ("resident blocks" in text)
    if target.name == "cpu":
        assert "--residency auto" not in text
    elif plan.residency is None and plan.has_blocks:
        assert re.search(r"--residency auto\W+nothing fits", text)
    elif plan.residency is None:
        assert f"nothing fits {human_bytes(plan.usable_vram_bytes)}: vae_decoder_next alone takes 20.79 GiB, " in text
        assert "12.02 GiB of it caches and frames" in text
    else:
        assert plan.needed[plan.residency] <= plan.usable_vram_bytes
        assert "--residency auto" in text
    assert plan.as_json()["residency"] == plan.residency


def test_the_table_of_cards_follows_the_bus_and_the_size():
    small, large = (card_plans(T2V_A14B, Precision.FP8_ATTN, video, bus_gb_s=0.5) for video in (SD, HD))
    assert {plan.request.target.name for plan in small} == {t.name for t in TARGETS.values() if t.fp8_tflops}
    by_name = {plan.request.target.name: plan.in_blocks for plan in small}
    assert by_name["rtx4060"].streamed_forward_seconds == by_name["rtx4060"].forward_seconds  # 600 of 695 ms a block
    assert by_name["rtx5080"].resident < 40
    assert by_name["rtx5080"].streamed_forward_seconds > 1.3 * by_name["rtx5080"].forward_seconds
    assert [plan.in_blocks.resident for plan in large] <= [plan.in_blocks.resident for plan in small]
    table, *_ = cards_as_text(large)
    assert list(table.columns[0].cells) == [plan.request.target.name for plan in large]


def test_without_a_precision_every_card_is_listed_in_the_recommended_one():
    plans = card_plans(T2V_A14B, None, HD)
    named = {plan.request.target.name: plan for plan in plans}
    assert named.keys() == {t.name for t in TARGETS.values() if t.backend.startswith("tensorrt")}
    assert all(p.request.precision == p.request.target.recommended_precision for p in plans)
    text = " ".join(part for part in cards_as_text(plans) if isinstance(part, str))
    assert "int8+fp8-attn, int8 on rtx3090, a10g, a100" in text
    least = sorted(plan.in_blocks.least_bytes for plan in plans)
    assert f"at least {human_bytes(least[0])} to {human_bytes(least[-1])}" in text


def test_the_bus_shows_where_blocks_stream():
    def told(bus, vram=None):
        console = Console(record=True, width=160)
        console.print(*as_text(make_plan(T2V_A14B, TARGETS["rtx4090"], Precision.BF16, HD, None, vram, bus)))
        return [line.split() for line in console.export_text().splitlines() if "copy of a block" in line]

    (slow,), (fast,) = told(0.5), told(25)
    assert (slow[-4:-1], fast[-2]) == (["not", "all", "hidden"], "hidden")
    assert told(25, 80 * 2**30) == []  # nothing streams


def test_a_compute_capability_has_sizes_and_no_verdicts():
    plan = make_plan(T2V_A14B, target_named("sm89"), FP8, SD)
    assert (plan.residency, plan.step_seconds) == (None, None)
    console = Console(record=True, width=160)
    console.print(*as_text(plan))
    assert "no figures for sm89" in console.export_text()
    assert "fits" not in console.export_text()


def test_a_precision_that_the_target_lacks_is_refused():
    with pytest.raises(UserError, match="a100"):
        make_plan(T2V_A14B, TARGETS["a100"], Precision.FP8)


def test_a_size_that_the_model_cannot_make_is_refused():
    with pytest.raises(UserError, match="size 1280x700"):
        make_plan(T2V_A14B, TARGETS["h100"], Precision.BF16, (1280, 700, 81))


@pytest.mark.parametrize("target", ["rtx4090", "cpu"])
def test_a_plan_is_told_in_text_and_json(target):
    precision = Precision.FP8 if target == "rtx4090" else Precision.FP32
    plan = make_plan(TI2V_5B, TARGETS[target], precision)
    told = json.loads(json.dumps(plan.as_json()))
    assert told["forward_pflop"]["total"] == pytest.approx(0.517, abs=1e-3)
    console = Console(record=True, width=160)
    console.print(*as_text(plan))
    text = console.export_text()
    assert "4,999,787,712" in text
    assert ("fits 22.56 GiB" in text) == (target == "rtx4090")
