"""Attachments of a report: a bench of other engines, gates that this run cannot judge."""

import json

import pytest

from engines.build import BuildOptions, build_engines
from export.exporter import export_checkpoint
from export.options import ExportOptions
from validate import ValidateOptions
from validate.ladder.metrics import compare
from validate.ladder.row import Row
from validate.ladder.thresholds import TOKEN_IDS
from validate.report.case_report import CaseReport
from validate.report.extras import read_attachments
from validate.report.report import ValidationReport
from validate.report.to_html import as_html
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.precision import Precision

BENCH = {
    "format": "wan-trt bench 1", "model": "t2v-a14b-tiny", "precision": "fp32", "machine": {},
    "conditions": {"target": "cpu"}, "pieces": {}, "measurements": {"high_noise.speedup": 1.5}, "faults": [],
    "width": 32, "height": 32, "frames": 1, "tokens": 4,
}  # fmt: skip
WHATEVER = (None, 1, -1, 10**400, True, "x", "\ud800", [], [1], [None], {}, {"a": 1}, float("nan"))
BOTH = "[validate]\nchecks.failed.max = 0\n[bench]\nhigh_noise.speedup.min = 1\n"


@pytest.fixture
def bundle(tiny_engines):
    return open_bundle(tiny_engines, "engines")


@pytest.fixture
def asked(tmp_path):
    """``asked(gate=text, bench=content)`` → options that name files with this content."""

    def made(gate=None, bench=None):
        paths = {}
        for name, text in (("gate", gate), ("bench", None if bench is None else json.dumps(bench))):
            if text is not None:
                paths[name] = tmp_path / name
                paths[name].write_text(text)
        return ValidateOptions(**paths)

    return made


def test_gates_on_a_missing_bench_are_reported_as_not_judged(bundle, asked):
    found = read_attachments(bundle, asked(BOTH))
    assert found.not_judged == "1 of [bench] not judged, no --bench given"
    assert read_attachments(bundle, asked(BOTH, BENCH)).not_judged == ""


def test_names_are_checked_in_both_tables_whether_they_are_judged_or_not(bundle, asked):
    with pytest.raises(UserError, match=r"unknown key bench\.high_noise\.speed "):
        read_attachments(bundle, asked(BOTH.replace("speedup", "speed")))


def test_the_kernels_of_compiled_engines_are_on_the_page(flow_of, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    export_checkpoint(flow_of("t2v-a14b-tiny").checkpoint, tmp_path / "onnx", ExportOptions(Precision.BF16))
    options = BuildOptions("rtx4090", size="64x64", frames="5", topology="whole")
    build_engines(tmp_path / "onnx", tmp_path / "rtx", options)
    found = read_attachments(open_bundle(tmp_path / "rtx", "engines"), ValidateOptions())
    assert [engine["problems"] for engine in found.fusion] == [[]] * 5
    row = Row("token ids", "tokenizer", compare([1], [1]), TOKEN_IDS)
    page = as_html(ValidationReport((CaseReport((row,)),), {"model": "t2v", "precision": "bf16"}, found))
    high_noise = next(engine for engine in found.fusion if engine["component"] == "high_noise")
    assert f'<td>high_noise</td><td class="figure">{high_noise["kernels"]}</td>' in page
    assert "5 engines inspected" in page


def test_gates_on_the_bench_alone_are_enough_with_a_bench(bundle, asked):
    only = "[bench]\nhigh_noise.speedup.min = 1\n"
    assert len(read_attachments(bundle, asked(only, BENCH)).bench_gates) == 1
    with pytest.raises(UserError, match=r"no gate in \[validate\]"):
        read_attachments(bundle, asked(only))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "ti2v-5b"}, "of ti2v-5b in fp32 for cpu .* expected t2v-a14b-tiny in fp32 for cpu"),
        ({"precision": "fp16"}, "of t2v-a14b-tiny in fp16 for cpu"),
        ({"conditions": {"target": "rtx4090"}}, "of t2v-a14b-tiny in fp32 for rtx4090"),
        ({"measurements": {"high_noise.speedup": "fast"}}, "high_noise.speedup 'fast' .* a finite number"),
        ({"faults": None}, "faults None"),
        ({"tokens": "many"}, "tokens 'many' .* expected a int"),
    ],
)
def test_a_bench_of_something_else(bundle, asked, changed, message):
    with pytest.raises(UserError, match=message):
        read_attachments(bundle, asked(bench=BENCH | changed))


def damaged():
    """Yield benches in which one field, outer or inner, is missing or replaced by any kind of JSON value."""
    whole = BENCH | {"conditions": {"target": "cpu", "load_average": [0.5, 1.0], "command": "c", "date": "d"}}
    whole |= {"machine": {"cpu": "A", "cores": 2, "gpu": "B"}, "faults": ["f"]}
    for field, value in whole.items():
        yield from (whole | {field: other} for other in WHATEVER)
        yield {name: value for name, value in whole.items() if name != field}
        for inner in value if isinstance(value, dict) else ():
            yield from (whole | {field: value | {inner: other}} for other in WHATEVER)
            yield whole | {field: value | {"\udc80": 1}}


def test_a_damaged_bench_is_refused_before_the_work_or_can_be_shown(bundle, asked):
    refused = 0
    for bench in damaged():
        try:
            judged = read_attachments(bundle, asked(bench=bench))
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
            continue
        row = Row("ids", "tokenizer", compare([1], [1]), TOKEN_IDS)
        assert as_html(ValidationReport((CaseReport((row,)),), {"model": "m", "precision": "fp32"}, judged)).encode()
    assert refused > 100
