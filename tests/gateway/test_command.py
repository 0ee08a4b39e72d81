"""``wan-trt gateway``: what it refuses, and how it starts a server of its own."""

import signal
from types import SimpleNamespace

import pytest

from gateway.worker import Worker
from tests.gateway.running import SMALL, start, wait_until_ready
from triton_repo.server import free_ports
from wan_trt.cli import app


def test_the_list_of_keys_has_their_limits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (("add", "ann"), ("add", "bob", "--waiting", "51", "--running", "7", "--priority", "2"), ("list",)):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            app(["gateway", "key", *words])
        assert not left.value.code
    ann, bob = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith((" ann", " bob")))
    assert (ann[3:], bob[3:]) == (["valid", "1"], ["valid", "51", "7", "2"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "no engines and no --server | expected one of them"),
        (("engines", "--server", "localhost"), "engines and --server | expected one of them"),
        (("--server", "https://localhost"), "expected host and port of a server"),
        (
            ("--server", "localhost", "--address", "0.0.0.0"),
            "without keys | expected a key for clients of other machines",
        ),
        (("--server", "localhost", "--address", ""), "an empty address | expected an address to listen on"),
        (("--server", "localhost", "--database", "mysql://x"), "database: mysql | expected sqlite or a PostgreSQL"),
        (("--server", "localhost", "--database", "nonsense"), "database: not an address"),
        (("--server", "localhost", "--database", "postgresql://x@127.0.0.1:1/x"), "expected sqlite or a PostgreSQL"),
        (("--server", "localhost", "--keep-size", "many"), "--keep-size"),
        (("no-engines",), "no-engines has no bundle.json"),
        (("key", "add", "../x"), "key name '../x' | expected letters"),
        (("key", "revoke", "x", "--data", "typo"), "--data typo has no gateway.sqlite"),
        (("key", "list", "--data", "typo"), "--data typo has no gateway.sqlite"),
        (("--server", "localhost", "--latent", "fixed"), "--latent 'fixed' | expected NAME=FILE"),
        (("--server", "localhost", "--latent", "a=none.npy"), "none.npy"),
        (("--server", "localhost", "--extend-model", "qwen"), "--extend-model without --extend"),
        (("--server", "localhost", "--extend", "http://h/v1", "--extend-key", "none"), "--extend-key none"),
        (("move",), "no --database"),
        (("--server", "localhost", "--lora", "a=b", "--vram", "8GiB"), "--lora, --vram with --server"),
        (("--server", "localhost", "--max-steps", "9", "--residency", "all"), "--max-steps, --residency with --server"),
        (("--server", "localhost", "--longest-job", "60"), "--longest-job with --server"),
    ],
)
def test_what_cannot_be_is_one_line(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    port = ["--port", str(free_ports(1)[0])] if words[:1] not in (("key",), ("move",)) else []
    with pytest.raises(SystemExit) as left:
        app(["gateway", *words, *port])
    assert left.value.code == 2
    printed = capsys.readouterr().err
    assert told in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "typo").exists()


def test_a_server_that_is_not_there_is_named_once(caplog):
    answers = iter((False, False, True, False))
    server = SimpleNamespace(url="gpu1:8001", is_ready=lambda: next(answers), model=lambda: "model")
    worker = Worker("a worker", server, SimpleNamespace(claims=SimpleNamespace(saw=lambda url, model: None)))
    told = []
    for _ in range(4):
        worker._look()
        told.append(caplog.text.count("server gpu1:8001 takes no jobs"))
    assert told == [1, 1, 1, 2]


def test_engines_alone_are_enough_for_a_video(installation, tiny_engines, tmp_path):
    """The server that it starts ends with it, and with a Ctrl-C the queue stays."""
    gateway = start(tmp_path / "data", [], "--finish-within", "0", str(tiny_engines))
    try:
        wait_until_ready(gateway, within_s=120)
        answer = gateway.ask("POST", "/v1/videos/sync", {"prompt": "a fox", **SMALL})
        assert (answer.status, answer.headers["content-type"]) == (200, "video/mp4")
        page = gateway.ask("POST", "/v1/videos", {"prompt": "x", **SMALL}, origin="https://pages.example")
        assert (page.status, page.error["code"]) == (403, "cross_origin")
        rebound = gateway.ask("GET", "/v1/videos", host="pages.example:8080")
        assert (rebound.status, rebound.error["code"]) == (403, "cross_origin")
        gateway.process.send_signal(signal.SIGINT)
        assert gateway.process.wait(60) == 0
    finally:
        gateway.kill()
