"""The real server makes the same video as ``wan-trt generate``, and tells how far it is."""

import io
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from runtime.generate import generate
from runtime.request import Request
from tests.triton_repo.serving import LONG, SMALL, serving
from triton_repo.client import JobError, WanClient
from triton_repo.server import free_ports
from wan_trt.cli import app

MODELS = {"wan22_t2v": "t2v-a14b-tiny", "wan22_i2v": "i2v-a14b-tiny", "wan22_ti2v": "ti2v-5b-tiny"}
DOCS = Path(__file__).parents[2] / "docs"
PROMPT = "灯塔 and a lighthouse in a storm"
SEED = 7


def photo() -> bytes:
    """A picture with a gradient, as a PNG."""
    rows, columns = np.mgrid[0:96, 0:128]
    pixels = np.stack([2 * rows, columns, rows + columns], -1).astype(np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    return png.getvalue()


CASES = {
    "text": ("wan22_t2v", None),
    "image": ("wan22_i2v", photo()),
    "image and text": ("wan22_ti2v", photo()),
    "text of a model that also takes images": ("wan22_ti2v", None),
}


@pytest.fixture(scope="module")
def engines(flow_of):
    return {name: flow_of(model).engines for name, model in MODELS.items()}


@pytest.fixture(scope="module", params=["owner", "bls"])
def server(request, installation, engines, tmp_path_factory):
    with serving(installation, tmp_path_factory.mktemp("served"), engines, request.param) as served:
        yield served


SCRIPT = """
import hashlib, json, sys
from pathlib import Path
import numpy
from runtime.generate import generate
from runtime.request import Request
for case in json.load(sys.stdin):
    image = bytes.fromhex(case["image"]) or None
    request = Request(case["prompt"], size=(64, 64), frames=5, image=image, steps=3, seed=case["seed"])
    latents = generate(Path(case["engines"]), request, Path(case["output"])).latents
    numpy.save(case["output"] + ".npy", latents)
    print(json.dumps([numpy.__version__, hashlib.sha256(latents.tobytes()).hexdigest()]))
"""


@pytest.fixture(scope="module")
def generated(installation, engines, tmp_path_factory):
    """``wan-trt generate`` of every case, by the Python that the server's models run in: numpy version, hash, file."""
    if installation.environment is None:
        pytest.skip("the server's models run in a Python of their own")
    folder = tmp_path_factory.mktemp("generated")
    cases = [
        {
            "engines": str(engines[model]),
            "prompt": PROMPT,
            "seed": SEED,
            "image": (image or b"").hex(),
            "output": str(folder / f"{case}.mp4"),
        }
        for case, (model, image) in CASES.items()
    ]
    python = installation.environment / "bin" / "python3"
    done = subprocess.run([python, "-c", SCRIPT], input=json.dumps(cases), capture_output=True, text=True, check=True)
    lines = map(json.loads, done.stdout.splitlines())
    return {case: (*line, folder / f"{case}.mp4") for case, line in zip(CASES, lines, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_the_server_makes_what_generate_makes_to_the_last_bit(server, generated, case):
    model, image = CASES[case]
    _, digest, path = generated[case]
    with server.client(model) as client:
        result = client.generate(PROMPT, image=image, seed=SEED, **SMALL)
    assert result.event["latents_sha256"] == digest
    assert result.video == path.read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_the_runtime_computes_the_same_with_numpy_1_and_2(generated, engines, case, tmp_path):
    model, image = CASES[case]
    version, _, path = generated[case]
    assert (version.split(".")[0], np.__version__.split(".")[0]) == ("1", "2")
    request = Request(PROMPT, size=(64, 64), frames=5, image=image, steps=3, seed=SEED)
    here = generate(engines[model], request, tmp_path / "out.mp4").latents
    np.testing.assert_allclose(here, np.load(f"{path}.npy"), atol=1e-5)


def test_progress_comes_in_order_and_says_who_works(server):
    events = []
    with server.client("wan22_t2v") as client:
        client.generate("x", on_progress=events.append, **{**SMALL, "steps": 6})
    phases = [phase for phase, _ in itertools.groupby(event["phase"] for event in events)]
    assert phases == ["start", "denoise", "decode", "done"]
    steps = [event for event in events if event["phase"] == "denoise"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert [expert for expert, _ in itertools.groupby(event["expert"] for event in steps)] == [
        "high_noise",
        "low_noise",
    ]
    assert steps[0]["eta_s"] > steps[-1]["eta_s"] == 0
    assert [event["step"] for event in events if event["phase"] == "decode"] == [1, 5]
    assert len({event["seed"] for event in events}) == 1


def test_a_job_moves_the_metrics(server):
    def read(name, **labels):
        return server.metric(name, "wan22_t2v", **labels)

    stages = ("text_encoder", "high_noise", "low_noise", "vae_decoder_first", "vae_decoder_next")
    outcomes = ("done", "refused", "cancelled", "out_of_time", "failed")
    counters = [("wan22_steps_total", {}), ("wan22_step_seconds_total", {}), ("wan22_expert_swaps_total", {})]
    counters += [("wan22_stage_seconds_total", {"stage": stage}) for stage in stages]
    counters += [("wan22_requests_total", {"outcome": outcome}) for outcome in outcomes]
    before = [read(name, **labels) for name, labels in counters]
    started = time.time()
    with server.client("wan22_t2v") as client:
        client.generate("x", **SMALL)
        with pytest.raises(JobError):
            client.generate("x", **{**SMALL, "steps": 0})
    moved = [read(name, **labels) - was for (name, labels), was in zip(counters, before, strict=True)]
    assert moved[0] == SMALL["steps"]
    assert moved[2] == 0
    assert all(seconds > 0 for seconds in (moved[1], *moved[3:8]))
    assert moved[8:] == [1, 1, 0, 0, 0]
    assert read("wan22_in_flight") == 0
    assert read("wan22_last_step_timestamp_seconds") >= started
    assert time.time() - read("wan22_heartbeat_timestamp_seconds") < 60


def test_a_job_is_in_flight_until_it_is_counted(server):
    cancelled = server.metric("wan22_requests_total", "wan22_t2v", outcome="cancelled")
    with server.client("wan22_t2v") as client:
        job = client.submit({"prompt": "x", **LONG, "steps": 100})
        next(job.events())
        assert server.metric("wan22_in_flight", "wan22_t2v") == 1
        job.cancel()
    server.wait_for("wan22_in_flight", 0, model="wan22_t2v")
    assert server.metric("wan22_requests_total", "wan22_t2v", outcome="cancelled") == cancelled + 1


def test_progress_every_other_step_still_tells_the_last(server):
    events = []
    with server.client("wan22_t2v") as client:
        client.generate("x", on_progress=events.append, progress_every=2, **{**SMALL, "steps": 5})
    assert [event["step"] for event in events if event["phase"] == "denoise"] == [2, 4, 5]


class StoppedError(Exception):
    """What a progress callback raises to cancel."""


def test_a_job_that_is_cancelled_in_the_middle_ends(server):
    def stop_after_two_steps(event):
        if event["phase"] == "denoise" and event["step"] == 2:
            raise StoppedError

    before = server.metric("wan22_requests_total", "wan22_t2v", outcome="cancelled")
    with server.client("wan22_t2v") as client, pytest.raises(StoppedError):
        client.generate("x", on_progress=stop_after_two_steps, **LONG)
    server.wait_for("wan22_requests_total", before + 1, model="wan22_t2v", outcome="cancelled")
    steps = server.metric("wan22_steps_total", "wan22_t2v")
    time.sleep(0.3)
    assert server.metric("wan22_steps_total", "wan22_t2v") == steps


def test_a_seed_that_the_server_drew_repeats_the_video(server):
    with server.client("wan22_t2v") as client:
        first = client.generate("x", **SMALL)
        again = client.generate("x", seed=first.seed, **SMALL)
        other = client.generate("x", **SMALL)
    assert first.video == again.video
    assert other.seed != first.seed
    assert other.video != first.video


def test_previews_are_pictures_of_the_video(server):
    previews = []
    with server.client("wan22_t2v") as client:
        result = client.generate("x", preview=True, on_progress=lambda e: previews.append(e["preview"]), **SMALL)
    pictures = [Image.open(io.BytesIO(preview)) for preview in previews if preview]
    assert len(pictures) == 2  # steps 2 and 3: before the second there is nothing to go by
    assert [picture.format for picture in pictures] == ["JPEG"] * 2
    assert np.abs(np.asarray(pictures[-1]).astype(int) - shown(result.video)[0]).mean() < 8


def shown(film):
    """``[F, H, W, 3]`` of a film's bytes."""
    with av.open(io.BytesIO(film)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]).astype(int)


def luma(frames):
    """Brightness, which films keep at full size; colours they halve, and the colours of a tiny model are noise."""
    return frames @ (0.2126, 0.7152, 0.0722)


def test_webm_and_npz_show_the_same_video_as_mp4(server):
    with server.client("wan22_t2v") as client:
        made = {
            name: client.generate("x", output_format=name, seed=1, fps=24, **SMALL)
            for name in ("mp4", "webm", "frames_npz")
        }
    with np.load(io.BytesIO(made["frames_npz"].video)) as file:
        frames = file["frames"].astype(int)
        assert file["fps"] == 24
    assert frames.shape == (5, 64, 64, 3)
    for name in ("mp4", "webm"):
        assert np.abs(luma(shown(made[name].video)) - luma(frames)).mean() < 3
    assert {(result.event["format"], result.event["fps"]) for result in made.values()} == {
        ("mp4", 24),
        ("webm", 24),
        ("frames_npz", 24),
    }


def test_the_quality_decides_the_size_of_the_file(server):
    with server.client("wan22_t2v") as client:
        small, default, official = (
            len(client.generate("x", seed=1, **SMALL, **quality).video)
            for quality in ({"quality": 2}, {}, {"quality": 8})
        )
    assert small < default == official


@pytest.mark.parametrize(("ending", "kind"), [("png", "PNG"), ("jpg", "JPEG")])
def test_one_frame_can_be_an_image(server, ending, kind):
    with server.client("wan22_t2v") as client:
        result = client.generate("x", output_format=ending, **{**SMALL, "num_frames": 1})
    image = Image.open(io.BytesIO(result.video))
    assert (image.format, image.size) == (kind, (64, 64))


def test_the_client_command_writes_the_file(server, tmp_path, capsys):
    photo_file, out = tmp_path / "photo.png", tmp_path / "out.mp4"
    photo_file.write_bytes(photo())
    line = ["client", server.url, "a cat", "-o", str(out), "--image", str(photo_file), "--model", "wan22_i2v"]
    with pytest.raises(SystemExit) as left:
        app([*line, "--size", "64x64", "--frames", "5", "--steps", "2", "--seed", "3"])
    assert left.value.code == 0
    assert "64x48, 5 frames at 16 fps, seed 3" in capsys.readouterr().out
    with av.open(str(out)) as file:
        assert sum(1 for _ in file.decode(video=0)) == 5


def test_the_client_command_passes_a_refusal_on_in_one_line(server, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        app(["client", server.url, "a cat", "-o", str(tmp_path / "out.mp4"), "--model", "wan22_i2v"])
    assert left.value.code == 2
    assert "no image for i2v-a14b-tiny | expected an image to start from" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_client_needs_no_torch(server):
    code = (
        "import sys; from triton_repo.client import JobError, WanClient\n"
        f"with WanClient({server.url!r}, 'wan22_t2v') as client: client.generate('x', **{SMALL!r})\n"
        "print([m for m in ('torch', 'onnxruntime', 'diffusers', 'transformers', 'cupy') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def curl(server, model, folder, body):
    """The answers to a request as the page shows it: from a file, as JSON."""
    (folder / "request.json").write_text(json.dumps(body))
    address = f"{server.http}/v2/models/{model}/generate_stream"
    words = ["-H", "Content-Type: application/json", "--data-binary", f"@{folder / 'request.json'}"]
    done = subprocess.run(
        ["curl", "-sN", "--max-time", "120", address, *words], capture_output=True, text=True, check=True
    )
    return [json.loads(line.removeprefix("data: ")) for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(("model", "image"), [("wan22_t2v", {}), ("wan22_i2v", {"image": list(photo())})])
def test_curl_can_follow_a_job_as_server_sent_events(server, tmp_path, model, image):
    answers = curl(server, model, tmp_path, {"prompt": "x", **image, **SMALL})
    assert json.loads(answers[0]["event"])["phase"] == "start"
    assert json.loads(answers[-1]["event"])["phase"] == "done"
    assert bytes(answers[-1]["video"])[4:8] == b"ftyp"


def test_curl_can_ask_for_failures_as_events(server, tmp_path):
    (answer,) = curl(server, "wan22_t2v", tmp_path, {"prompt": "x", "steps": 0, "errors_as_events": True})
    event = json.loads(answer["event"])
    assert (event["phase"], event["code"]) == ("failed", "INVALID_ARGUMENT")
    assert event["message"] == f"{event['found']} | expected {event['expected']} | {event['remedy']}"


def test_the_python_of_the_page_about_serving_runs(server, capsys):
    scripts = re.findall(r"```python\n(.*?)```", (DOCS / "serving.md").read_text(), re.S)
    (script,) = (each for each in scripts if "WanClient" in each)
    there = script.replace('WanClient("localhost:8001")', f'WanClient("{server.url}", "wan22_t2v")')
    assert there != script
    made = {}
    exec(compile(there, "serving.md", "exec"), made)
    assert made["video"][4:8] == b"ftyp"
    assert "denoise 1 " in capsys.readouterr().out


def test_a_client_without_a_server_says_so():
    with WanClient(f"127.0.0.1:{free_ports(1)[0]}") as client, pytest.raises(JobError) as error:
        client.generate("x")
    assert error.value.status == "UNAVAILABLE"


def test_a_batch_over_servers_makes_what_generate_makes(server, engines, tmp_path, capsys):
    """One server is there and one is not: the batch says so and goes on without it."""
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    small = {"width": 64, "height": 64, "num_frames": 5, "steps": 2}
    lines = [{"name": f"j{n}", "prompt": PROMPT, "seed": SEED + n, **small} for n in range(3)]
    jobs.write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {"name": "no", "prompt": "x", "lora": "mine"}])
    )
    gone = f"localhost:{free_ports(1)[0]}"
    with pytest.raises(SystemExit) as left:
        app(["batch", str(jobs), str(out), "--server", server.url, "--server", gone, "--model", "wan22_t2v"])
    told = capsys.readouterr().out
    assert left.value.code == 1, told
    assert "3 done, 1 failed" in told
    assert f"server {gone}" in told
    assert "lora 'mine'" in told
    made = generate(
        engines["wan22_t2v"], Request(PROMPT, size=(64, 64), frames=5, steps=2, seed=SEED), tmp_path / "a.mp4"
    )
    assert made.path.read_bytes() == (out / "j0.mp4").read_bytes()
