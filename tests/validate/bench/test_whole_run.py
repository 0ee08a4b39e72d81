"""Figures derived from the events of an end-to-end run."""

import pytest

from runtime.block_stream import Streamed
from validate.bench.whole_run import Event, Run, Runs, in_turns, step_ratio, total_ratio


def events(step_s=1.0):
    yield Event("open", "text_encoder", 50.0)
    yield Event("text", "text_encoder", 0.5)
    yield Event("image", "vae_encoder", 0.5)
    yield Event("step", "high_noise", 3 * step_s, 2.9 * step_s)  # warms up
    yield Event("step", "high_noise", step_s, 0.9 * step_s)
    yield Event("swap", "low_noise", 7.0)
    yield Event("step", "low_noise", step_s, 0.9 * step_s)
    yield Event("decode", "vae_decoder", 1.0)
    yield Event("decode", "vae_decoder", 3.0)


def run(step_s=1.0):
    return Run(tuple(events(step_s)))


def test_loading_is_reported_separately():
    figures = run().figures()
    assert figures["total_s"] == 10.0
    assert figures["first_frame_s"] == 7.0
    assert figures["denoise_s"] == 5.0
    assert figures["open_s"] == 50.0
    assert figures["expert_swap_s"] == 7.0
    assert figures["vae_share_percent"] == pytest.approx(45.0)


def test_host_overhead_is_what_a_step_spends_outside_its_forwards():
    figures = run().figures()
    assert figures["host_overhead_ms"] == pytest.approx(100)
    assert figures["host_overhead_percent"] == pytest.approx(10)


def test_a_model_with_one_expert_has_no_swap():
    assert "expert_swap_s" not in Run(tuple(event for event in events() if event.kind != "swap")).figures()


def test_copies_are_counted_a_step_without_the_first_which_brings_what_stays():
    def step(expert, size_bytes, copied, waited, at_switch=0.0):
        return Event("step", expert, 2.0, 1.0, Streamed(1, size_bytes, copied, waited, at_switch, int(at_switch > 0)))

    steps = [step("high_noise", 900, 9.0, 9.0), step("high_noise", 100, 1.0, 0.25)]
    steps.append(step("low_noise", 100, 1.0, 0.25, 0.125))
    figures = Run((*steps, Event("decode", "vae_decoder", 1.0))).figures()
    assert figures["streamed_step_bytes"] == 100
    assert (figures["stream_hidden_step_ms"], figures["stream_stall_step_ms"]) == (750, 250)
    assert figures["switch_stall_ms"] == 125
    assert "switch_stall_ms" not in run().figures()


def test_figures_of_several_runs_are_medians():
    runs = Runs((run(1.0), run(2.0), run(4.0)))
    assert runs.totals_s == [10.0, 15.0, 25.0]
    assert runs.figures()["total_s"] == 15.0
    assert runs.figures()["total_p90_s"] == pytest.approx(23.0)
    assert [step.seconds for step in runs.steps] == [6.0, 2.0, 2.0]
    assert [step["expert"] for step in runs.as_json()["steps"]] == ["high_noise", "high_noise", "low_noise"]


def test_runs_alternate_event_by_event_also_when_one_has_more():
    order, calls = [], []

    def run_events(name, count):
        for index in range(count):
            order.append(f"{name}{index}")
            yield Event("step", "dit", 1.0)

    found = in_turns({"a": run_events("a", 3), "b": run_events("b", 2)}, lambda: calls.append(1))
    assert order == ["a0", "b0", "a1", "b1", "a2"]
    assert {name: len(run.events) for name, run in found.items()} == {"a": 3, "b": 2}
    assert len(calls) == 3


def test_ratios_are_of_steps_and_of_totals():
    theirs, ours = Runs((run(2.0), run(2.0))), Runs((run(1.0), run(1.0)))
    assert step_ratio(theirs, ours).median == 2.0
    assert total_ratio(theirs, ours).median == 1.5
