"""``wan-trt bench``: tables, one line of JSON, gates that decide the exit code, bad input told before any work."""

import json

import pytest

from wan_trt.cli import app

EMPTY = {
    "format": "wan-trt bench 1", "model": "t2v-a14b-tiny", "precision": "fp32",
    "machine": {}, "conditions": {}, "pieces": {}, "measurements": {}, "faults": [],
    "width": 32, "height": 32, "frames": 1, "tokens": 4,
}  # fmt: skip
SMALL = ["--size", "32x32", "--frames", 5, "--steps", 2, "--runs", 1, "--whole-runs", 1, "--no-memory"]
QUICK = ["--size", "32x32", "--frames", 1, "--runs", 1, "--whole-runs", 0, "--no-memory", "--only", "text_encoder"]


def status(*arguments):
    with pytest.raises(SystemExit) as left:
        app(["bench", *map(str, arguments)])
    return left.value.code


def test_the_last_line_is_one_json_object_and_goes_into_a_file(tiny_engines, tmp_path, capsys):
    assert status(tiny_engines, *SMALL, "--json", tmp_path / "bench.json") == 0
    out = capsys.readouterr().out
    line = out.strip().splitlines()[-1]
    assert (tmp_path / "bench.json").read_text() == line + "\n"
    found = json.loads(line, parse_constant=pytest.fail)
    assert list(found["pieces"]) == ["text_encoder", "high_noise", "low_noise", "vae_decoder"]
    assert found["frames"] == 5
    assert found["passed"] is True
    for told in ("Time, ms", "Work", "From prompt to frames", "Steps", "machine:"):
        assert told in out


def test_weights_that_stream_get_a_table_and_measurements(blocks_of, capsys):
    options = [*SMALL, "--steps", 3, "--only", "text_encoder", "--weights-in", "disk"]
    assert status(blocks_of("t2v-a14b-tiny"), *options) == 0
    out = capsys.readouterr().out
    assert "Weights of blocks that stream" in out
    found = json.loads(out.strip().splitlines()[-1])["measurements"]
    assert found["end_to_end.streamed_step_bytes"] >= 0  # the two blocks of an expert stay
    assert found["end_to_end.stream_hidden_step_ms"] >= 0
    assert found["end_to_end.switch_stall_ms"] > 0  # two blocks were there, but a wait takes some microseconds


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--weights-in", "disk"], "engines in blocks"), (["--triton", "--only", "dit"], "leave --only out")],
)
def test_options_without_effect_are_refused(tiny_engines, capsys, options, told):
    assert status(tiny_engines, *SMALL, *options) == 2
    assert told in capsys.readouterr().err


def test_a_missed_gate_decides_the_exit_code(tiny_engines, tmp_path, capsys):
    gate = tmp_path / "gate.toml"
    gate.write_text("[bench]\ntext_encoder.median_ms = {min = 0, max = 1e-9}")
    assert status(tiny_engines, *QUICK, "--gate", gate) == 1
    out = capsys.readouterr().out
    assert "✗ text_encoder.median_ms" in out
    found = json.loads(out.strip().splitlines()[-1])
    assert [verdict["passed"] for verdict in found["gates"]] == [True, False]
    assert found["passed"] is False


def test_what_gates_may_name_can_be_listed(tiny_engines, capsys):
    assert status(tiny_engines, "--list-gates") == 0
    names = capsys.readouterr().out.split()
    assert {"high_noise.speedup", "vae_decoder.memory_ratio", "end_to_end.total_s", "compare.regressions"} < set(names)


@pytest.fixture(scope="module")
def baseline(tiny_engines, tmp_path_factory):
    """A bench that passed its gate, as a file."""
    folder = tmp_path_factory.mktemp("baseline")
    (folder / "gate.toml").write_text("[bench]\ntext_encoder.median_ms.min = 0")
    assert status(tiny_engines, *QUICK, "--gate", folder / "gate.toml", "-o", folder / "bench.json") == 0
    return folder / "bench.json"


def test_a_bench_is_compared_with_an_earlier_one(tiny_engines, baseline, capsys):
    assert status(tiny_engines, *QUICK, "--compare", baseline) == 0
    out = capsys.readouterr().out
    assert json.loads(out.strip().splitlines()[-1])["compare"]["same_machine"] is True
    assert "text_encoder.median_ms" in out
    assert "another machine" not in out


def test_a_baseline_that_somebody_indented_is_one_all_the_same(tiny_engines, baseline, tmp_path):
    (tmp_path / "indented.json").write_text(json.dumps(json.loads(baseline.read_text()), indent=2))
    assert status(tiny_engines, *QUICK, "--compare", tmp_path / "indented.json") == 0


def test_a_baseline_of_another_machine_is_told(tiny_engines, baseline, tmp_path, capsys):
    content = json.loads(baseline.read_text())
    content["machine"]["cpu"] = "Another"
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert status(tiny_engines, *QUICK, "--compare", tmp_path / "other.json") == 0
    out = capsys.readouterr().out
    assert "from another machine (cpu 'Another', here" in out
    assert json.loads(out.strip().splitlines()[-1])["compare"]["same_machine"] is False


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--only", "vae"], "piece 'vae' | expected one of text_encoder, high_noise, low_noise, vae_decoder"),
        (["--only", "vae_encoder"], "piece 'vae_encoder' | expected one of text_encoder"),
        (["--size", "50x50"], "size 50x50"),
        (["--frames", 6], "6"),
        (["--compile"], "torch.compile without a checkpoint"),
        (["--image", "photo.png"], "an image for t2v-a14b-tiny"),
        (["--values", "5,9"], "--values or --plot | expected a sweep"),
        (["--cancels", 3], "--topology or --cancels | expected a server to measure | add --triton"),
        (["--topology", "owner"], "--topology or --cancels | expected a server"),
        (["--plot", "x.png"], "--values or --plot | expected a sweep"),
        (["--sweep", "frames", "--values", "5"], "a sweep over 5 | expected at least two values"),
        (["--sweep", "frames", "--values", "5,5"], "a sweep over 5 | expected at least two values"),
        (["--sweep", "frames", "--values", "5,many"], "frames 'many'"),
        (["--sweep", "steps", "--values", "0,2"], "steps '0'"),
        (["--sweep", "size", "--values", "32x32,64"], "size '64'"),
        (["--sweep", "size", "--values", "32x32,50x50"], "size 50x50"),
        (["--sweep", "frames", "--values", "5,9", "--plot", "x.pdf"], "plot x.pdf | expected a name ending in .png"),
        (["--sweep", "frames", "--values", "5,9", "--plot", "no/x.png"], "plot no/x.png: no such folder"),
        (["--sweep", "frames", "--gate", "gate.toml"], "--sweep with --gate or --compare"),
        (["--gate", "nowhere.toml"], "gate file nowhere.toml: No such file"),
        (["--compare", "nowhere.json"], "baseline nowhere.json: No such file"),
        (["-o", "nowhere/bench.json"], "output nowhere/bench.json: no such folder"),
        (["-o", ""], "output .: a folder"),
        (["-o", "/"], "output /: a folder"),
        (["--sweep", "steps", "--only", "text_encoder"], "--only with a sweep of steps"),
        (["--sweep", "frames", "--values", ""], "a sweep over nothing | expected at least two values"),
    ],
)
def test_bad_options_in_one_line(tiny_engines, capsys, options, told):
    assert status(tiny_engines, *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("gate", "[bench]\nhigh_noise.speedpu.min = 1", "unknown key bench.high_noise.speedpu | expected one like"),
        ("gate", "[bench]\nvae_encoder.speed.min = 1", "unknown key bench.vae_encoder.speed"),
        ("compare", "", "its last line is not JSON"),
        ("compare", "[" * 100_000, "its last line is not JSON"),
        ("compare", "[1]", "format 'list' | expected wan-trt bench 1"),
        ("compare", '{"format": "wan-trt sweep 1"}', "format 'wan-trt sweep 1' | expected wan-trt bench 1"),
        ("compare", '{"format": "wan-trt bench 1"}', "model None | expected a str"),
        ("compare", json.dumps(EMPTY | {"model": "ti2v-5b"}), "model 'ti2v-5b' | expected 't2v-a14b-tiny'"),
        ("compare", json.dumps(EMPTY | {"machine": []}), "machine [] | expected a dict"),
        ("compare", json.dumps(EMPTY | {"measurements": {"a.median_ms": "fast"}}), "a.median_ms 'fast' | expected a"),
        ("compare", json.dumps(EMPTY | {"measurements": {"a.median_ms": None}}), "a.median_ms None | expected a"),
        ("compare", json.dumps(EMPTY | {"measurements": {"a.median_ms": float("nan")}}), "a.median_ms nan | expected"),
        ("compare", json.dumps(EMPTY | {"conditions": {"load_average": None}}), "load_average None | expected a"),
        ("compare", json.dumps(EMPTY | {"machine": {"cores": "2"}}), "cores '2' | expected a finite number"),
    ],
)
def test_bad_files_in_one_line(tiny_engines, tmp_path, capsys, name, content, told):
    (tmp_path / "file").write_text(content)
    assert status(tiny_engines, f"--{name}", tmp_path / "file") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line


def test_a_checkpoint_of_another_model_is_named(tiny_engines, flow_of, capsys):
    other = flow_of("ti2v-5b-tiny").checkpoint
    assert status(tiny_engines, other, *QUICK) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "was made from t2v-a14b-tiny" in line
    assert "ti2v-5b-tiny" in line


def test_a_bundle_that_holds_no_engines(tiny_bundle, capsys):
    assert status(tiny_bundle, *QUICK) == 2
    assert "engines" in capsys.readouterr().err


def test_a_disk_that_is_full_loses_no_result(tiny_engines, tmp_path, capsys, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert status(tiny_engines, *QUICK, "-o", tmp_path / "bench.json") == 2
    told = capsys.readouterr()
    assert json.loads(told.out.strip().splitlines()[-1])["passed"] is True
    assert f"disk full while writing output {tmp_path / 'bench.json'}" in told.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("terminal", "options", "lines"), [(True, [], 0), (True, ["--json", "-"], 1), (False, [], 1)])
def test_a_terminal_gets_json_only_when_asked(tiny_engines, tmp_path, monkeypatch, capsys, terminal, options, lines):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert status(tiny_engines, *QUICK, *options) == 0
    assert sum(line.startswith("{") for line in capsys.readouterr().out.splitlines()) == lines
    assert list(tmp_path.iterdir()) == []
