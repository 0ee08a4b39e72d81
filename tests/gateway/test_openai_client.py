"""The official client, unmodified, against a real gateway and a real server."""

import base64
import io
import itertools
import json
import socket
import threading
from contextlib import contextmanager, suppress

import av
import openai
import pytest
from PIL import Image

from tests.gateway.running import LONG, gateway_in_front
from tests.triton_repo.serving import serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def client(gateway):
    return gateway.client()


@pytest.fixture(scope="module")
def made(client):
    """A finished video with its file."""
    options = {"num_frames": 5, "seed": 7, "num_inference_steps": 3, "guidance_high_noise": 4.5}
    video = client.videos.create_and_poll(prompt="a red fox", size="64x64", extra_body=options, poll_interval_ms=50)
    return video, client.videos.download_content(video.id).read()


def test_a_video_is_made_polled_and_downloaded(made):
    video, content = made
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.object, video.model, video.size, video.seconds) == ("video", "wan2.2-t2v-a14b-tiny", "64x64", "0.25")
    told = {"num_frames": 5, "seed": 7, "num_inference_steps": 3, "guidance_high_noise": 4.5, "guidance_low_noise": 3.0}
    assert told.items() <= video.model_extra.items()
    with av.open(io.BytesIO(content)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(64, 64, 3)] * 5


def test_json_makes_the_same_video_to_the_last_byte(gateway, made):
    fields = {"num_frames": 5, "seed": 7, "num_inference_steps": 3, "guidance_high_noise": 4.5, "size": "64x64"}
    answer = gateway.ask("POST", "/v1/videos", {"prompt": "a red fox", **fields})
    gateway.wait(answer.json["id"], "completed")
    assert gateway.ask("GET", f"/v1/videos/{answer.json['id']}/content").body == made[1]


def test_a_list_is_paged_to_its_end_both_ways(gateway, client):
    ids = [gateway.create(prompt=f"page {at}") for at in range(5)]
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        listed = [video.id for video in client.videos.list(limit=2, order=order)]
        assert [video_id for video_id in listed if video_id in ids] == expected
    for video_id in ids:
        gateway.wait(video_id, "completed")


def test_a_running_job_is_deleted_and_the_server_is_free(gateway, triton, client):
    video = client.videos.create(prompt="a fox", size=LONG["size"], extra_body={"num_inference_steps": 100})
    running = gateway.wait(video.id, "in_progress")
    assert running["progress"] < 100
    assert client.videos.delete(video.id).deleted
    assert triton.wait_for("wan22_in_flight", 0) < 5
    with pytest.raises(openai.NotFoundError) as error:
        client.videos.delete(video.id)
    assert (error.value.code, error.value.param) == ("not_found", "video_id")


def test_a_waiting_job_is_deleted_before_it_ever_starts(gateway, client):
    running, waiting = gateway.create(**LONG), gateway.create()
    gateway.wait(running, "in_progress")
    assert gateway.video(waiting)["queue_position"] == 1
    assert client.videos.delete(waiting).deleted
    assert client.videos.delete(running).deleted
    assert not [v for v in client.videos.list(limit=100) if v.id in (running, waiting)]


def test_a_cancelled_job_keeps_its_record(gateway, client):
    video = client.videos.create(prompt="a fox", size=LONG["size"], extra_body={"num_inference_steps": 100})
    gateway.wait(video.id, "in_progress")
    gateway.ask("POST", f"/v1/videos/{video.id}/cancel")
    polled = client.videos.poll(video.id, poll_interval_ms=50)
    assert (polled.status, polled.error.code) == ("failed", "cancelled")


def test_a_job_that_runs_too_long_fails_with_the_code_of_it(client):
    options = {"num_inference_steps": 100, "timeout_seconds": 0.5}
    video = client.videos.create_and_poll(prompt="x", size=LONG["size"], extra_body=options, poll_interval_ms=50)
    assert (video.status, video.error.code) == ("failed", "timeout")
    with pytest.raises(openai.NotFoundError) as error:
        client.videos.download_content(video.id)
    assert error.value.code == "timeout"


def test_pictures_of_a_video(client, made):
    for variant, size in (("thumbnail", (64, 64)), ("spritesheet", (256, 128))):
        content = client.videos.download_content(made[0].id, variant=variant).read()
        picture = Image.open(io.BytesIO(content))
        assert (picture.format, picture.size) == ("WEBP", size)


@pytest.mark.parametrize(
    ("fields", "kind", "code", "param"),
    [
        ({"prompt": " "}, openai.BadRequestError, "missing_required_field", "prompt"),
        ({"size": "100x100"}, openai.BadRequestError, "invalid_value", "size"),
        ({"model": "sora-2"}, openai.BadRequestError, "model_not_found", "model"),
        ({"extra_body": {"stpes": 3}}, openai.BadRequestError, "unknown_field", "stpes"),
        ({"extra_body": {"seed": "x"}}, openai.BadRequestError, "invalid_type", "seed"),
        ({"seconds": "4"}, openai.BadRequestError, "invalid_value", "num_frames"),
        ({"extra_body": {"n": 2}}, openai.BadRequestError, "unsupported_value", "n"),
        ({"input_reference": b"x"}, openai.BadRequestError, "invalid_value", "input_reference"),
    ],
)
def test_errors_have_a_class_a_code_and_the_field(client, fields, kind, code, param):
    with pytest.raises(kind) as error:
        client.videos.create(**{"prompt": "x", **fields})
    assert (error.value.code, error.value.param) == (code, param)
    assert error.value.request_id


def test_a_repeated_request_with_a_key_makes_one_job(client):
    headers = {"Idempotency-Key": "once"}
    body = {"num_frames": 5, "num_inference_steps": 3}
    first = client.videos.create(prompt="x", size="64x64", extra_headers=headers, extra_body=body)
    again = client.videos.create(prompt="x", size="64x64", extra_headers=headers, extra_body=body)
    assert first.id == again.id
    with pytest.raises(openai.ConflictError) as error:
        client.videos.create(prompt="y", size="64x64", extra_headers=headers, extra_body=body)
    assert error.value.code == "idempotency_key_reused"
    assert error.value.response.headers["x-should-retry"] == "false"


def test_poll_is_told_when_to_come_again(gateway):
    video_id = gateway.create(**LONG)
    gateway.wait(video_id, "in_progress")
    answer = gateway.ask("GET", f"/v1/videos/{video_id}")
    assert 500 <= int(answer.headers["openai-poll-after-ms"]) <= 5000
    gateway.ask("DELETE", f"/v1/videos/{video_id}")


def test_models_are_listed(client):
    (model,) = client.models.list()
    assert (model.id, model.owned_by) == ("wan2.2-t2v-a14b-tiny", "wan-trt")
    assert client.models.retrieve("t2v-a14b-tiny").id == model.id


@contextmanager
def losing_the_first_answer(gateway):
    """The port of a proxy that passes requests on, and closes its first connection when the answer comes."""

    def pass_on(source, target):
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve():
        for number in itertools.count():
            with suppress(OSError):
                near, _ = listening.accept()
                far = socket.create_connection(("127.0.0.1", gateway.port))
                threading.Thread(target=pass_on, args=(near, far), daemon=True).start()
                if number == 0:
                    far.recv(65536)
                    lost.append(near)
                    near.shutdown(socket.SHUT_RDWR)
                else:
                    threading.Thread(target=pass_on, args=(far, near), daemon=True).start()
                continue
            return

    lost = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
    assert lost


def test_a_client_that_loses_the_answer_and_asks_again_gets_the_same_job(gateway):
    with losing_the_first_answer(gateway) as port:
        client = gateway.client(max_retries=2, timeout=30).copy(base_url=f"http://127.0.0.1:{port}/v1")
        body = {"num_frames": 5, "num_inference_steps": 3}
        headers = {"Idempotency-Key": "lost-answer"}
        video = client.videos.create(prompt="lost", size="64x64", extra_headers=headers, extra_body=body)
    made = [each["id"] for each in gateway.ask("GET", "/v1/videos?limit=100").json["data"] if each["prompt"] == "lost"]
    assert made == [video.id]


def test_a_full_queue_tells_when_to_come_again(gateway):
    jobs = []
    try:
        while (answer := gateway.ask("POST", "/v1/videos", {"prompt": "fill", **LONG})).status == 200:
            jobs.append(answer.json["id"])
        with pytest.raises(openai.RateLimitError) as error:
            while True:  # a job that ends meanwhile makes room
                jobs.append(gateway.client().videos.create(prompt="one more", extra_body=LONG).id)
        assert error.value.code == "queue_full"
        headers = error.value.response.headers
        assert headers["x-should-retry"] == ("true" if int(headers["retry-after"]) <= 120 else "false")
    finally:
        for job in reversed(jobs):
            gateway.ask("DELETE", f"/v1/videos/{job}")


@pytest.mark.slow
def test_images_reach_the_model_as_an_upload_and_as_a_data_url(installation, flow_of, tmp_path):
    engines = flow_of("i2v-a14b-tiny").engines
    content = io.BytesIO()
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(content, "PNG")
    with (
        serving(installation, tmp_path, {"wan22": engines}) as server,
        gateway_in_front(tmp_path / "data", [server.url], "--finish-within", 0) as gateway,
    ):
        client, videos = gateway.client(), []
        url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
        body = {"num_frames": 5, "num_inference_steps": 3, "seed": 1}
        asked = {"prompt": "it turns", "size": "64x64"}
        for more in (
            {"input_reference": ("../../x.png", content.getvalue(), "image/png"), "extra_body": body},
            {"extra_body": {**body, "input_reference": {"image_url": url}}},
            {"extra_body": {**body, "image_reference": json.dumps({"image_url": url})}},
        ):
            video = client.videos.create(**asked, **more)
            told = client.videos.poll(video.id, poll_interval_ms=50)
            assert told.status == "completed", told
            videos.append(client.videos.download_content(video.id).read())
        assert videos[0] == videos[1] == videos[2]
        without = {**asked, "extra_body": body}
        with pytest.raises(openai.BadRequestError) as error:
            client.videos.create(**without)
        assert error.value.param == "input_reference"
        image = f"data:image/png;base64,{base64.b64encode(content.getvalue()[:200]).decode()}"
        with pytest.raises(openai.BadRequestError) as error:
            client.videos.create(**asked, extra_body={**body, "input_reference": {"image_url": image}})
        assert error.value.param == "input_reference"
