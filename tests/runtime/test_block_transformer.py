"""A transformer in stages on the CPU: the whole engine's velocity, whatever is resident, streamed or sliced."""

import re
import shutil
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest

from export.exporter import export_checkpoint
from export.options import ExportOptions
from runtime.backend import open_backend
from runtime.block_backend import BlockOptions
from runtime.block_files import BlockFiles
from runtime.block_forward import fp8_scales
from runtime.blocks_onnxruntime import HostStages
from runtime.engine_onnxruntime import OnnxRuntimeEngine
from runtime.pipeline import Pipeline
from runtime.request import Request
from tests.export.graphs.test_dit import inputs_for, relative_l2
from wan22.block_memory import BlockChoice, block_memory, transformer_blocks
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.quantities import parse_bytes
from wan22.specs import SPECS, T2V_A14B, TI2V_5B

MODELS = ["t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny"]


@pytest.fixture
def opened(blocks_of):
    """``opened(name, weights_in, slices)`` → the backend for a tiny model, and its bundle."""
    with ExitStack() as stack:

        def make(name, weights_in="auto", slices=1):
            bundle = open_bundle(blocks_of(name), "engines")
            backend = open_backend(bundle, stack, BlockOptions(weights_in))
            for component in bundle.manifest.components:
                if component.name in bundle.manifest.spec.experts:
                    engine = backend.new_engine(component)
                    choose = engine._shared.choose
                    engine._shared.choose = lambda tokens, c=choose: replace(c(tokens), slices=slices)
            return backend, bundle

        yield make


def given_to(name):
    spec = SPECS[name].dit
    given = inputs_for(spec, 3, 10, 18, [0.0, 812.0] if spec.time_rows == 2 else [937.5])
    given["text"].flags.writeable = False
    return given


@pytest.mark.parametrize(("weights_in", "slices"), [("vram", 1), ("disk", 1), ("host", 4)])
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_whole_engine_computes(flow_of, opened, name, weights_in, slices):
    whole = open_bundle(flow_of(name).engines, "engines")
    backend, bundle = opened(name, weights_in, slices)
    given = given_to(name)
    for expert in bundle.manifest.spec.experts:
        with (
            OnnxRuntimeEngine(whole.folder, whole.component(expert)) as one,
            backend.new_engine(bundle.component(expert)) as other,
        ):
            assert other.inputs == one.inputs
            expected = one(**given)
            for text in (given["text"], given["text"].copy(), given["text"]):
                assert relative_l2(other(**given | {"text": text}), expected) <= 1.5e-6


def test_experts_take_turns_in_the_same_slots(flow_of, opened):
    name, given = "t2v-a14b-tiny", given_to("t2v-a14b-tiny")
    whole = open_bundle(flow_of(name).engines, "engines")
    backend, bundle = opened(name, "disk")
    expected = {}
    for expert in bundle.manifest.spec.experts:
        with OnnxRuntimeEngine(whole.folder, whole.component(expert)) as engine:
            expected[expert] = engine(**given)
    with (
        backend.new_engine(bundle.component("high_noise")) as high,
        backend.new_engine(bundle.component("low_noise")) as low,
    ):
        stream = None
        for engine, then in ((high, "high_noise"), (high, "low_noise"), (low, "low_noise"), (high, "high_noise")):
            engine.follow(then)
            assert relative_l2(engine(**given), expected[engine.name]) <= 1.5e-6
            assert stream in (None, engine._shared.stream)
            stream = engine._shared.stream


def test_a_pipeline_makes_the_same_video_from_disk_and_prepares_its_steps_once(blocks_of, monkeypatch):
    ran, run = [], HostStages.run
    monkeypatch.setattr(HostStages, "run", lambda self, name, *rest: (ran.append(name), run(self, name, *rest))[1])
    request, latents = Request("a cat", size=(64, 64), frames=5, steps=4), []
    for weights_in in ("vram", "disk"):
        with Pipeline.open(blocks_of("t2v-a14b-tiny"), blocks=BlockOptions(weights_in)) as pipeline:
            *_, last = pipeline.denoise(pipeline.complete(request))
            latents.append(last.latents)
        assert (ran.count("time"), ran.count("text")) == (2, 4)  # by expert, and by expert and prompt
        ran.clear()
    assert np.array_equal(*latents)


def test_many_schedules_do_not_fill_the_memory(opened, monkeypatch):
    monkeypatch.setattr("runtime.block_transformer.TIMES_KEPT", 3)
    backend, bundle = opened("t2v-a14b-tiny")
    with backend.new_engine(bundle.component("high_noise")) as engine:
        rows = np.random.default_rng(0).random((6, SPECS["t2v-a14b-tiny"].dit.freq_width), np.float32)
        for first in range(4):
            asked = rows[first : first + 3]
            engine.prepare(asked)
            assert engine._times.keys() == {row.tobytes() for row in asked}


def test_a_budget_that_is_too_small_is_refused_before_anything_is_loaded(blocks_of):
    with Pipeline.open(blocks_of("t2v-a14b-tiny"), blocks=BlockOptions(vram=2.0**20)) as pipeline:
        request = pipeline.complete(Request("a cat", size=(64, 64), frames=5))
        with pytest.raises(UserError, match=r"--vram 1.00 MiB for \w+ \| expected at least .*MiB") as error:
            next(iter(pipeline.denoise(request)))
        assert not pipeline._open
    offered = parse_bytes(re.search(r"give --vram (\S+),", str(error.value))[1], "--vram")
    with Pipeline.open(blocks_of("t2v-a14b-tiny"), blocks=BlockOptions(vram=offered)) as pipeline:
        assert next(iter(pipeline.denoise(request))).index == 0
        assert pipeline.residency == "one-component"  # the budget is not that of each of several
    with Pipeline.open(blocks_of("t2v-a14b-tiny"), blocks=BlockOptions(vram=100 * offered)) as pipeline:
        pipeline.fit(request.video)
        assert pipeline.residency == "all"
    with (
        Pipeline.open(blocks_of("t2v-a14b-tiny"), blocks=BlockOptions(vram=0.99 * offered)) as pipeline,
        pytest.raises(UserError, match="at least"),
    ):
        pipeline.fit(request.video)


def test_the_video_that_would_fit_is_that_of_engines_in_blocks(blocks_of):
    asked = (512, 512, 81)
    with Pipeline.open(blocks_of("t2v-a14b-tiny")) as pipeline:
        pipeline._available_bytes = 0.5 * pipeline._needed(asked)["one-component"]
        with pytest.raises(UserError, match=r"\d+x\d+ with --frames \d+ fits") as error:
            pipeline.fit(asked)
        fit = tuple(map(int, re.search(r"(\d+)x(\d+) with --frames (\d+) fits", str(error.value)).groups()))
        assert pipeline._needed(fit)["one-component"] <= pipeline._available_bytes


def test_a_weights_file_that_is_cut_short_is_one_line(blocks_of, tmp_path):
    folder = tmp_path / "engines"
    shutil.copytree(blocks_of("t2v-a14b-tiny"), folder)
    with Pipeline.open(folder, blocks=BlockOptions("disk")) as pipeline:
        path = folder / "high_noise.weights"
        path.write_bytes(path.read_bytes()[: path.stat().st_size - 3_000_000])
        request = pipeline.complete(Request("a cat", size=(64, 64), frames=5))
        with pytest.raises(UserError, match=r"high_noise.weights ends at \d+ bytes \| expected \d+"):
            next(iter(pipeline.denoise(request)))


def test_ctrl_c_inside_a_forward_leaves_engines_that_go_on(opened, monkeypatch):
    backend, bundle = opened("ti2v-5b-tiny", "disk")
    given, ran, run = given_to("ti2v-5b-tiny"), [], HostStages.run

    def interrupted(self, name, *rest):
        ran.append(name)
        if ran == ["patches", "qkv", "attend"]:
            raise KeyboardInterrupt
        run(self, name, *rest)

    with backend.new_engine(bundle.component("dit")) as engine:
        expected = engine(**given)
        monkeypatch.setattr(HostStages, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine(**given)
        assert np.array_equal(engine(**given), expected)


def test_a_slow_disk_is_a_figure(opened, monkeypatch):
    backend, bundle = opened("ti2v-5b-tiny", "disk")
    fill, wait, waited = BlockFiles.fill, HostStages.wait, threading.Event()

    def slow(*arguments):
        assert waited.wait(60)
        time.sleep(0.02)  # longer than a computation that waits
        fill(*arguments)

    with backend.new_engine(bundle.component("dit")) as engine:
        given = given_to("ti2v-5b-tiny")
        engine._text(given["text"])  # these read weights that do not stream
        engine.prepare(given["time_features"])
        monkeypatch.setattr(BlockFiles, "fill", slow)
        monkeypatch.setattr(HostStages, "wait", lambda self, event: (waited.set(), wait(self, event))[1])
        engine(**given)
    assert backend.blocks.streamed.seconds_waited >= 0.02
    assert backend.blocks.streamed.seconds_copied >= 0.04


def test_weights_of_another_precision_than_the_engines_are_one_line(flow_of, blocks_of, tmp_path):
    from engines.build import BuildOptions, build_engines

    name, parts = "ti2v-5b-tiny", frozenset({"dit"})
    export_checkpoint(flow_of(name).checkpoint, tmp_path / "b", ExportOptions(Precision.FP16, parts=parts))
    other = build_engines(tmp_path / "b", tmp_path / "e", BuildOptions(topology="blocks"))
    bundle = open_bundle(blocks_of(name), "engines")
    weights = tuple(replace(file, path=str(other.path(file))) for file in other.component("dit").weights)
    with (
        ExitStack() as stack,
        pytest.raises(
            UserError, match=r"dit.weights: \S+ of \d+ bytes \| expected \d+ bytes, as the engines of dit take"
        ),
    ):
        backend = open_backend(bundle, stack, BlockOptions())
        backend.new_engine(replace(bundle.component("dit"), weights=weights))


def test_the_bound_of_v_holds_for_any_token():
    rng = np.random.default_rng(0)
    width, blocks = 64, 3
    matrices = rng.standard_normal((blocks, width, width)).astype(np.float32)
    tables, modulation = rng.standard_normal((blocks, 6 * width)), rng.standard_normal((2, 6 * width))
    means = 3 * rng.standard_normal((blocks, width)).astype(np.float32)
    scales = fp8_scales(np.linalg.norm(matrices, axis=2), tables, modulation, means)
    for block in range(blocks):
        shift, scale = np.split((tables[block] + modulation)[:, : 2 * width], 2, axis=1)
        x = rng.standard_normal((500, width)) ** 5  # with outliers
        normed = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        for row in range(2):
            v = (normed * (1 + scale[row]) + shift[row] - means[block]) @ matrices[block].T
            assert (np.abs(v) <= 448 * scales["v_scale"][block]).all()


@pytest.mark.parametrize(
    ("spec", "tokens", "gib"), [(T2V_A14B.dit, 75_600, 3.8), (TI2V_5B.dit, 27_280, 0.86)], ids=["a14b", "5b"]
)
def test_a_budget_is_never_exceeded(spec, tokens, gib):
    small = block_memory(spec, Precision.FP8_ATTN, tokens, BlockChoice(0, 8), 0)
    assert small.x + small.edges + small.scratch <= gib * 2**30
    for budget in np.linspace(2, 80, 40) * 2**30:
        stack = transformer_blocks(spec, Precision.FP8_ATTN, tokens, 320e6)
        choice = stack.choose(budget)
        if choice is None:
            assert stack.smallest_budget() > budget
        else:
            assert block_memory(spec, Precision.FP8_ATTN, tokens, choice, 320e6).total <= budget
