"""``wan-trt validate`` passes on what the user asks for, and tells bad input in one line before any work."""

import json

import pytest

from validate.sample_image import built_in_picture
from wan_trt.cli import app


def status(*arguments):
    with pytest.raises(SystemExit) as left:
        app(list(map(str, arguments)))
    return left.value.code


@pytest.fixture(scope="module")
def i2v(flow_of):
    return flow_of("i2v-a14b-tiny")


def test_every_option_reaches_the_report(i2v, tmp_path):
    (tmp_path / "photo.png").write_bytes(built_in_picture(90, 60))
    options = ["--prompt", "a fox", "--negative-prompt", "a hen", "--size", "48x48", "--frames", 5, "--steps", 2]
    options += ["--image", tmp_path / "photo.png", "--last-image", tmp_path / "photo.png", "--fit", "crop"]
    options += ["--guidance", 2, "--guidance-low-noise", 1.5, "--shift", 3, "--solver", "euler", "--seed", 9]
    options += ["--schedule", "diffusers"]
    assert status("validate", i2v.engines, i2v.checkpoint, "-o", tmp_path / "out", *options) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["passed"]
    facts = report["facts"]
    photo = f"{tmp_path / 'photo.png'}, 90x60, crop fit"
    assert (facts["image"], facts["last image"]) == (photo, photo)
    assert (facts["prompt"], facts["negative prompt"], facts["video"]) == ("a fox", "a hen", "48x48, 5 frames")
    assert facts["sampling"] == (
        "euler, diffusers schedule, 2 steps, shift 3, seed 9, guidance high_noise 2, low_noise 1.5"
    )


def test_the_preset_runs_without_guidance(i2v, tmp_path):
    options = ["--preset", "lightning", "--size", "48x48", "--frames", 1]
    assert status("validate", i2v.engines, i2v.checkpoint, "-o", tmp_path, *options) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["facts"]["sampling"].startswith("euler, official schedule, 4 steps, shift 5")
    assert not [row["name"] for row in report["rows"] if "negative" in row["name"]]
    steps = [row["timestep"] for row in report["rows"] if row["step"]]
    assert steps == pytest.approx([1000, 937.5, 833.3333, 625])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--preset", "fast"], "preset 'fast'"),
        (["--guidance-low-noise", "nan"], "guidance nan"),
        (["--size", "50x50"], "size 50x50"),
        (["--size", "0x64"], "size 0x64"),
        (["--steps", "0"], "0 steps"),
    ],
)
def test_bad_options(i2v, tmp_path, capsys, options, told):
    assert status("validate", i2v.engines, i2v.checkpoint, "-o", tmp_path / "out", *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_an_earlier_report_is_replaced_only_when_that_is_asked_for(i2v, tmp_path, capsys, name):
    folder, options = tmp_path / "out", ["--preset", "lightning", "--size", "48x48", "--frames", 1]
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / name).write_text("earlier")
    assert status("validate", i2v.engines, i2v.checkpoint, "-o", folder, *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{folder / name} exists | expected a folder without a report | choose another or add --overwrite" in line
    assert sorted(path.name for path in folder.iterdir()) == sorted(["notes.txt", name])
    assert status("validate", i2v.engines, i2v.checkpoint, "-o", folder, *options, "--overwrite") == 0
    assert json.loads((folder / "report.json").read_text())["passed"]
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["bundle", "engines"])
def test_a_report_does_not_go_into_a_bundle(i2v, capsys, kind):
    folder = getattr(i2v, kind)
    assert status("validate", i2v.engines, i2v.checkpoint, "-o", folder, "--overwrite") == 2
    assert f"{folder} is a bundle | expected a folder of its own for the report" in capsys.readouterr().err
    assert not (folder / "report.json").exists()


def test_an_image_is_not_for_a_text_model(tiny_engines, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "photo.png").write_bytes(built_in_picture(90, 60))
    options = ["--image", tmp_path / "photo.png"]
    assert status("validate", tiny_engines, tiny_checkpoint, "-o", tmp_path / "out", *options) == 2
    assert "an image for t2v-a14b-tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no ENGINES and CHECKPOINT"),
        (["engines"], "no ENGINES and CHECKPOINT"),
        (["--precision-study"], "has moved | expected python -m studies.precision"),
        (["engines", "checkpoint", "--precision-study"], "has moved | expected python -m studies.precision"),
        (
            ["--precision-study", "--model", "t2v-a14b", "--steps", "8"],
            "has moved | expected python -m studies.precision",
        ),
    ],
)
def test_engines_and_checkpoint_are_needed_and_the_precision_study_has_moved(tmp_path, capsys, arguments, told):
    assert status("validate", "-o", tmp_path / "out", *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
    assert not (tmp_path / "out").exists()


def test_the_official_code_is_named_once_and_must_be_there(i2v, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.prefix", str(tmp_path / ".venv"))
    for options, said in ((["--official-repo", tmp_path], "one of them"), ([], "make official, or --official-repo")):
        assert status("validate", i2v.engines, i2v.checkpoint, "-o", tmp_path / "out", "--official", *options) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["i2v-a14b-tiny", "ti2v-5b-tiny"])
def test_the_demo_of_image_models_starts_from_the_built_in_picture(tmp_path, model):
    assert status("demo", tmp_path, "--model", model) == 0
    made = {path.name for path in tmp_path.iterdir()}
    reports = {"report.html", "report.json", "report.md", "report.xml"}
    assert made == {model, "image.png", "out.mp4", "filmstrip.png", *reports}
    facts = json.loads((tmp_path / "report.json").read_text())["facts"]
    assert facts["image"].startswith(f"{tmp_path / 'image.png'}, 384x240")
    assert facts["video"] == "256x160, 17 frames"
