"""Prompts rewritten by a language model: every fault of an endpoint leaves the user's own prompt, and says why."""

import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from runtime.extend import Endpoint, NotExtendedError, extended
from runtime.recipe import read_recipe
from runtime.request import Request
from wan22.errors import UserError
from wan_trt.cli import app

GOOD = "Day time, Wide shot. A red panda rides a small bicycle along a wet street, rain falls, the camera follows."


def said(text, **more):
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop", **more}]}


@contextmanager
def endpoint(*answers, **given):
    """An endpoint that gives ``answers`` in turn, the last one for ever; yields it and the requests that it got."""
    asked, done = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if given.get("headers"):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                while not done.wait(0.1):
                    self.wfile.write(b"X: y\r\n")
                return
            answer = answers[min(len(asked), len(answers) - 1)]
            asked.append((self.path, dict(self.headers), body))
            if answer == "never":
                done.wait()
                return
            status, content = answer if isinstance(answer, tuple) else (200, answer)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/v1/chat/completions")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if given.get("drip"):
                for byte in content:
                    if done.wait(0.2):
                        return
                    self.wfile.write(bytes([byte]))
            else:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        total_s = given.get("total_s", 20.0)
        yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "qwen", key="secret-key", total_s=total_s), asked
    finally:
        done.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f'"{GOOD}"',
        f"```\n{GOOD}\n```",
        f"```text\n{GOOD}\n```",
        f"<think>The user wants\na panda.</think>\n\n{GOOD}",
        f"\n  {GOOD}\n",
        GOOD.replace(". ", ".\n"),
    ],
)
def test_the_prompt_is_found_in_what_models_answer(text):
    with endpoint(said(text)) as (there, asked):
        made = extended(Request("A red panda rides a bicycle", seed=7), there, lambda text: True)
    assert made.prompt == GOOD
    assert (made.written, made.extended_by) == ("A red panda rides a bicycle", "qwen at 127.0.0.1")
    ((path, headers, body),) = asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret-key"
    assert (body["model"], body["seed"], body["stream"]) == ("qwen", 7, False)
    assert body["messages"][1] == {"role": "user", "content": "A red panda rides a bicycle"}


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((500, {"error": "no"}), "status 500"),
        ((401, {}), "status 401"),
        ((302, {}), "status 302"),
        (b"<html>", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ({}, "without choices"),
        ({"choices": []}, "without choices"),
        ([], "without choices"),
        (said(None), "type NoneType"),
        (said(["a"]), "type list"),
        (said(""), "an empty answer"),
        (said("<think>only thoughts</think>"), "an empty answer"),
        (said("<think>thoughts without end"), "thoughts without an end"),
        (said("```\n```"), "an empty answer"),
        (said("A cat", finish_reason="length"), "cut at its length"),
        (said("x" * 3000), "3000 characters, asked twice"),
        (b'{"choices": [{"message": {"content": "\\ud800"}}]}', "not UTF-8"),
        (b" " * (2**20 + 1), "more than 1 MiB"),
        (said("a\x00b \x1b[31mred"), "control characters"),
        (said("a\u202eb"), "control characters"),
    ],
)
def test_answers_that_are_no_prompt_are_told(answer, why):
    with endpoint(answer) as (there, _), pytest.raises(NotExtendedError, match=why) as told:
        extended(Request("A cat"), there, lambda text: True)
    assert "secret-key" not in str(told.value)


def test_a_long_answer_is_asked_for_again_once():
    with endpoint(said("word " * 600), said(GOOD)) as (there, asked):
        made = extended(Request("A cat"), there, lambda text: len(text) < 500)
    assert made.prompt == GOOD
    assert [len(body["messages"]) for _, _, body in asked] == [2, 4]


@pytest.mark.parametrize("how", [{}, {"drip": True}, {"headers": True}])
def test_an_endpoint_that_does_not_end_is_left(how):
    answer = said(GOOD) if how else "never"
    with endpoint(answer, total_s=0.5, **how) as (there, _), pytest.raises(NotExtendedError, match=r"within 0\.5 s"):
        extended(Request("A cat"), there, lambda text: True)


def test_nobody_at_the_address_is_told():
    with endpoint(said(GOOD)) as (there, _):
        pass
    with pytest.raises(NotExtendedError, match="no connection"):
        extended(Request("A cat"), there, lambda text: True)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://h/v1 x",
        "http://h/v1\r\nX: y",
        "localhost:1234",
        "ftp://host/v1",
        "http://user:pass@host/v1",
        "http://h/v1?k=1",
    ],
)
def test_addresses_that_are_none_are_refused(url):
    with pytest.raises(UserError, match="WAN_TRT_EXTEND_KEY"):
        Endpoint(url)


def test_an_image_goes_along_in_small():
    png = io.BytesIO()
    Image.new("RGB", (1024, 768), "red").save(png, "PNG")
    with endpoint(said(GOOD)) as (there, asked):
        extended(Request("It waves", image=png.getvalue()), there, lambda text: True)
    (_, _, body) = asked[0]
    picture, text = body["messages"][1]["content"]
    assert text == {"type": "text", "text": "It waves"}
    sent = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].partition(",")[2])))
    assert sent.width * sent.height <= 512 * 512
    assert abs(sent.width / sent.height - 4 / 3) < 0.01
    assert "Wide shot" not in body["messages"][0]["content"]


def test_generate_records_both_prompts_and_goes_on_without(tiny_engines, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WAN_TRT_EXTEND_KEY", "secret-key")
    words = ["generate", str(tiny_engines), "A cat", "--size", "64x64", "--frames", "1", "--steps", "1"]

    def run(*more):
        with pytest.raises(SystemExit) as left:
            app([*words, *map(str, more)])
        told = capsys.readouterr()
        assert "secret-key" not in told.out + told.err
        return left.value.code or 0, told.out + told.err

    made, plain = tmp_path / "made.png", tmp_path / "plain.png"
    with endpoint(said(GOOD), (503, {})) as (there, asked):
        extend = ["--extend", there.url, "--extend-model", "qwen"]
        code, told = run("-o", made, *extend, "--look", "noir")
        assert code == 0, told
        recipe = read_recipe(made)
        assert recipe.prompt == f"Night time, Hard lighting, Side lighting, Cool colors, Dutch angle shot. {GOOD}"
        assert (recipe.written, recipe.extended_by) == ("A cat", "qwen at 127.0.0.1")
        with pytest.raises(SystemExit):
            app(["generate", str(tiny_engines), "--again", str(made), "-o", str(tmp_path / "again.png")])
        assert (tmp_path / "again.png").read_bytes() == made.read_bytes()
        capsys.readouterr()

        code, told = run("-o", plain, *extend)
        assert code == 0
        assert "prompt not rewritten (127.0.0.1: status 503)" in told
        assert (read_recipe(plain).prompt, read_recipe(plain).written) == ("A cat", "")
        code, told = run("-o", tmp_path / "none.png", *extend, "--extend-required")
        assert (code, "status 503" in told) == (2, True)
        assert not (tmp_path / "none.png").exists()
        before = len(asked)
        code, told = run("-o", tmp_path / "none.png", *extend, "--steps", "5000")
        assert code == 2
        assert len(asked) == before, "a prompt left the machine for a run that cannot be"
    assert run("-o", plain, "--extend-model", "qwen")[0] == 2
