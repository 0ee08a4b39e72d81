"""Several devices of the CPU compute what one computes: bit for bit where the arithmetic is the same."""

import os
import shutil
import threading
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest

from runtime.backend import open_backend
from runtime.block_backend import BlockOptions, check_options
from runtime.group import Link
from runtime.pipeline import Pipeline
from runtime.request import Request
from tests.export.graphs.test_dit import inputs_for, relative_l2
from validate.sample_image import picture_for
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.parallel import exchanged_bytes
from wan22.specs import SPECS

REQUEST = Request("a cat", size=(64, 64), frames=5, steps=4)
HEADS = 4
TOKENS = 3 * 5 * 9  # of ``given_to``: no number of devices divides them


def opened(folder, parallel=None, told=None, **options):
    gpus = None if parallel is None else options.pop("gpus", None)
    blocks = BlockOptions(gpus=gpus, parallel=parallel, **options)
    return Pipeline.open(folder, blocks=blocks, tell=(told if told is not None else []).append)


def latents_of(pipeline, request=REQUEST):
    *_, last = pipeline.denoise(pipeline.complete(request))
    return last.latents


def given_to(spec):
    given = inputs_for(spec, 3, 10, 18, [0.0, 812.0] if spec.time_rows == 2 else [937.5])
    given["text"].flags.writeable = False
    return given


@pytest.fixture(scope="session")
def alone(tiny_engines):
    """The latents of one device."""
    with opened(tiny_engines) as pipeline:
        return latents_of(pipeline)


@pytest.mark.parametrize("parallel", ["cfg2", "experts", "experts,cfg2"])
def test_guidance_and_experts_on_several_devices_are_bit_equal(tiny_engines, alone, parallel):
    with opened(tiny_engines, parallel) as pipeline:
        assert pipeline.backend.group is not None
        assert np.array_equal(latents_of(pipeline), alone)


def test_both_branches_are_computed_at_once_and_one_if_guidance_is_1(tiny_engines, monkeypatch):
    told, ran = [], []
    with opened(tiny_engines, "cfg2", told) as pipeline:
        run = pipeline.backend.group.run
        monkeypatch.setattr(pipeline.backend.group, "run", lambda work: (ran.append(len(work)), run(work))[1])
        latents_of(pipeline)
        assert ran.count(2) >= REQUEST.steps
        unguided = replace(REQUEST, guidance_scale=1.0)
        found = latents_of(pipeline, unguided)
    assert any("guidance is 1" in line for line in told)
    with opened(tiny_engines) as pipeline:
        assert np.array_equal(latents_of(pipeline, unguided), found)


def velocities(folder, name, parallel=None, slices=None, **options):
    """The velocities of every expert, and what its devices sent."""
    with opened(folder, parallel, **options) as pipeline:
        found, given = {}, given_to(pipeline.spec.dit)
        for expert in pipeline.spec.experts:
            engine = pipeline.engine(expert)
            if slices:
                for member in getattr(engine, "_engines", {0: engine}).values():
                    choose = member._shared.choose
                    member._shared.choose = lambda tokens, c=choose: replace(c(tokens), slices=slices)
            engine(**given)  # computes the text's keys and values
            before = [link.sent_bytes for link in pipeline.backend.links]
            found[expert] = engine(**given)
            sent = [link.sent_bytes - was for link, was in zip(pipeline.backend.links, before, strict=True)]
        return found, sent


@pytest.mark.parametrize(
    ("parallel", "slices", "weights_in"),
    [("ulysses2", None, "auto"), ("ulysses4", None, "auto"), ("ulysses4", 4, "disk")],
)
@pytest.mark.parametrize("name", ["i2v-a14b-tiny", "ti2v-5b-tiny"])
def test_devices_that_divide_tokens_compute_the_same_velocity(
    divisible, name, parallel, slices, weights_in, expected_of
):
    folder = divisible(name, HEADS)
    found, sent = velocities(folder, name, parallel, slices, weights_in=weights_in)
    for expert, expected in expected_of(folder, name).items():
        assert relative_l2(found[expert], expected) <= 1e-6
    spec, count = open_bundle(folder, "engines").manifest.spec, int(parallel[-1])
    of_blocks = exchanged_bytes(spec.dit, TOKENS, count, (4, 4, 4, 4))
    gathered = [4 * (count - 1) * 4 * spec.dit.out_channels * rows for rows in rows_of(count)]
    assert sent == [spec.dit.layers * a + b for a, b in zip(of_blocks, gathered, strict=True)]


def rows_of(count):
    return [TOKENS // count + (member < TOKENS % count) for member in range(count)]


@pytest.fixture(scope="session")
def expected_of():
    known = {}

    def found(folder, name):
        if folder not in known:
            known[folder], _ = velocities(folder, name)
        return known[folder]

    return found


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "count"), [(24, 3), (24, 6), (24, 8), (40, 5), (40, 8)])
def test_any_number_of_devices_that_divides_the_heads(divisible, expected_of, heads, count):
    folder = divisible("t2v-a14b-tiny", heads)
    found, _ = velocities(folder, "t2v-a14b-tiny", f"ulysses{count}")
    for expert, expected in expected_of(folder, "t2v-a14b-tiny").items():
        assert relative_l2(found[expert], expected) <= 1e-6


def test_what_a_device_sends_is_what_block_engines_need():
    for name, video, count, megabytes in (("t2v-a14b", 75_600, 2, 774), ("t2v-a14b", 75_600, 8, 339)):
        assert max(exchanged_bytes(SPECS[name].dit, video, count, (2, 2, 2, 2))) / 1e6 == pytest.approx(
            megabytes, abs=1
        )
    assert max(exchanged_bytes(SPECS["t2v-a14b"].dit, 75_600, 4, (1, 1, 1, 2))) / 1e6 == pytest.approx(363, abs=1)
    assert max(exchanged_bytes(SPECS["ti2v-5b"].dit, 27_280, 2, (2, 2, 2, 2))) / 1e6 == pytest.approx(168, abs=1)


def test_guidance_and_tokens_divide_together(divisible):
    folder = divisible("i2v-a14b-tiny", HEADS)
    request, found = replace(REQUEST, image=picture_for((64, 64))), []
    for parallel in (None, "cfg2,ulysses2"):
        with opened(folder, parallel) as pipeline:
            found.append(latents_of(pipeline, request))
    assert relative_l2(*found) <= 1e-5


def test_every_device_takes_a_strip_of_the_vae(flow_of):
    engines, decoded, encoded = flow_of("ti2v-5b-tiny").engines, [], []
    rng = np.random.default_rng(1)
    video = rng.uniform(-1, 1, (1, 3, 1, 96, 192)).astype(np.float32)
    for parallel in (None, "vae3"):
        with opened(engines, parallel) as pipeline:
            z = np.random.default_rng(2).standard_normal(pipeline.spec.latent_shape(192, 96, 5), np.float32)
            decoded.append(np.concatenate(list(pipeline.decode(z)), axis=2))
            encoded.append(pipeline.encode(video))
    assert np.abs(decoded[0] - decoded[1]).max() <= 1e-5
    assert np.abs(encoded[0] - encoded[1]).max() <= 1e-5


def test_splits_that_cannot_be_are_one_line(divisible, tiny_engines):
    def refusal(folder, **options):
        with pytest.raises(UserError) as error:
            check_options(open_bundle(folder, "engines"), BlockOptions(**options))
        return str(error.value)

    blocks = divisible("i2v-a14b-tiny", HEADS)
    assert "expected a number that divides them: 2, 4 | use one" in refusal(blocks, parallel="ulysses3")
    assert "expected 4 devices | name 4 of them" in refusal(blocks, gpus="0,1,2", parallel="cfg2,ulysses2")
    assert "each number once" in refusal(blocks, gpus="0,0")
    assert "numbers with commas" in refusal(blocks, gpus="all")
    assert "write it as cfg2,ulysses4" in refusal(blocks, parallel="tensor2")
    assert "run wan-trt build --parallel ulysses2" in refusal(tiny_engines, parallel="ulysses2")
    assert "expected one of 1, 2 " in refusal(tiny_engines, gpus="0,1,2")
    assert "name them with --gpus 0,1" in refusal(tiny_engines, parallel="auto")
    devices = check_options(open_bundle(blocks, "engines"), BlockOptions(gpus="0,1,2,3"))
    assert str(devices.split) == "cfg2,ulysses2,vae4"


def test_stages_that_an_older_version_made_for_several_devices_are_named(divisible):
    bundle, made = open_bundle(divisible("i2v-a14b-tiny", HEADS), "engines"), []
    for component in bundle.manifest.components:
        older = [replace(s, name=s.name.replace("join", "rest")) for s in component.stages]
        made.append(replace(component, stages=tuple(older)))
    older = replace(
        bundle, manifest=replace(bundle.manifest, components=tuple(made), command="wan-trt build onnx engines")
    )
    expected = (
        "an older version's | expected those of this version | export and build again: wan-trt build onnx engines"
    )
    with pytest.raises(UserError) as error:
        check_options(older, BlockOptions(parallel="ulysses2"))
    assert expected in str(error.value)
    assert not check_options(older, BlockOptions()).together
    assert str(check_options(older, BlockOptions(gpus="0,1", parallel="cfg2")).split) == "cfg2"


def test_weights_that_change_while_devices_open_them_are_one_line(tiny_engines, tmp_path, monkeypatch):
    folder = tmp_path / "engines"
    shutil.copytree(tiny_engines, folder)
    path = folder / open_bundle(folder, "engines").component("high_noise").weights[0].path
    with opened(folder, "cfg2") as pipeline:
        engine = pipeline.backend.new_engine(pipeline.bundle.component("high_noise"))
        enter, first = engine._enter, threading.Event()

        def one_after_the_other(member):
            if member == 1:
                assert first.wait(60)
                os.utime(path, ns=(1, 1))
            found = enter(member)
            first.set()
            return found

        monkeypatch.setattr(engine, "_enter", one_after_the_other)
        with pytest.raises(UserError, match=r"of device 1 is not that of device 0 \| expected the same plans and"):
            engine.__enter__()


def test_a_weights_file_that_is_cut_short_meanwhile_is_one_line_and_the_group_goes_on(divisible, tmp_path):
    folder = tmp_path / "engines"
    shutil.copytree(divisible("ti2v-5b-tiny", HEADS), folder)
    path = folder / open_bundle(folder, "engines").component("dit").weights[1].path
    whole = path.read_bytes()
    with opened(folder, "ulysses2") as pipeline:
        engine, given = pipeline.engine("dit"), given_to(pipeline.spec.dit)
        pipeline.backend.group._deadline_s = pipeline.backend.links[0]._meeting._deadline_s = 60
        expected = engine(**given)
        os.truncate(path, len(whole) // 2)  # one device reads the text's weights of the blocks that are left
        other = given | {"text": given["text"].copy()}
        with pytest.raises(
            UserError, match=r"dit.weights ends at \d+ bytes \| expected \d+ \| run wan-trt build again"
        ):
            engine(**other)
        path.write_bytes(whole)
        assert np.array_equal(engine(**other), expected)


def test_a_device_that_fails_ends_the_job_and_closes_the_group(tiny_engines):
    with opened(tiny_engines, "cfg2") as pipeline:
        engine = pipeline.engine("high_noise")

        def broken(**_):
            raise RuntimeError("the device is gone")

        engine._engines[1] = broken
        with pytest.raises(RuntimeError, match="the device is gone") as error:
            latents_of(pipeline)
        assert "is closed" in error.value.__notes__[0]
        with pytest.raises(UserError, match=r"device 0, device 1 is closed: device 1 failed"):
            latents_of(pipeline)


def test_devices_that_remember_different_prompts_agree_again(divisible, monkeypatch):
    """One has the text's keys and values, the other was stopped before it kept them."""
    folder = divisible("ti2v-5b-tiny", HEADS)
    expected, _ = velocities(folder, "ti2v-5b-tiny")
    with opened(folder, "ulysses2") as pipeline:
        engine, given = pipeline.engine("dit"), given_to(pipeline.spec.dit)
        pipeline.backend.group._deadline_s = pipeline.backend.links[0]._meeting._deadline_s = 60
        last, broadcast = pipeline.backend.links[1], Link.broadcast
        calls = []

        def stopped_at_the_end(self, array, root):
            broadcast(self, array, root)
            calls.append(self is last)
            if self is last and calls.count(True) == 2 * pipeline.spec.dit.layers:
                raise UserError("a video", "a smaller one", "use it")

        monkeypatch.setattr(Link, "broadcast", stopped_at_the_end)
        with pytest.raises(UserError, match="a smaller one"):
            engine(**given)
        assert [len(member._texts) for member in engine._engines.values()] == [1, 0]
        assert relative_l2(engine(**given), expected["dit"]) <= 1e-6


def test_grouped_stages_are_opened_only_where_they_are_used(divisible):
    bundle = open_bundle(divisible("i2v-a14b-tiny", HEADS), "engines")
    with ExitStack() as stack:
        backend = open_backend(bundle.in_groups(1), stack, BlockOptions())
        with backend.new_engine(bundle.in_groups(1).component("high_noise")) as engine:
            assert set(engine._shared.device._sessions) == {
                "time", "text", "text_kv", "patches", "qkv", "attend", "rest", "velocity",
            }  # fmt: skip
