"""Plans of several GPUs: published runs within the stated error, and a reasoned choice."""

import json
from dataclasses import replace

import pytest

from engines.group_plan import GroupPlan, best, group_plans, high_noise_steps, link_gb_s, reason, usual_link
from engines.plan import make_plan
from engines.targets import TARGETS
from wan22.errors import UserError
from wan22.parallel import Split
from wan22.precision import Precision
from wan22.specs import SPECS, T2V_A14B, TI2V_5B
from wan_trt.cli import app

HD, SD = (1280, 720, 81), (832, 480, 81)
PUBLISHED = [  # model, GPU, video, link, seconds on 1, 4 and 8 GPUs, largest error of the model of cost
    (T2V_A14B, "h100", HD, "nvlink", (1041.5, 288.7, 155.1), 0.06),
    (T2V_A14B, "h100", SD, "nvlink", (326.9, 91.7, 51.5), 0.06),
    (TI2V_5B, "rtx4090", (1280, 704, 121), "pcie4", (534.7, 231.3, 157.2), 0.25),
]


def plan(spec=T2V_A14B, target="h100", precision=Precision.BF16, video=HD, steps=None):
    return make_plan(spec, TARGETS[target], precision, video, steps)


@pytest.mark.parametrize(("spec", "target", "video", "link", "seconds", "error"), PUBLISHED)
def test_runs_of_the_official_code(spec, target, video, link, seconds, error):
    one = plan(spec, target, video=video)
    efficiency = one.video_seconds / seconds[0]
    for gpus, published in zip((4, 8), seconds[1:], strict=True):
        found = GroupPlan(one, Split(ulysses=gpus), gpus, link, efficiency).video_seconds
        assert published * (1 - error) <= found <= published


def test_the_audited_latency_of_eight_gpus():
    """MLPerf v6.1, 8 B300: 128.6 GPU-seconds a video alone, 17.98 s together; a B200 stands for them."""
    one = plan(target="b200", precision=Precision.FP8_ATTN, steps=20)
    split = Split(cfg=2, ulysses=4, vae=8)
    together = GroupPlan(one, split, 8, "nvlink", one.video_seconds / 128.6)
    assert together.video_seconds == pytest.approx(17.98, rel=0.065)
    assert together.efficiency_of_scaling == pytest.approx(128.6 / (8 * 17.98), abs=0.06)


def test_latency_divides_guidance_and_tokens_and_throughput_nothing():
    plans = group_plans(plan(precision=Precision.FP8_ATTN, steps=20), 8, "nvlink", 0.5)
    first, most = best(plans, "latency"), best(plans, "throughput")
    assert str(first.split) == "cfg2,ulysses4,vae8"
    assert "guidance" in reason(first, "latency")
    assert "over nvlink" in reason(first, "latency")
    assert (most.split, most.replicas) == (Split(), 8)
    assert [each.video_seconds for each in plans] == sorted(each.video_seconds for each in plans)


def test_memory_and_traffic_of_a_gpu():
    one = plan(precision=Precision.FP8_ATTN)
    alone, four, experts = (
        GroupPlan(one, split, split.members, "nvlink") for split in (Split(), Split(ulysses=4), Split(experts=2))
    )
    assert four.memory_bytes < alone.memory_bytes
    assert experts.memory_bytes < alone.memory_bytes
    assert four.forward_bytes == pytest.approx(40 * 363e6, rel=5e-3)
    assert (alone.step_bytes, GroupPlan(one, Split(cfg=2), 2, "nvlink").step_bytes) == (0, 4 * 16 * 21 * 90 * 160)
    assert experts.videos_per_hour > GroupPlan(one, Split(), 1, "nvlink").videos_per_hour


@pytest.mark.parametrize(("name", "first"), [("t2v-a14b", 26), ("i2v-a14b", 15), ("ti2v-5b", 40)])
def test_the_steps_of_each_expert_are_those_of_the_schedule(name, first):
    assert high_noise_steps(SPECS[name], 40) == first


def test_links():
    assert [usual_link(TARGETS[name]) for name in ("h100", "rtx4090", "rtx5090", "l40s")] == [
        "nvlink", "pcie4", "pcie5", "pcie4",
    ]  # fmt: skip
    assert link_gb_s(TARGETS["rtx4090"], "pcie4") == 0.5 * link_gb_s(TARGETS["l40s"], "pcie4")
    with pytest.raises(UserError, match="it has no NVLink"):
        link_gb_s(TARGETS["rtx4090"], "nvlink")


def test_the_command(capsys):
    def run(*words):
        with pytest.raises(SystemExit) as left:
            app(["plan", "t2v-a14b", *words])
        return left.value.code, *capsys.readouterr()

    code, told, _ = run("--target", "h100", "--gpus", "8", "--precision", "fp8-attn", "--json")
    found = json.loads(told)
    assert code == 0
    assert found["best"]["latency"]["split"] == "cfg2,ulysses4,vae8"
    assert {each["split"] for each in found["splits"]} >= {"one", "experts", "ulysses8,vae8"}
    code, told, _ = run("--target", "rtx4090", "--parallel", "cfg2", "--link", "pcie5")
    assert (code, "cfg2" in told, "pcie5 25 GB/s" in " ".join(told.split())) == (0, True, True)
    for words, line in (
        (("--target", "h100", "--parallel", "ulysses3"), "expected a number that divides them: 2, 4, 5, 8"),
        (("--target", "h100", "--parallel", "cfg2", "--gpus", "3"), "expected a multiple of 2"),
        (("--target", "cpu", "--gpus", "2"), "a GPU whose figures are known"),
        (("--target", "rtx4090", "--gpus", "2", "--link", "nvlink"), "it has no NVLink"),
        (("--cards", "--gpus", "2"), "all cards, each alone"),
    ):
        code, _, told = run(*words)
        assert (code, line in told) == (2, True), told


@pytest.mark.parametrize(
    "words",
    [
        ("i2v-a14b", "--target", "rtx-pro-6000-blackwell", "--precision", "nvfp4-ffn+fp8-attn", "--efficiency", "0.37"),
        ("t2v-a14b", "--target", "h100", "--precision", "fp8-attn", "--size", "1280x720"),
        ("t2v-a14b", "--target", "rtx4090", "--precision", "bf16", "--size", "1280x720"),
        ("ti2v-5b", "--target", "rtx4060", "--precision", "bf16"),
    ],
)
def test_the_table_fits_a_terminal_of_80_columns(capsys, words):
    with pytest.raises(SystemExit):
        app(["plan", *words, "--gpus", "8"])
    told = capsys.readouterr().out
    assert "experts" in told or words[0] == "ti2v-5b"
    assert [line for line in told.splitlines() if len(line) > 80] == []
    assert "e+0" not in told


def test_a_plan_that_does_not_fit_says_so():
    small = GroupPlan(plan(target="rtx4060", precision=Precision.BF16), Split(), 1, "pcie4")
    assert not small.fits
    assert best([small, replace(small, split=Split(ulysses=2), gpus=2)], "latency") is None
