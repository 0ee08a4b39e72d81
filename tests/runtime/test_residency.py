"""What stays on the card: what ``auto`` chooses, and that a run never takes more than was planned."""

import json
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from engines.plan import make_plan
from engines.profiles import profiles_for
from engines.targets import TARGETS
from export.graphs.builder import BFLOAT16, FLOAT
from export.graphs.dit import dit_graph
from export.graphs.text_encoder import text_encoder_graph
from export.graphs.vae_decoder import vae_decoder
from export.graphs.vae_encoder import vae_encoder
from runtime import engine_tensorrt
from runtime.generate import generate
from runtime.pipeline import Pipeline
from runtime.request import Request
from tests.runtime.fake_gpu import FakeCupy, Memory, paper_tensorrt
from wan22.bundle import Build, Bundle, Manifest, Source
from wan22.component import Component, File
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.residency import engines_memory, usual_precisions
from wan22.shapes import own_profiles
from wan22.specs import SPECS, T2V_A14B, TI2V_5B
from wan22.stamp import Stamp

README = {"t2v-a14b": ("rtx5090", (832, 480, 81)), "ti2v-5b": ("rtx4090", (1280, 704, 121))}
FP8 = Precision.FP8


def graph_of(spec, name):
    if name == "text_encoder":
        return text_encoder_graph(spec.text_encoder, BFLOAT16)
    if name.startswith("vae_decoder"):
        return vae_decoder(spec.vae, name.endswith("first"), FLOAT)
    if name.startswith("vae_encoder"):
        return vae_encoder(spec.vae, name.endswith("first"), FLOAT)
    return dit_graph(spec.dit, BFLOAT16)


@pytest.fixture
def card(tmp_path, tiny_engines, monkeypatch):
    """``card(spec, target, video)`` → an engine bundle on paper at full size, and the card that it runs on."""

    def made(spec, target, video):
        profiles = profiles_for(spec, "{}x{}".format(*video), str(video[2]))
        build = Build(target.name, target.backend, "11.4.0", target.compute_capability, profiles, {}, 1.0)
        precisions, components = usual_precisions(spec, FP8), []
        for name, memory in engines_memory(spec, precisions, video).items():
            inputs, outputs = graph_of(spec, name).edges()
            stamp = Stamp(target.name, precisions[name], own_profiles(profiles, inputs))
            plan = {"name": stamp.name, "weights": int(memory.weights), "scratch": int(memory.scratch)}
            (tmp_path / f"{name}.plan").write_text(json.dumps(plan))
            file = File(f"{name}.plan", "", 1)
            components.append(Component(name, file, (), inputs, outputs, precisions[name]))
        source = Source("checkpoint", "official", "0")
        (tmp_path / "tokenizer").symlink_to(tiny_engines / "tokenizer")
        manifest = Manifest("engines", spec, FP8, tuple(components), (), source, "wan-trt build", build=build)
        memory = Memory(int(target.memory_gib * 2**30))
        cupy = FakeCupy(target.compute_capability.replace(".", ""), memory=memory)
        modules = {"cupy": cupy, "tensorrt": paper_tensorrt(memory), "tensorrt_rtx": paper_tensorrt(memory)}
        monkeypatch.setattr(engine_tensorrt, "require_module", lambda module, *_: modules[module])
        return Bundle(tmp_path, manifest), memory

    return made


def ran(pipeline, **changes):
    """A whole run of two steps, both experts where there are two."""
    picture = BytesIO()
    Image.new("RGB", (1280, 704)).save(picture, "PNG")
    image = picture.getvalue() if "vae_encoder_first" in pipeline.spec.components else None
    request = pipeline.complete(Request("a red panda", steps=2, shift=1.0, image=image, fit="crop", **changes))
    *_, last = pipeline.denoise(request)
    return sum(chunk.shape[2] for chunk in pipeline.decode(last.latents))


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("spec", [T2V_A14B, TI2V_5B], ids=lambda spec: spec.name)
def test_the_readmes_cards_run_what_plan_says_they_can(card, spec, once):
    target, video = README[spec.name]
    plan = make_plan(spec, TARGETS[target], FP8, video)
    assert plan.residency == "one-component"
    bundle, memory = card(spec, TARGETS[target], video)
    said = []
    with Pipeline(bundle, once=once, tell=said.append) as pipeline:
        assert ran(pipeline) == video[2]
        if not once:
            ran(pipeline)
        assert pipeline.residency == plan.residency
        weights = max(each.weights for each in plan.memory)
        assert weights < memory.peak <= plan.needed["one-component"] <= plan.usable_vram_bytes
    assert memory.used == 0
    (line,) = said
    assert line.startswith("residency one-component: needs ")


@pytest.mark.parametrize(
    ("spec", "target", "residency"),
    [(T2V_A14B, "rtx-pro-6000-blackwell", "all"), (T2V_A14B, "l40s", "one-expert"), (TI2V_5B, "l40s", "all")],
    ids=["14B on 96 GB", "14B on 48 GB", "5B on 48 GB"],
)
def test_larger_cards_keep_more_and_never_exceed_the_plan(card, spec, target, residency):
    video = README[spec.name][1]
    plan = make_plan(spec, TARGETS[target], FP8, video)
    assert plan.residency == residency
    bundle, memory = card(spec, TARGETS[target], video)
    with Pipeline(bundle) as pipeline:
        for _ in range(2):
            ran(pipeline)
        assert pipeline.residency == residency
        assert memory.peak <= plan.needed[residency] <= plan.usable_vram_bytes
        experts = set(spec.experts) & set(pipeline._engines)
        assert len(experts) == (1 if residency == "one-expert" else len(spec.experts))
        assert "text_encoder" in pipeline._engines


def test_everything_resident_does_not_fit_the_readmes_card(card):
    bundle, _ = card(T2V_A14B, TARGETS["rtx5090"], (832, 480, 81))
    with (
        Pipeline(bundle, residency="all") as pipeline,
        pytest.raises(UserError, match=r"no room for .* \| use --residency one-component"),
    ):
        ran(pipeline)


def test_memory_that_others_hold_counts(card):
    bundle, memory = card(TI2V_5B, TARGETS["l40s"], (1280, 704, 121))
    other = memory.take(np.empty(0), 20 * 2**30)
    with Pipeline(bundle) as pipeline:
        ran(pipeline)
        assert pipeline.residency == "one-component"
    del other


def test_what_does_not_fit_at_all_is_told_before_any_work_with_what_would(card):
    bundle, memory = card(TI2V_5B, replace(TARGETS["rtx4090"], memory_gib=16), (1280, 704, 121))
    with Pipeline(bundle) as pipeline, pytest.raises(UserError) as error:
        ran(pipeline)
    assert "vae_decoder_next alone takes 20.79 GiB, 12.02 GiB of it caches and frames" in str(error.value)
    assert "with --frames 121 fits" in str(error.value)
    assert memory.peak == 0


# -- on the CPU


def test_a_single_run_keeps_text_encoder_and_vae_no_longer_than_they_work(tiny_engines, tmp_path, monkeypatch):
    seen, engine = set(), Pipeline.engine

    def watched(pipeline, name):
        found = engine(pipeline, name)
        seen.add(frozenset(pipeline._engines))
        return found

    monkeypatch.setattr(Pipeline, "engine", watched)
    generate(tiny_engines, Request("x", size=(64, 48), frames=5, steps=3), tmp_path / "o.mp4", residency="all")
    experts, decoders = {"high_noise", "low_noise"}, {"vae_decoder_first", "vae_decoder_next"}
    assert {frozenset({"text_encoder"}), frozenset(experts), frozenset(decoders)} <= seen
    assert all(names == {"text_encoder"} or names <= experts or names <= decoders for names in seen)


def test_one_component_means_one(tiny_engines):
    with Pipeline.open(tiny_engines, residency="one-component") as pipeline:
        request = pipeline.complete(Request("x", size=(64, 48), frames=9, steps=3))
        latents = None
        for step in pipeline.denoise(request):
            assert len(pipeline._engines) == 1
            latents = step.latents
        for _ in pipeline.decode(latents):
            assert len(pipeline._engines) == 1


def test_a_video_beyond_the_memory_of_the_host_is_refused_before_any_work(tiny_engines):
    with Pipeline.open(tiny_engines) as pipeline:
        complete = pipeline.complete(Request("x", size=(16384, 16384), frames=401, steps=1))
        with pytest.raises(UserError, match=r"alone takes .* GiB .*x.* with --frames \d+ fits"):
            next(iter(pipeline.denoise(complete)))
        assert not pipeline._engines


def test_the_largest_video_that_fits_is_named_and_does_fit():
    from wan22.residency import largest_fitting, needed_bytes

    spec, precisions = SPECS["t2v-a14b"], usual_precisions(T2V_A14B, FP8)
    asked, room = (1280, 720, 81), 20 * 2**30
    found = largest_fitting(spec, precisions, asked, room)
    assert found is not None
    assert needed_bytes(spec, engines_memory(spec, precisions, found))["one-component"] <= room
    larger = (found[0], found[1], found[2] + 4)
    too_long = needed_bytes(spec, engines_memory(spec, precisions, larger))["one-component"] > room
    assert found[2] == 81 or too_long
    assert largest_fitting(spec, precisions, asked, 2**20) is None
