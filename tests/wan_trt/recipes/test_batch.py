"""A batch makes every video once: over broken lines, killed runs, lost workers, nodes and servers."""

import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from wan22.errors import UserError
from wan22.files import LOCK, claim, hidden_folder
from wan_trt.cli import app
from wan_trt.recipes.batch.jobs import Job, Result, read_jobs
from wan_trt.recipes.batch.run import WorkerLostError, Workers, run_batch

SMALL = {"size": "64x64", "num_frames": 1, "steps": 1, "output_format": "png"}


def jobs_file(path, *jobs):
    path.write_text("".join(job + "\n" if isinstance(job, str) else json.dumps(job) + "\n" for job in jobs))
    return path


def results_of(folder):
    return [json.loads(line) for line in (Path(folder) / "results.jsonl").read_text().splitlines()]


def scratch(folder):
    """A place for temporary files that a test can look at."""
    (folder / "scratch").mkdir(exist_ok=True)
    return folder / "scratch"


def batch(*words):
    """The exit code of ``wan-trt batch``."""
    with pytest.raises(SystemExit) as left:
        app(["batch", *map(str, words)])
    return left.value.code or 0


def test_every_job_has_a_file_and_a_line_and_is_what_generate_makes(tiny_engines, tmp_path, capsys):
    jobs = jobs_file(
        tmp_path / "jobs.jsonl",
        {"name": "red", "prompt": "A red ball", "seed": 3, **SMALL},
        {"name": "noir", "prompt": "A cat", "look": "noir, Close-up shot", "guidance": 2.5, **SMALL},
        '{"prompt": "A cat", "seeed": 3}',
        "",
        {"name": "large", "prompt": "A cat", "size": "65x64"},
        '{"name": "torn", "prompt"',
        {"prompt": "unnamed", **SMALL},
        {"name": "own", "prompt": "A red ball", "seed": 3, "noise": "noise.npy", **SMALL},
    )
    np.save(tmp_path / "noise.npy", np.random.default_rng(1).standard_normal((1, 16, 1, 8, 8), np.float32))
    out = tmp_path / "out"
    assert batch(jobs, out, "--engines", tiny_engines) == 1
    told = capsys.readouterr().out
    assert "4 done, 3 failed" in told
    assert "line 3 failed: 'seeed' | expected seed" in told
    assert "large (line 5) failed: " in told
    by_name = {each["name"]: each for each in results_of(out)}
    assert {name: each["seed"] for name, each in by_name.items() if each["status"] == "done"} == {
        "red": 3,
        "noir": 0,
        "line-00007": 0,
        "own": 3,
    }
    assert {name for name, each in by_name.items() if each["status"] == "failed"} == {
        "line-00003",
        "large",
        "line-00006",
    }
    assert "line 3: 'seeed' | expected seed" in by_name["line-00003"]["error"]
    assert "65x64" in by_name["large"]["error"]
    for name in ("red", "noir", "line-00007", "own"):
        assert by_name[name]["sha256"] == hashlib.sha256((out / by_name[name]["file"]).read_bytes()).hexdigest()
    for name, more in (("red", ()), ("own", ("--noise", str(tmp_path / "noise.npy")))):
        with pytest.raises(SystemExit):
            app(["generate", str(tiny_engines), "A red ball", "--seed", "3", "--size", "64x64", "--frames", "1",
                 "--steps", "1", "-o", str(tmp_path / f"{name}.png"), *more])  # fmt: skip
        assert (tmp_path / f"{name}.png").read_bytes() == (out / f"{name}.png").read_bytes()

    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    (out / "noir.png").write_bytes(b"damaged")
    assert batch(jobs, out, "--engines", tiny_engines) == 1
    assert "1 done, 3 failed, 3 from earlier runs" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"noir.png"}


def test_images_are_found_beside_the_file_of_jobs(flow_of, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in" / "red.png")
    one = {"prompt": "It moves", "size": "64x64", "num_frames": 5, "steps": 1}
    jobs = jobs_file(
        tmp_path / "in" / "jobs.jsonl",
        {"name": "there", "image": "red.png", **one},
        {"name": "gone", "image": "blue.png", **one},
        {"name": "none", **one},
        {"name": "lit", "image": "red.png", "look": "noir", **one},
    )
    assert batch(jobs, tmp_path / "out", "--engines", flow_of("i2v-a14b-tiny").engines) == 1
    found = {each["name"]: each.get("error", "") for each in results_of(tmp_path / "out")}
    assert found["there"] == ""
    assert "blue.png" in found["gone"]
    assert "no image" in found["none"]
    assert "with an image" in found["lit"]
    assert (tmp_path / "out" / "there.mp4").exists()


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([{"name": "a", "prompt": "x"}, {"name": "a", "prompt": "y"}], "'a' in lines 1 and 2"),
        ([], "has no jobs"),
    ],
)
def test_a_file_of_jobs_that_is_wrong_as_a_whole_is_refused(lines, told, tiny_engines, tmp_path, capsys):
    assert batch(jobs_file(tmp_path / "jobs.jsonl", *lines), tmp_path / "out", "--engines", tiny_engines) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": 3}', "prompt 3 | expected text"),
        ('{"prompt": "x", "steps": "3"}', 'steps "3" | expected a whole number'),
        ('{"prompt": "x", "steps": true}', "steps true | expected a whole number"),
        ('{"prompt": "x", "name": "../up"}', "name '../up'"),
        ('{"prompt": "x", "name": ".hidden"}', "name '.hidden'"),
        ('{"prompt": " "}', "no prompt"),
        ('{"prompt": "x", "output_format": "gif"}', "output_format 'gif'"),
        ('{"prompt": "x", "look": 3}', "look '3'"),
        ('["x"]', "a list"),
        ('{"prompt": "x", "prompt": "y"}', "'prompt' twice"),
        ('{"prompt": "x", "size": "256x160", "width": 100}', "size with width"),
        ('{"prompt": "x", "fps": 0}', "fps 0 | expected 1 to 240"),
        ('{"prompt": "a\\u0000b"}', "prompt with a NUL"),
        ("[" * 100_000, "a JSON object"),
        ("\udcff", "a JSON object"),
    ],
)
def test_a_broken_line_is_a_failed_job(line, told, tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_bytes(line.encode("utf-8", "surrogateescape") + b'\n{"prompt": "fine"}\n')
    broken, fine = read_jobs(path)
    assert isinstance(broken, Result)
    assert told in broken.error
    assert isinstance(fine, Job)


def test_an_image_with_a_name_that_no_file_can_have_is_a_failed_job(tmp_path):
    jobs = jobs_file(tmp_path / "jobs.jsonl", r'{"name": "a", "prompt": "x", "image": "\ud800.png"}', {"prompt": "y"})
    summary = run_batch(jobs, str(tmp_path / "out"), playing(1, lambda job: b"video"))
    assert (summary.done, summary.failed) == (1, 1)
    (error,) = (each["error"] for each in results_of(tmp_path / "out") if each["name"] == "a")
    assert r"\ud800.png" in error


@pytest.mark.parametrize("key", ["image", "noise"])
def test_a_pipe_or_a_device_in_a_job_is_a_failed_job(tmp_path, key):
    name = {"image": "endless", "noise": "endless.npy"}[key]
    os.mkfifo(tmp_path / name)
    jobs = jobs_file(tmp_path / "jobs.jsonl", {"prompt": "x", key: name}, {"prompt": "y"})
    broken, _ = read_jobs(jobs)
    assert f"{name} is a named pipe" in broken.error


def test_a_pipe_for_a_file_of_jobs_is_refused(tmp_path):
    os.mkfifo(tmp_path / "jobs.jsonl")
    with pytest.raises(UserError, match="a named pipe"):
        next(read_jobs(tmp_path / "jobs.jsonl"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--server", "localhost:1", "--residency", "all"), "options of memory with --server"),
        (("--server", "localhost:1", "--key", "key"), "--key without a gateway"),
        (("--engines", "ENGINES", "--model", "mine"), "--model without --server"),
        (("--engines", "ENGINES", "--gpus", "0"), "engines for GPUs | leave it out; --workers N divides the cores"),
    ],
)
def test_options_that_this_way_to_render_would_not_use_are_refused(words, told, tiny_engines, tmp_path, capsys):
    jobs = jobs_file(tmp_path / "jobs.jsonl", {"name": "a", "prompt": "A cat", **SMALL})
    given = [str(tiny_engines) if word == "ENGINES" else word for word in words]
    assert batch(jobs, tmp_path / "out", *given) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_address_that_does_not_speak_http_is_no_gateway_and_its_bytes_are_not_printed(tmp_path, capsys):
    jobs = jobs_file(tmp_path / "jobs.jsonl", {"name": "a", "prompt": "A cat", **SMALL})
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"\0\0\x18\4\0\x1b[31m@\xfe\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert batch(jobs, tmp_path / "out", "--server", address) == 2
        thread.join()
    told = capsys.readouterr().err
    assert "an answer that is not HTTP" in told
    assert "a Triton server is named as HOST:PORT" in told
    assert told.rstrip("\n").isprintable()


def test_a_folder_of_another_batch_or_of_other_files_is_refused(tiny_engines, flow_of, tmp_path, capsys):
    out = tmp_path / "out"
    first = jobs_file(tmp_path / "first.jsonl", {"name": "a", "prompt": "A cat", **SMALL})
    assert batch(first, out, "--engines", tiny_engines) == 0
    other = jobs_file(tmp_path / "other.jsonl", {"name": "a", "prompt": "A dog", **SMALL})
    assert batch(other, out, "--engines", tiny_engines) == 2
    assert "a.png of another line" in capsys.readouterr().err
    assert batch(first, out, "--engines", flow_of("ti2v-5b-tiny").engines) == 2
    assert "a.png of another engines" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert batch(first, tmp_path / "full", "--engines", tiny_engines) == 2
    assert "holds other files" in capsys.readouterr().err


class Playing:
    """A worker whose ``play`` decides what becomes of a job."""

    def __init__(self, name, play):
        self.name, self.render = name, play

    def stop(self):
        pass


def playing(count, play, opened=None):
    @contextmanager
    def open_worker(index):
        if opened is not None:
            opened(index)
        yield Playing(f"worker-{index}", play)

    return Workers(count, "engines", open_worker)


def test_a_job_goes_to_another_worker_once_and_never_runs_twice_at_an_end(tmp_path):
    lost = {"b": 1, "c": 9}

    def play(job):
        if lost.get(job.name, 0):
            lost[job.name] -= 1
            raise WorkerLostError("gone")
        return job.name.encode()

    jobs = jobs_file(tmp_path / "jobs.jsonl", *({"name": name, "prompt": "x"} for name in "abcdefgh"))
    told = []
    summary = run_batch(jobs, str(tmp_path / "out"), playing(3, play), tell=told.append)
    assert (summary.done, summary.failed, summary.missing) == (7, 1, 0)
    assert "2 workers were lost with it" in summary.errors[0].error
    names = [each["name"] for each in results_of(tmp_path / "out")]
    assert sorted(names) == list("abcdefgh")
    assert sum("was lost with" in line for line in told) == 3


def test_a_long_job_gives_signs_of_life(tmp_path):
    told, heard = [], threading.Event()

    def play(job):
        assert heard.wait(30)
        return b"video"

    def tell(line):
        told.append(line)
        heard.set()

    jobs = jobs_file(tmp_path / "jobs.jsonl", {"name": "long", "prompt": "x"})
    run_batch(jobs, str(tmp_path / "out"), playing(1, play), tell=tell, beat_s=0.05)
    assert told[0].startswith("1 jobs left; running: long for 0 s")


def test_workers_that_cannot_render_are_left_out_and_the_last_ones_error_ends_the_batch(tmp_path):
    def only_second(index):
        if index != 1:
            raise UserError(f"node {index}: no engines", "the engines on every node", "copy them")

    jobs = jobs_file(tmp_path / "jobs.jsonl", *({"name": name, "prompt": "x"} for name in "abc"))
    summary = run_batch(jobs, str(tmp_path / "out"), playing(3, lambda job: b"video", only_second))
    assert (summary.done, summary.missing) == (3, 0)

    def none(index):
        raise UserError(f"node {index}: no engines", "the engines on every node", "copy them")

    with pytest.raises(UserError, match="no engines"):
        run_batch(jobs, str(tmp_path / "none"), playing(2, lambda job: b"video", none))
    assert results_of(tmp_path / "none") == []


def test_a_worker_that_ends_in_an_unexpected_error_ends_the_batch_where_it_was_the_last(tmp_path):
    def no_room(index):
        if index == 0:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    jobs = jobs_file(tmp_path / "jobs.jsonl", *({"name": name, "prompt": "x"} for name in "abc"))
    summary = run_batch(jobs, str(tmp_path / "out"), playing(2, lambda job: b"video", no_room))
    assert (summary.done, summary.missing) == (3, 0)
    with pytest.raises(OSError, match=os.strerror(errno.EAGAIN)):
        run_batch(jobs, str(tmp_path / "none"), playing(1, lambda job: b"video", no_room))

    def leave(job):
        raise SystemExit

    with pytest.raises(SystemExit):
        run_batch(jobs, str(tmp_path / "left"), playing(1, leave))


def test_an_error_that_is_no_utf8_is_recorded(tmp_path):
    def play(job):
        raise RuntimeError("no \ud800")

    jobs = jobs_file(tmp_path / "jobs.jsonl", {"name": "a", "prompt": "x"})
    assert run_batch(jobs, str(tmp_path / "out"), playing(1, play)).failed == 1
    assert results_of(tmp_path / "out")[0]["error"] == r"line 1: no \ud800"


def test_what_a_store_raises_is_one_line_and_a_file_url_is_a_folder(tmp_path, monkeypatch):
    jobs = jobs_file(tmp_path / "jobs.jsonl", {"name": "a", "prompt": "x"})
    files = fsspec.filesystem("memory")
    monkeypatch.setattr(type(files), "pipe_file", lambda *_: (_ for _ in ()).throw(RuntimeError("credentials")))
    with pytest.raises(UserError, match=r"memory://batch/two: RuntimeError: credentials \| expected a store"):
        run_batch(jobs, "memory://batch/two", playing(1, lambda job: b"video"))
    url = f"file://{tmp_path / 'out'}"
    with claim(tmp_path / "out" / "results.jsonl"), pytest.raises(UserError, match="another process writes"):
        run_batch(jobs, url, playing(1, lambda job: b"video"))
    assert run_batch(jobs, url, playing(1, lambda job: b"video")).done == 1
    assert len(results_of(tmp_path / "out")) == 1


def test_a_run_that_was_killed_before_its_first_line_is_no_other_folder(tmp_path):
    jobs, out = jobs_file(tmp_path / "jobs.jsonl", {"name": "a", "prompt": "x"}), tmp_path / "out"
    hidden = hidden_folder(out / "results.jsonl")
    hidden.mkdir(parents=True)
    (hidden / LOCK).touch()
    assert run_batch(jobs, str(out), playing(1, lambda job: b"video")).done == 1
    assert {path.name for path in out.iterdir()} == {"a.mp4", "results.jsonl"}


def test_results_under_a_url_are_the_same_and_go_on(tmp_path):
    jobs = jobs_file(tmp_path / "jobs.jsonl", {"name": "a", "prompt": "x"}, {"name": "b", "prompt": "y"})
    url, made = "memory://batch/one", []

    def play(job):
        made.append(job.name)
        return job.name.encode()

    assert run_batch(jobs, url, playing(1, play)).done == 2
    files = fsspec.filesystem("memory")
    assert files.cat_file("/batch/one/a.mp4") == b"a"
    files.rm("/batch/one/b.mp4")
    again = run_batch(jobs, url, playing(1, play))
    assert (again.done, again.earlier) == (1, 1)
    assert made == ["a", "b", "b"]
    with pytest.raises(UserError, match="fsspec"):
        run_batch(jobs, "nosuch://place", playing(1, play))


def test_a_killed_run_leaves_whole_videos_and_the_next_one_makes_the_rest(tiny_engines, tmp_path):
    jobs = jobs_file(tmp_path / "jobs.jsonl", *({"name": f"j{n}", "prompt": f"Cat {n}", **SMALL} for n in range(6)))
    out, words = tmp_path / "out", ["batch", str(jobs), str(tmp_path / "out"), "--engines", str(tiny_engines)]
    code = "import sys; from wan_trt.cli import app; app(sys.argv[1:])"
    command, env = (
        [sys.executable, "-c", code, *words, "--workers", "2"],
        os.environ | {"TMPDIR": str(scratch(tmp_path))},
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
        while not list(out.glob("*.png")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.stdout.read()  # its workers have it too, and end after it
    assert not list(scratch(tmp_path).glob("wan-trt-*"))
    with (out / "results.jsonl").open("ab") as lines:
        lines.write(b'{"name": "j5", "status": "do')  # as a kill inside a write leaves it
    for path in out.glob("*.png"):
        Image.open(path).load()
    assert batch(*words[1:]) == 0
    by_name = {each["name"]: each for each in results_of(out)}
    assert len(by_name) == 6
    assert {path.name for path in out.iterdir()} == {"results.jsonl", *(f"j{n}.png" for n in range(6))}


def test_ctrl_c_ends_the_workers_and_keeps_what_is_done(tiny_engines, tmp_path):
    jobs = jobs_file(tmp_path / "jobs.jsonl", *({"name": f"j{n}", "prompt": f"Cat {n}", **SMALL} for n in range(50)))
    out = tmp_path / "out"
    code = "import sys; from wan_trt.cli import app; app(sys.argv[1:])"
    words = [sys.executable, "-c", code, "batch", str(jobs), str(out), "--engines", str(tiny_engines)]
    env = os.environ | {"TMPDIR": str(scratch(tmp_path))}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=env)
    while not list(out.glob("*.png")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    told, error = (each.decode() for each in process.communicate())
    assert process.returncode == 130, error
    done = len(results_of(out))
    assert f"{done} done, 0 failed, 0 from earlier runs, {50 - done} not made" in told
    assert not list(scratch(tmp_path).glob("wan-trt-*"))
    assert "interrupted" in error
    assert "Traceback" not in error
    assert {each["file"] for each in results_of(out)} == {path.name for path in out.glob("*.png")}
    with pytest.raises(ProcessLookupError):
        while True:  # its child ends with it
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def test_ctrl_c_does_not_wait_for_a_long_job(tiny_engines, tmp_path):
    long = {"name": "long", "prompt": "A cat", "size": "96x96", "num_frames": 81, "steps": 1000, "seed": 1}
    jobs = jobs_file(tmp_path / "jobs.jsonl", {"name": "a", "prompt": "A cat", **SMALL}, long)
    code = "import sys; from wan_trt.cli import app; app(sys.argv[1:])"
    words = [sys.executable, "-c", code, "batch", str(jobs), str(tmp_path / "out"), "--engines", str(tiny_engines)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (tmp_path / "out" / "a.png").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert b"interrupted" in process.communicate()[1]
    assert process.returncode == 130
    assert [each["name"] for each in results_of(tmp_path / "out")] == ["a"]


@contextmanager
def ray_cluster(nodes):
    """A cluster of this machine with ``nodes`` beside its head, which has no cores for actors; yields it and them."""
    ray_utils = pytest.importorskip("ray.cluster_utils")
    cluster = ray_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster, [cluster.add_node(num_cpus=1) for _ in range(nodes)]
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node_accounts_for_every_job(tiny_engines, tmp_path):
    from wan_trt.recipes.batch.workers import Opening, ray_workers

    jobs = jobs_file(tmp_path / "jobs.jsonl", *({"name": f"j{n}", "prompt": f"Cat {n}", **SMALL} for n in range(16)))
    killed, told, opened = [], [], threading.Semaphore(0)
    with ray_cluster(2) as (cluster, nodes), ray_workers(Opening(tiny_engines), cluster.address) as workers:
        assert workers.count == 2  # the head has no cores for an actor

        @contextmanager
        def open_worker(index):
            with workers.open(index) as worker:
                opened.release()
                yield worker

        def kill_one(task, done, total, unit=""):
            if done == 1:
                assert opened.acquire(timeout=60)
                assert opened.acquire(timeout=60)  # both render from here on
            if not killed and done and len({each["worker"] for each in results_of(tmp_path / "out")}) == 2:
                cluster.remove_node(nodes[1], allow_graceful=False)
                killed.append(done)

        both = replace(workers, open=open_worker)
        summary = run_batch(jobs, str(tmp_path / "out"), both, progress=kill_one, tell=told.append)
    assert killed
    assert (summary.done, summary.failed, summary.missing) == (16, 0, 0), told
    found = results_of(tmp_path / "out")
    assert sorted(each["name"] for each in found) == sorted(f"j{n}" for n in range(16))
    assert len({each["worker"] for each in found}) >= 2


@pytest.mark.slow
def test_a_node_without_the_engines_is_named_and_no_cluster_is_one_line(tiny_engines, tmp_path, capsys):
    from wan_trt.recipes.batch.workers import Opening, ray_workers

    jobs = jobs_file(tmp_path / "jobs.jsonl", {"name": "a", "prompt": "A cat", **SMALL})
    here = tmp_path / "here"
    here.symlink_to(tiny_engines)
    with ray_cluster(1) as (cluster, _), ray_workers(Opening(here), cluster.address, 1) as workers:
        here.unlink()
        with pytest.raises(UserError, match=r"node .*: .*here has no bundle\.json"):
            run_batch(jobs, str(tmp_path / "out"), workers)
    assert batch(jobs, tmp_path / "none", "--engines", tiny_engines, "--ray", "127.0.0.1:1") == 2
    assert "ray start --head" in capsys.readouterr().err
