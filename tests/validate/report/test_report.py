"""The content of the report, for programs and for people."""

import io
import json
import math
import re
import shutil
from dataclasses import replace
from functools import partial
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from validate.gate import Gate, distinct_text
from validate.ladder.metrics import compare, incomparable
from validate.ladder.row import Row
from validate.ladder.thresholds import FP32, TOKEN_IDS, Limit
from validate.plots import DARK, LIGHT, drift_plot, filmstrip, to_pixels
from validate.report.case_report import CaseReport
from validate.report.extras import Attachments
from validate.report.report import ValidationReport, write_report
from validate.report.text import margin, measure_text, number
from validate.report.to_html import as_html, headlines, sections, status_lights
from validate.report.to_json import as_json
from validate.report.to_junit import as_junit
from validate.report.to_markdown import as_markdown
from validate.report.worst import worst_values
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.files import claim

FACTS = {"model": "t2v-a14b-tiny", "precision": "fp32", "target": "cpu", "prompt": "<script>alert('fox')</script>"}


def off_by(share):
    """Metrics of a tensor with a relative error of ``share``."""
    return compare(np.array([1.0 + share, 0.0]), np.array([1.0, 0.0]))


def step(number, expert, metrics):
    name, t = f"latents after step {number}", 1000 - 100.0 * number
    return Row(name, expert, metrics, FP32.latents, "", number, t, subject="latents")


def report_of(*drifts):
    rows = [Row("token ids, prompt", "tokenizer", compare([1, 2], [1, 2]), TOKEN_IDS)]
    for index, drift in enumerate(drifts, 1):
        metrics = incomparable("ours: NaN") if math.isnan(drift) else off_by(drift)
        rows.append(step(index, "high_noise" if index < 3 else "low_noise", metrics))
    return ValidationReport((CaseReport(tuple(rows)),), FACTS)


def written(report, folder):
    with claim(folder / "report.json", "the report") as claimed:
        write_report(report, claimed)


def test_a_report_is_true_when_every_row_passed():
    assert report_of(1e-6, 1e-5)
    assert not report_of(1e-6, 2e-3)
    assert not report_of(math.nan)
    assert not ValidationReport((CaseReport(()),), FACTS)


def test_the_first_diverging_step_is_named():
    failed = report_of(1e-6, 1e-5, 2e-3, 1e-2)
    assert failed.first_diverging_step.step == 3
    assert failed.summary() == (
        "2 of 5 checks failed, the first: latents after step 3 (low_noise); first diverging step: 3, t = 700, low_noise"
    )
    page = as_html(failed)
    assert "First diverging step: <b>3 of 4</b>, t = 700, low_noise." in page


def test_the_json_can_be_read_by_any_reader(tmp_path):
    written(report_of(1e-6, math.nan), tmp_path / "new" / "folder")
    text = (tmp_path / "new" / "folder" / "report.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)  # bare NaN or Infinity is not JSON
    assert found["passed"] is False
    assert found["first_diverging_step"] == 2
    assert found["rows"][2]["metrics"]["relative_l2"] == "nan"
    assert found["rows"][2]["metrics"]["problem"] == "ours: NaN"
    assert found["rows"][1]["limit"] == 1e-3
    assert found["facts"] == FACTS


def test_the_first_nan_is_named_by_tensor_and_step():
    met = incomparable("reference: velocity of high_noise in step 2 of 3 (t = 800) has NaN or infinity")
    later = Row("velocity at t = 999", "high_noise", incomparable("ours: NaN"), FP32.velocity)
    rows = (later, step(1, "high_noise", off_by(1e-6)), step(2, "high_noise", met))
    found = ValidationReport((CaseReport(rows),), FACTS)
    assert found.first_not_finite.step == 2
    assert found.summary().endswith(f"first not finite: latents after step 2 ({met.problem})")


def report_with(attached, *drifts):
    return replace(report_of(*drifts), attached=attached)


def test_a_missed_gate_fails_a_report_that_passed_every_check():
    gates = (Gate("latents.relative_l2", "max", 1e-6), Gate("checks.failed", "max", 0), Gate("ssim.ssim", "min", 0.9))
    found = report_with(Attachments(gates), 1e-7, 2e-6)
    assert not found.failed
    assert [bool(verdict) for verdict in found.verdicts] == [
        False,
        True,
        False,
    ]  # a gate without a measurement is missed
    assert not found
    assert "gate missed: latents.relative_l2 2e-06, ≤ 1e-06; gate missed: ssim.ssim not measured" in found.summary()
    assert json.loads(as_json(found))["gates"][0] == {
        "name": "latents.relative_l2", "bound": "max", "limit": 1e-6, "found": pytest.approx(2e-6), "passed": False,
    }  # fmt: skip


def test_the_page_has_a_light_for_every_part_of_the_release_decision():
    bench = {"measurements": {"high_noise.speedup": 1.5}, "faults": [], "pieces": {"high_noise": {}}}
    bench |= {"width": 64, "height": 64, "frames": 5, "tokens": 32, "machine": {"cpu": "Z80", "cores": 1, "gpu": ""}}
    bench |= {"conditions": {"command": "wan-trt bench engines --json b.json", "load_average": [0.1, 0.1]}}
    attached = Attachments((Gate("checks.failed", "max", 0),), (Gate("high_noise.speedup", "min", 2),), bench)
    found = report_with(attached, 1e-6)
    assert [(light.title, light.tone) for light in status_lights(found)] == [
        ("Parity", "good"), ("Gates", "bad"), ("Latency", "good"), ("Fusion", "none"),
    ]  # fmt: skip
    page = as_html(found)
    assert "high_noise.speedup" in page
    assert "Z80" in page
    assert "wan-trt bench engines --json b.json" in page
    busy = bench | {"conditions": {"load_average": [0.9, 0.1]}}
    (light,) = (each for each in status_lights(report_with(Attachments(bench=busy), 1e-6)) if each.title == "Latency")
    assert (light.tone, light.text) == ("none", "measured on a busy machine: measure again")


def test_the_page_begins_with_the_measures_of_the_video():
    metrics = replace(off_by(1e-5), psnr_db=81.5)
    rows = (step(1, "dit", off_by(1e-6)), step(2, "dit", off_by(2e-6)))
    video = Row("frames, end to end", "video", metrics, FP32.frames, subject="frames")
    found = ValidationReport((CaseReport((*rows, video)),), FACTS)
    assert [(label, line.found) for label, line in headlines(found.worst_case).items()] == [
        ("PSNR of the video, dB", "81.5"), ("last latents, rel L2", "2.0e-06"),
    ]  # fmt: skip
    page = as_html(found)
    assert page.index("PSNR of the video, dB") < page.index("Checks")


def test_the_page_gives_the_reason_of_every_limit():
    page = as_html(report_of(1e-6))
    for limit in (FP32.latents, TOKEN_IDS):
        assert limit.reason in page[page.index("Why these limits") :].replace("&#39;", "'")


def test_graphs_are_not_called_engines(tiny_bundle):
    manifest = open_bundle(tiny_bundle, "graphs").manifest
    page = as_html(report_with(Attachments(manifest=manifest), 1e-6))
    assert 'Graphs <span class="word">match</span> PyTorch' in page


def test_the_worst_of_several_cases_is_named():
    cases = []
    for case, psnr in ((1, 80.0), (2, 61.0), (3, 70.0)):
        metrics = replace(off_by(1e-5), psnr_db=psnr)
        video = Row("frames, end to end", "video", metrics, FP32.frames, subject="frames", case=case)
        cases.append(CaseReport((video,), case, "a fox", case, f"wan-trt validate --seed {case}"))
    found = ValidationReport(tuple(cases), FACTS)
    assert found.worst_case.number == 2
    assert worst_values(found.rows)["frames.psnr_db"] == 61
    for shown in (as_markdown(found), as_html(found)):
        assert "wan-trt validate --seed 2" in shown
        assert "--seed 3" not in shown


def test_a_gate_names_the_case_that_its_number_comes_from():
    drifts = {1: 1e-7, 2: 2e-6, 3: 1e-6}
    cases = tuple(
        CaseReport((step(1, "high_noise", off_by(drift)),), number, "a cat", number) for number, drift in drifts.items()
    )
    gates = (Gate("latents.relative_l2", "max", 1e-6), Gate("ssim.ssim", "min", 0.9), Gate("checks.failed", "max", 0))
    found = ValidationReport(cases, FACTS, Attachments(gates))
    assert str(found.verdicts[2]) == "checks.failed 0, ≤ 0"  # a sum over all cases
    assert found.summary().endswith(
        "gate missed: latents.relative_l2 2e-06 in case 2, ≤ 1e-06; gate missed: ssim.ssim not measured, ≥ 0.9"
    )
    assert json.loads(as_json(found))["gates"][0]["where"] == "case 2"
    assert "2e-06 in case 2" in as_html(found)


def test_junit_has_a_case_for_every_row_and_gate():
    found = report_with(Attachments((Gate("checks.failed", "max", 0),)), 1e-6, 5e-3)
    root = ElementTree.fromstring(as_junit(found))
    assert (root.get("tests"), root.get("failures")) == ("4", "2")
    failures = {case.get("name"): case[0].get("message") for case in root.iter("testcase") if len(case)}
    assert set(failures) == {"latents after step 2", "checks.failed.max"}
    assert failures["latents after step 2"].startswith("5.0e-03, limit ≤ 0.001 rel L2, 5.0× over: ")


def test_junit_adds_up_the_times_of_its_cases():
    rows = [replace(step(number, "dit", off_by(1e-6)), seconds=seconds) for number, seconds in ((1, 1.25), (2, 0.5))]
    text = Row("token ids, prompt", "tokenizer", compare([1, 2], [1, 2]), TOKEN_IDS, seconds=0.001)
    root = ElementTree.fromstring(as_junit(ValidationReport((CaseReport((text, *rows)),), FACTS)))
    assert [case.get("time") for case in root.iter("testcase")] == ["0.001", "1.250", "0.500"]
    assert ([suite.get("time") for suite in root], root.get("time")) == (["0.001", "1.750"], "1.751")


def test_junit_can_be_read_whatever_a_name_holds():
    row = Row("a\x00\x08<b>", "video", off_by(1.0), FP32.latents)
    root = ElementTree.fromstring(as_junit(ValidationReport((CaseReport((row,)),), FACTS)))
    assert next(root.iter("testcase")).get("name") == "a\ufffd\ufffd<b>"


def test_markdown_escapes_text():
    facts = FACTS | {"prompt": "a | b\n# c *d*"}
    shown = as_markdown(ValidationReport((CaseReport((step(1, "high_noise", off_by(1e-6)),)),), facts))
    assert "| prompt | a \\| b # c \\*d\\* |" in shown


def test_the_page_is_self_contained_and_escapes_text():
    page = as_html(report_of(1e-6, 1e-5, 1e-4))
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
    assert not re.findall(r"https?://|<link|@import|url\(", page)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|srcset)="([^"]{0,8})', page))


def test_files_are_replaced_atomically(tmp_path):
    written(report_of(1e-6), tmp_path)
    written(report_of(1e-2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md", "report.xml"]
    assert "differ from" in (tmp_path / "report.html").read_text()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the report"):
        written(report_of(1e-6), tmp_path / "file" / "report")


def test_a_report_whose_folder_is_gone_is_not_lost(tmp_path, monkeypatch):
    (tmp_path / "spare").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spare"))
    with claim(tmp_path / "out" / "report.json") as claimed:
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(UserError, match="spare/wan-trt-report-"):
            write_report(report_of(1e-6), claimed)
    (kept,) = tmp_path.glob("spare/wan-trt-report-*")
    assert sorted(path.name for path in kept.iterdir()) == ["report.html", "report.json", "report.md", "report.xml"]


def test_a_page_that_cannot_be_made_keeps_the_json(tmp_path, monkeypatch):
    def fails(_report):
        raise ZeroDivisionError

    monkeypatch.setattr("validate.report.report.as_html", fails)
    with pytest.raises(ZeroDivisionError):
        written(report_of(1e-6), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md", "report.xml"]


def test_the_terminal_gets_a_line_per_row():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report_of(1e-6, 2e-3).table())
    shown = console.export_text()
    assert shown.count("✓") == 2
    assert shown.count("✗") == 1
    assert "2.0× over" in shown


def test_sections_follow_the_subject_and_long_passed_ones_are_folded():
    found = sections(report_of(*[1e-6] * 20))
    assert [(section.title, section.open) for section in found] == [("Text", True), ("Latents, step by step", False)]
    assert sections(report_of(*[1e-6] * 19, 1.0))[1].open


@pytest.mark.parametrize(
    ("metrics", "limit", "expected"),
    [
        (off_by(1e-5), FP32.latents, "100× below"),
        (off_by(2e-3), FP32.latents, "2.0× over"),
        (off_by(0), FP32.latents, "equal"),
        (compare([1], [2]), TOKEN_IDS, "differs"),
        (incomparable("shape"), FP32.latents, "cannot be compared"),
        (compare([0.2], [0.0], signal_range=2.0), FP32.frames, "40 dB short"),
        (compare([0.2], [0.0], signal_range=2.0), Limit("psnr_db", 10, ""), "10 dB above"),
        (compare([0.2], [0.2], signal_range=2.0), FP32.frames, "identical"),
    ],
)
def test_margins_in_words(metrics, limit, expected):
    assert margin(Row("", "", metrics, limit)) == expected


def test_numbers_in_words():
    assert [number(value) for value in (0, 12.345, 1.5e-7, math.inf, math.nan)] == [
        "0",
        "12.3",
        "1.5e-07",
        "∞",
        "not a number",
    ]


def test_the_difference_of_frames_is_amplified_until_it_shows():
    reference = np.zeros((1, 3, 9, 8, 8), np.float32)
    ours = reference.copy()
    ours[0, :, 4] = 3e-5
    strip = filmstrip(ours, reference)
    assert strip.amplification == 1e5  # 3e-5 becomes 3, beyond the range of 2
    assert [picture.number for picture in strip.pictures] == [1, 3, 4, 6, 7, 9]
    assert filmstrip(reference, reference).amplification == 0
    assert filmstrip(ours * 250, reference).amplification == 500  # 7.5e-3 becomes 3.75
    assert filmstrip(reference + 2, reference).amplification == 1
    assert filmstrip(reference + np.nan, reference).amplification == 1
    assert [picture.number for picture in filmstrip(reference[:, :, :1], reference[:, :, :1]).pictures] == [1]


def test_pixels_are_cut_as_the_official_code_cuts():
    frame = np.array([-1.0, -0.0001, 1.0, 2.0, math.nan], np.float32)
    assert to_pixels(np.tile(frame, (3, 1, 1)))[0, :, 0].tolist() == [0, 127, 255, 255, 0]


@pytest.mark.parametrize("drifts", [(0.0, 1e-8), (1e-6,), (math.nan, math.nan), (1e-6, math.nan, 1e9)])
def test_any_drift_can_be_drawn(drifts):
    images = {drift_plot(report_of(*drifts).steps, theme, (4, 3)) for theme in (LIGHT, DARK)}
    assert len(images) == 2


@pytest.mark.parametrize(
    ("measure", "value", "limit", "expected"),
    [
        ("relative_l2", 0.016004, 0.016, "1.6004e-02"),
        ("psnr_db", 59.96, 60.0, "59.96"),
        ("ssim", 0.99899999, 0.999, "0.99899999"),
        ("excess", 1.5, 1.5, "1.50"),
    ],
)
def test_a_number_beyond_its_limit_does_not_look_like_the_limit(measure, value, limit, expected):
    assert distinct_text(value, limit, partial(measure_text, measure)) == expected


def test_the_page_says_once_that_all_passed():
    assert as_html(report_of(1e-6, 1e-6)).count("checks passed") == 1
