"""What HTTP clients of all kinds get: forms, ranges, events, waiting, keys, limits."""

import base64
import hashlib
import http.client
import json
import socket
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import openai
import pytest

from runtime.recipe import read_recipe
from tests.gateway.running import LONG, MEDIUM, SMALL, WAN_TRT, gateway_in_front
from tests.runtime.test_extend import GOOD, endpoint, said
from wan_trt.cli import app

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def video(gateway):
    video_id = gateway.create(seed=1)
    gateway.wait(video_id, "completed")
    return video_id, gateway.ask("GET", f"/v1/videos/{video_id}/content").body


def curl(gateway, path, *options):
    command = ["curl", "-sS", "--max-time", "60", f"{gateway.url}{path}", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def test_curl_with_json_a_form_and_urlencoded_text_ask_for_the_same(gateway):
    fields = {"prompt": "ein Fuchs ö", "size": "64x64", "steps": "3", "num_frames": "5", "seed": "3", "preview": "true"}
    as_json = curl(gateway, "/v1/videos", "--json", json.dumps(fields))
    as_form = curl(gateway, "/v1/videos", *(word for k, v in fields.items() for word in ("-F", f"{k}={v}")))
    as_text = curl(gateway, "/v1/videos", *(w for k, v in fields.items() for w in ("--data-urlencode", f"{k}={v}")))
    told = [{k: v for k, v in each.items() if k in gateway_fields(each)} for each in (as_json, as_form, as_text)]
    assert told[0] == told[1] == told[2]
    assert (told[0]["seed"], told[0]["num_inference_steps"], told[0]["preview"]) == (3, 3, True)
    for each in (as_json, as_form, as_text):
        gateway.wait(each["id"], "completed")


def gateway_fields(video):
    """What the request determines."""
    return video.keys() - {"id", "created_at", "progress", "status", "phase", "phase_at", "queue_position"} - {
        "eta_seconds", "seconds_in_phase", "started_at", "step", "expert"
    }  # fmt: skip


def test_parts_of_a_video(gateway, video):
    video_id, whole = video
    path = f"/v1/videos/{video_id}/content"
    full = gateway.ask("GET", path)
    assert (full.status, full.headers["content-type"]) == (200, "video/mp4")
    assert (full.headers["accept-ranges"], int(full.headers["content-length"])) == ("bytes", len(whole))
    assert video_id in full.headers["content-disposition"]
    size = len(whole)
    for span, (first, last) in {
        "bytes=0-0": (0, 0), "bytes=10-": (10, size - 1), "bytes=-7": (size - 7, size - 1),
        f"bytes=5-{10 * size}": (5, size - 1), f"bytes=-{2 * size}": (0, size - 1),
    }.items():  # fmt: skip
        part = gateway.ask("GET", path, range=span)
        assert (part.status, part.body) == (206, whole[first : last + 1])
        assert part.headers["content-range"] == f"bytes {first}-{last}/{size}"
    for beyond in (f"bytes={size}-", "bytes=-0"):
        answer = gateway.ask("GET", path, range=beyond)
        assert (answer.status, answer.error["code"]) == (416, "range_not_satisfiable")
        assert answer.headers["content-range"] == f"bytes */{size}"
    for nonsense in ("bytes=5-2", "bytes=a-b", "bytes=0-1,3-4", "lines=1-2", "bytes=" + "9" * 400 + "-"):
        assert gateway.ask("GET", path, range=nonsense).body == whole
    etag = full.headers["etag"]
    assert gateway.ask("GET", path, if_none_match=etag).status == 304
    assert gateway.ask("GET", path, range="bytes=0-0", if_range='"other"').status == 200
    head = gateway.ask("HEAD", path)
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(size))


def events(gateway, video_id, last="", until=None):
    """The events of a stream, as (id, kind, data), to its end or to the first of kind ``until``."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
    connection.request("GET", f"/v1/videos/{video_id}/events", headers={"Last-Event-ID": last} if last else {})
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    found, fields = [], {}
    for line in answer:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name:
            fields[name] = value
        elif "event" in fields:
            found.append((fields.get("id", ""), fields["event"], json.loads(fields["data"])))
            fields = {}
            if found[-1][1] == until:
                break
    connection.close()
    return found


def test_events_say_where_a_step_cache_estimates(gateway):
    skipped = [3, 4, 7]  # from 0
    whole = events(gateway, gateway.create(**{**SMALL, "num_inference_steps": 12, "skip_steps": skipped}))
    cached = {data["step"] - 1 for _, _, data in whole if data.get("cached")}
    assert {3, 7} <= cached <= set(skipped)  # the first of each series at least
    computed = {data["step"] - 1 for _, _, data in whole if data.get("step") and "cached" not in data}
    assert {5, 8} <= computed
    assert {kind for _, kind, data in whole if data.get("cached")} == {"progress"}


def test_events_tell_every_phase_in_order_and_go_on_after_the_last_one_seen(gateway):
    video_id = gateway.create(**{**MEDIUM, "num_frames": 17})
    seen = events(gateway, video_id, until="progress")
    more = events(gateway, video_id, last=seen[-1][0])
    whole = events(gateway, video_id)
    numbers = [int(event_id.rpartition(":")[2]) for event_id, *_ in whole]
    assert numbers == list(range(1, len(whole) + 1))
    assert [each[0] for each in more] == [each[0] for each in whole if each[0] not in {s[0] for s in seen}]
    phases = [data["phase"] for _, _, data in whole]
    assert list(dict.fromkeys(phases)) == ["text", "denoise", "decode", "encode", "done"]
    percents = [data["progress"] for _, _, data in whole]
    assert percents == sorted(percents)
    assert max(percents[:-1]) < 100
    assert whole[-1][1:2] == ("completed",)
    assert (whole[-1][2]["status"], whole[-1][2]["progress"]) == ("completed", 100)
    assert {data["expert"] for _, _, data in whole if "expert" in data} - {None} == {"high_noise", "low_noise"}
    assert gateway.ask("GET", f"/v1/videos/{video_id}/events", last_event_id=whole[-1][0]).status == 204


def test_an_event_of_another_video_is_refused(gateway, video):
    other = gateway.create()
    gateway.wait(other, "completed")
    for last in (f"{other}:1", "1", f"{video[0]}:x", f"{video[0]}:-1", "../:1"):
        answer = gateway.ask("GET", f"/v1/videos/{video[0]}/events", last_event_id=last)
        assert (answer.status, answer.error["param"]) == (400, "Last-Event-ID")


def test_content_comes_exactly_when_progress_is_100(gateway):
    video_id = gateway.create(**MEDIUM)
    early = gateway.ask("GET", f"/v1/videos/{video_id}/content")
    assert (early.status, early.error["code"]) == (404, "video_not_ready")
    while (told := gateway.video(video_id))["progress"] < 100:
        assert told["status"] in ("queued", "in_progress")
        time.sleep(0.01)
    assert told["status"] == "completed"
    assert gateway.ask("GET", f"/v1/videos/{video_id}/content").status == 200


def test_a_preview_is_there_while_the_job_runs(gateway):
    video_id = gateway.create(**LONG, preview=True)
    gateway.wait(video_id, "in_progress")
    events(gateway, video_id, until="progress")
    while (answer := gateway.ask("GET", f"/v1/videos/{video_id}/content?variant=preview")).status == 404:
        assert gateway.video(video_id)["step"] < 10
    assert answer.body[:3] == b"\xff\xd8\xff"
    gateway.ask("DELETE", f"/v1/videos/{video_id}")


def test_sync_gives_the_video(gateway, video):
    answer = gateway.ask("POST", "/v1/videos/sync", {"prompt": "a fox", **SMALL, "seed": 1})
    assert (answer.status, answer.headers["content-type"], answer.body) == (200, "video/mp4", video[1])
    assert gateway.video(answer.headers["x-video-id"])["status"] == "completed"


def test_a_client_of_sync_that_goes_away_ends_its_job(gateway, triton):
    body = json.dumps({"prompt": "goes away", **LONG}).encode()
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        head = "POST /v1/videos/sync HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        triton.wait_for("wan22_in_flight", 1)
    triton.wait_for("wan22_in_flight", 0)
    (job,) = [v for v in gateway.ask("GET", "/v1/videos?limit=5").json["data"] if v["prompt"] == "goes away"]
    assert gateway.wait(job["id"], "failed")["error"]["code"] == "cancelled"


def test_mlperfs_client_gets_the_video_in_its_shape(gateway):
    request = {"prompt": "a fox", "size": "64x64", "seconds": 0.25, "num_inference_steps": 3}
    answer = gateway.ask("POST", "/v1/videos/generations", {**request, "response_format": "video_bytes"})
    assert answer.status == 200, answer.body
    told = gateway.video(answer.json["video_id"])
    expected = {"seed": 42, "guidance_high_noise": 4.0, "guidance_low_noise": 3.0, "num_frames": 5, "flow_shift": 3.0}
    assert expected.items() <= told.items()
    content = gateway.ask("GET", f"/v1/videos/{told['id']}/content").body
    assert base64.b64decode(answer.json["video_bytes"]) == content
    path = gateway.ask("POST", "/v1/videos/generations", {**request, "response_format": "video_path"}).json[
        "video_path"
    ]
    assert Path(path).read_bytes() == content
    aliases = {
        "prompt": "x",
        "num_frames": 1,
        "steps": 1,
        "guidance": 1.0,
        "size": "64x64",
        "response_format": "video_path",
    }
    assert gateway.ask("POST", "/v1/videos/generations", aliases).status == 200
    refused = gateway.ask("POST", "/v1/videos/generations", {**request, "latent_path": "/etc/passwd"})
    assert (refused.status, refused.error["param"]) == (400, "latent")
    assert "expected one of fixed" in refused.error["message"]


def test_the_operators_latents_take_the_place_of_the_seeds(gateway, triton):
    latents = gateway.data.parent / "fixed.npy"
    made = {}
    for name, fields in {
        "path": {"latent_path": str(latents), "seed": 3},
        "name": {"latent": "fixed", "seed": 4},
    }.items():
        made[name] = gateway.wait(gateway.create(**fields), "completed")
        assert made[name]["latent"] == "fixed"
    contents = {name: gateway.ask("GET", f"/v1/videos/{video['id']}/content").body for name, video in made.items()}
    asked = ["--size", "64x64", "--frames", "5", "--steps", "3", "--seed", "3", "--noise", str(latents)]
    with pytest.raises(SystemExit) as left:
        app(["client", triton.url, "a fox", *asked, "-o", str(latents.parent / "client.mp4")])
    assert left.value.code in (0, None)
    assert contents["path"] == (latents.parent / "client.mp4").read_bytes()
    recipes = [read_recipe(written(latents.parent / f"{name}.mp4", content)) for name, content in contents.items()]
    assert recipes[0].noise == recipes[1].noise == hashlib.sha256(np.load(latents).tobytes()).hexdigest()
    refused = gateway.ask("POST", "/v1/videos", {"prompt": "x", **SMALL, "size": "96x64", "latent": "fixed"})
    assert (refused.status, refused.error["param"]) == (400, "latent")


def written(path, content):
    path.write_bytes(content)
    return path


def test_a_language_model_of_the_operator_rewrites_prompts_and_its_faults_leave_them(triton, tmp_path, monkeypatch):
    monkeypatch.setenv("WAN_TRT_EXTEND_KEY", "secret-key")
    answers = said(GOOD), (503, {}), said("x" * 3000)
    with endpoint(*answers) as (there, asked):
        options = ["--finish-within", 0, "--extend", there.url, "--extend-model", "qwen"]
        with gateway_in_front(tmp_path / "data", [triton.url], *options) as gateway:
            fields = {"prompt": "A cat", "prompt_extend": True, "look": "noir", **SMALL}
            assert gateway.ask("POST", "/v1/videos", {**fields, "size": "65x64"}).status == 400
            assert not asked, "a prompt left the gateway for a video that cannot be made"
            made = gateway.wait(gateway.create(**fields), "completed")
            assert made["prompt"] == f"Night time, Hard lighting, Side lighting, Cool colors, Dutch angle shot. {GOOD}"
            assert (made["written_prompt"], made["extended_by"]) == ("A cat", "qwen at 127.0.0.1")
            content = gateway.ask("GET", f"/v1/videos/{made['id']}/content").body
            recipe = read_recipe(written(tmp_path / "made.mp4", content))
            assert (recipe.prompt, recipe.written, recipe.extended_by) == (made["prompt"], "A cat", "qwen at 127.0.0.1")
            for why in ("127.0.0.1: status 503", "127.0.0.1: an answer of 3000 characters, asked twice"):
                told = gateway.video(gateway.create(prompt="A cat", prompt_extend="true"))
                assert (told["prompt"], told["extend_warning"]) == ("A cat", why)
            before = len(asked)
            gateway.create(prompt="A cat", prompt_extend=False)
            assert len(asked) == before
            assert 'name="prompt_extend"' in gateway.ask("GET", "/").body.decode()
        assert "secret-key" not in (tmp_path / "data.log").read_text()
    assert {headers["Authorization"] for _, headers, _ in asked} == {"Bearer secret-key"}


def test_without_a_language_model_nothing_promises_one(gateway):
    refused = gateway.ask("POST", "/v1/videos", {"prompt": "x", **SMALL, "prompt_extend": True})
    assert (refused.status, refused.error["param"]) == (400, "prompt_extend")
    assert "prompt_extend" not in gateway.ask("GET", "/").body.decode()


def send(gateway, content, *, close=False):
    """The answer to bytes as they are."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        connection.sendall(content)
        if close:
            connection.shutdown(socket.SHUT_WR)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, json.loads(answer.read())["error"]


def form(*parts, end=b"--x--\r\n"):
    return b"".join(b"--x\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + end


FORM = {"content-type": "multipart/form-data; boundary=x"}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        (FORM, form(b'name="prompt"\r\n\r\nx', end=b""), 400, "invalid_form"),
        (FORM, b"\0" * 1000, 400, "invalid_form"),
        (FORM, form(b'name="prompt"\r\n\r\n\xff\xfe'), 400, "invalid_form"),
        (FORM, form(b'name="prompt"\r\n\r\nx', b'name="prompt"\r\n\r\ny'), 400, "duplicate_field"),
        (FORM, form(b'name="prompt"; filename="../../x"\r\n\r\nx'), 400, "invalid_type"),
        (FORM, form(b'name="prompt"\r\n\r\nx', b'name="' + b"a[" * 2000 + b'"\r\n\r\nx'), 400, "unknown_field"),
        (FORM, form(b'name="prompt"\r\n\r\nx', *[b'name="seed[]"\r\n\r\n1'] * 200), 400, "invalid_form"),
        ({"content-type": "multipart/form-data"}, form(b'name="prompt"\r\n\r\nx'), 400, "invalid_form"),
        (JSON, b'{"prompt": "\xff"}', 400, "invalid_json"),
        (JSON, b"[" * 100_000, 400, "invalid_json"),
        (JSON, b'{"prompt": "x", "prompt": "y"}', 400, "duplicate_field"),
        (JSON, b'{"prompt": "x", "seed": NaN}', 400, "invalid_json"),
        (JSON, b'{"prompt": "x", "seed": 1e400}', 400, "invalid_type"),
        (JSON, b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (JSON, b'{"prompt": "\\ud800"}', 400, "invalid_encoding"),
        (JSON, b'{"prompt": "x", "seed": 1, "extra_params": {"seed": 2}}', 400, "duplicate_field"),
        (JSON, b'{"prompt": "x", "fps": 8, "frame_rate": 8}', 400, "duplicate_field"),
        (JSON, b'{"prompt": "x", "guidance_scale": 3, "guidance_low_noise": 3}', 400, "conflicting_fields"),
        (JSON, b'{"prompt": "x", "num_frames": 9, "seconds": 1}', 400, "conflicting_fields"),
        (JSON, b'{"prompt": "x", "num_frames": 6}', 400, "invalid_value"),
        (JSON, b'{"prompt": "x", "size": "99999x99999"}', 400, "invalid_value"),
        (JSON, b'{"prompt": "x", "num_frames": 4000001}', 400, "invalid_value"),
        (JSON, b'{"prompt": "x", "output_path": "/tmp/x"}', 400, "unknown_field"),
        (JSON, b'{"prompt": "x", "lora": "../x"}', 400, "invalid_value"),
        (JSON, json.dumps({"prompt": "x" * 40_000}).encode(), 400, "invalid_value"),
        ({"content-type": "text/xml"}, b"<x/>", 415, "unsupported_media_type"),
        ({**JSON, "content-encoding": "gzip"}, b'{"prompt": "x"}', 415, "unsupported_media_type"),
        (JSON, b'{"prompt": "x", "look": 3}', 400, "invalid_type"),
    ],
)  # fmt: skip
def test_bad_bodies_get_an_error_of_openais_shape_and_make_no_job(gateway, headers, body, status, code):
    before = gateway.ask("GET", "/v1/videos?limit=1").json["first_id"]
    answer = gateway.ask("POST", "/v1/videos", body, **headers)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert answer.error["message"]
    assert "Traceback" not in answer.body.decode()
    assert "/root" not in answer.body.decode()
    assert gateway.ask("GET", "/v1/videos?limit=1").json["first_id"] == before


@pytest.mark.parametrize(
    "path",
    [
        "/v1/videos/..%2f..%2fetc",
        "/v1/videos/video_x",
        "/v1/videos/" + "a" * 5000,
        "/v1/videos/%ff",
        "/v1/videos/x/content",
        "/v1/videos/video_" + "0" * 32 + "/events",
        "/v1/models/none",
        "/nothing",
    ],
)
def test_what_is_not_there_is_a_404_of_openais_shape(gateway, path):
    answer = gateway.ask("GET", path)
    assert (answer.status, answer.error["code"], answer.error["type"]) == (404, "not_found", "not_found_error")


def test_bodies_that_are_too_large_are_refused(gateway):
    for declared in ("content-length: 104857600\r\n\r\n", "transfer-encoding: chunked\r\n\r\n"):
        head = f"POST /v1/videos HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{declared}"
        chunk = b" " * 2**20
        body = chunk * 100 if "length" in declared else (b"100000\r\n" + chunk + b"\r\n") * 100 + b"0\r\n\r\n"
        status, error = send(gateway, head.encode() + body)
        assert (status, error["code"]) == (413, "too_large")


def test_what_is_not_http_and_what_takes_a_video_get_openais_shape_too(gateway):
    for nonsense in (b"\x16\x03\x01 hello\r\n\r\n", b"GET / HTTP/1.1\r\nhost: a b\r\nx y: z\r\n\r\n"):
        status, error = send(gateway, nonsense)
        assert (status, error["code"]) == (400, "invalid_http")
    for path in (f"video_{'0' * 32}/remix", "edits", "extensions", "characters"):
        answer = gateway.ask("POST", f"/v1/videos/{path}", {"prompt": "x"})
        assert (answer.status, answer.error["code"]) == (400, "unsupported_operation")
        assert "expected POST /v1/videos" in answer.error["message"]


def test_a_list_is_asked_for_properly(gateway):
    for query in ("limit=101", "limit=-1", "limit=x", "order=up", "page=2"):
        assert gateway.ask("GET", f"/v1/videos?{query}").status == 400
    assert gateway.ask("GET", "/v1/videos?limit=0").json["data"] == []
    assert gateway.ask("GET", "/v1/videos?after=video_&order=desc").json["data"] == []


def test_descriptions(gateway):
    described = gateway.ask("GET", "/openapi.json").json
    properties = described["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "steps", "guidance_high_noise"} <= properties["properties"].keys()
    metrics = gateway.ask("GET", "/metrics").body.decode()
    assert 'wan_gateway_jobs{model="wan2.2-t2v-a14b-tiny",status="completed"}' in metrics
    assert "a fox" not in metrics
    assert gateway.ask("GET", "/health").json == {"status": "ok"}


def test_keys_see_their_own_videos_and_have_limits(triton, tmp_path):
    def run(*words):
        command = [WAN_TRT, "gateway", "key", *words, "--data", tmp_path / "data"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    ann, bob = run("add", "ann", "--waiting", "1"), run("add", "bob", "--priority", "2")
    with gateway_in_front(
        tmp_path / "data", [triton.url], "--queue-size", "3", "--finish-within", 0, path="/health"
    ) as gateway:
        assert gateway.ask("GET", "/ready").status in (200, 503)  # asks for no key
        for wrong in ("", ann[:-1] + ("a" if ann[-1] != "a" else "b"), "wan_x"):
            answer = gateway.ask("GET", "/v1/videos", authorization=f"Bearer {wrong}")
            assert (answer.status, answer.headers["www-authenticate"][:6]) == (401, "Bearer")
        with pytest.raises(openai.AuthenticationError) as error:
            gateway.client(api_key="wrong").videos.list()
        assert error.value.code == "invalid_api_key"
        gateway.key = ann
        while gateway.ask("GET", "/ready").status != 200:
            time.sleep(0.05)
        running = gateway.create(**LONG)
        gateway.wait(running, "in_progress")
        waiting = gateway.create()
        full = gateway.ask("POST", "/v1/videos", {"prompt": "x", **SMALL})
        assert (full.status, full.error["code"]) == (429, "key_limit_reached")
        assert int(full.headers["retry-after"]) >= 1
        gateway.key = bob
        for path in ("", "/content", "/events"):
            assert gateway.ask("GET", f"/v1/videos/{waiting}{path}").status == 404
        assert gateway.ask("DELETE", f"/v1/videos/{waiting}").status == 404
        assert gateway.ask("POST", f"/v1/videos/{waiting}/cancel").status == 404
        assert gateway.ask("GET", "/v1/videos").json["data"] == []
        assert gateway.video(gateway.create(priority=1))["priority"] == 2
        gateway.create()
        full = gateway.ask("POST", "/v1/videos", {"prompt": "x", **SMALL})
        assert (full.status, full.error["code"]) == (429, "queue_full")
        assert full.headers["x-should-retry"] in ("true", "false")
        run("revoke", "bob")
        while gateway.ask("GET", "/v1/videos").status != 401:
            time.sleep(0.05)
        assert ann.rpartition("_")[2] not in (tmp_path / "data" / "gateway.sqlite").read_bytes().decode("latin-1")
        assert "revoked" in run("list")


def test_a_status_is_answered_while_many_ask(gateway, video):
    """No request waits for the others' database calls or images."""
    failures = []

    def ask():
        for _ in range(20):
            if gateway.video(video[0])["status"] != "completed":
                failures.append(1)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
