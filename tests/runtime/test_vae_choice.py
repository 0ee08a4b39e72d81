"""The VAE of a pipeline in stages: its videos, the strips that memory needs, and that it never takes more."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

import runtime.vae
from engines.build import BuildOptions, build_engines
from engines.plan import make_plan
from engines.profiles import profiles_for, with_strips
from engines.targets import TARGETS
from export.exporter import export_checkpoint
from export.graphs.builder import FLOAT16
from export.graphs.vae_decoder import decoder_stage
from export.options import ExportOptions
from runtime import engine_tensorrt
from runtime.block_backend import BlockOptions
from runtime.engine_cuda import CudaDevice
from runtime.pipeline import Pipeline
from runtime.vae_choice import PipelineVae
from tests.runtime.fake_gpu import DeviceArray, FakeCupy, Memory, paper_tensorrt
from wan22.bundle import Build, Bundle, Manifest, Source, open_bundle
from wan22.component import Component, File, Stage
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.quantities import parse_bytes
from wan22.shapes import own_profiles
from wan22.specs import T2V_A14B, TI2V_5B
from wan22.stamp import Stamp
from wan22.strips import VAE_STAGES
from wan22.vae_memory import choices, staged_vae

GIB = 2**30
CPU = "CPUExecutionProvider"


def noise(spec, frames=2, rows=2, columns=30):
    shape = (1, spec.vae.latent_channels, frames, rows, columns)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def decode(bundle, latents, strips):
    with Pipeline(bundle, blocks=BlockOptions(vae_strips=strips)) as pipeline:
        return np.concatenate(list(pipeline.decode(latents)), axis=2)


def test_engines_for_the_cpu_decode_in_strips_with_caches_in_place(tiny_engines):
    bundle = open_bundle(tiny_engines, "engines")
    latents = noise(bundle.manifest.spec)
    whole = decode(bundle, latents, None)
    for strips in (1, 2):
        assert np.abs(decode(bundle, latents, strips) - whole).max() <= 1e-5


def test_engines_for_the_cpu_encode_in_strips(flow_of):
    bundle = open_bundle(flow_of("ti2v-5b-tiny").engines, "engines")
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 1, 32, 20 * 16)).astype(np.float32)
    with Pipeline(bundle) as whole, Pipeline(bundle, blocks=BlockOptions(vae_strips=3)) as in_strips:
        expected, found = whole.encode(image), in_strips.encode(image)
    assert np.abs(found - expected).max() <= 1e-5


def use_device_arrays(monkeypatch, cupy):
    """Let the streaming code find ``cupy`` for arrays of the device, which to numpy are its own."""
    there = SimpleNamespace(zeros=cupy.empty, ascontiguousarray=cupy.ascontiguousarray)
    on_device = lambda array: there if isinstance(array, DeviceArray) else np  # noqa: E731
    monkeypatch.setattr(runtime.vae, "array_namespace", on_device)


def test_caches_stay_on_the_device_of_the_cuda_target(tmp_path, tiny_checkpoint, monkeypatch):
    options = ExportOptions(Precision.FP16, {"vae_decoder": Precision.FP16}, parts=frozenset({"vae_decoder"}))
    export_checkpoint(tiny_checkpoint, tmp_path / "onnx", options)
    bundle = build_engines(tmp_path / "onnx", tmp_path / "engines", BuildOptions("cuda"))
    latents, given = noise(bundle.manifest.spec), []
    use_device_arrays(monkeypatch, cupy := FakeCupy())
    with CudaDevice(onnxruntime, cupy, CPU, "cpu") as device:
        engines = lambda component: Recorded(device.engine(bundle.folder, component), given)  # noqa: E731
        with Pipeline(bundle, new_engine=engines, blocks=BlockOptions(vae_strips=2)) as pipeline:
            found = np.concatenate(list(pipeline.decode(latents)), axis=2)
        with Pipeline(bundle, new_engine=engines) as pipeline:
            expected = np.concatenate(list(pipeline.decode(latents)), axis=2)
    assert np.abs(found - expected).max() < 0.02  # float16: kernels round differently for other sizes
    assert type(found) is np.ndarray
    between = {kind for name, kind in given if name in ("pictures", "details")}
    assert between == {DeviceArray}


class Recorded:
    """An engine that notes the types of its inputs."""

    def __init__(self, engine, given):
        self._engine, self._given, self.inputs, self.outputs = engine, given, engine.inputs, engine.outputs

    def __enter__(self):
        self._engine.__enter__()
        return self

    def __exit__(self, *details):
        self._engine.__exit__(*details)

    def __call__(self, **inputs):
        self._given += [(name, type(array)) for name, array in inputs.items()]
        return self._engine(**inputs)


# -- memory


@pytest.fixture
def card(tmp_path, tiny_engines, monkeypatch):
    """``card(spec, video, strips)`` → a VAE in stages on paper at full size, its memory, and the card's."""

    def made(spec, video, strips):
        target, precision = TARGETS["rtx4090"], Precision.FP16
        (profile,) = profiles_for(spec, "{}x{}".format(*video), str(video[2]))
        profiles = (with_strips(profile, spec.vae, strips, strips),)
        build = Build(target.name, target.backend, "11.4.0", target.compute_capability, profiles, {}, 1.0)
        planned, components = staged_vae(spec.vae, "vae_decoder", precision, spec.latent_shape(*video), strips), []
        for name in ("vae_decoder_first", "vae_decoder_next"):
            stages = []
            for stage in VAE_STAGES:
                graph = decoder_stage(spec.vae, stage, name.endswith("first"), FLOAT16)
                edges, path = graph.edges(), f"{graph.graph.name}.plan"
                stamp = Stamp(target.name, precision, own_profiles(profiles, edges[0]))
                plan = {"name": stamp.name, "weights": int(planned.weights / 5), "scratch": int(planned.scratch)}
                (tmp_path / path).write_text(json.dumps(plan))
                stages.append(Stage(stage, File(path, "", 1), *edges, ()))
            graph = stages[-1].graph
            components.append(Component(name, graph, (), (), (), precision, stages=tuple(stages)))
        (tmp_path / "tokenizer").symlink_to(tiny_engines / "tokenizer")
        source = Source("checkpoint", "official", "0")
        manifest = Manifest("engines", spec, precision, tuple(components), (), source, "wan-trt build", build=build)
        memory = Memory(int(target.memory_gib * GIB))
        cupy = FakeCupy(target.compute_capability.replace(".", ""), memory=memory)
        modules = {"cupy": cupy, "tensorrt": paper_tensorrt(memory), "tensorrt_rtx": paper_tensorrt(memory)}
        monkeypatch.setattr(engine_tensorrt, "require_module", lambda module, *_: modules[module])
        use_device_arrays(monkeypatch, cupy)
        return Bundle(tmp_path, manifest), planned, memory

    return made


@pytest.mark.parametrize(
    ("spec", "size", "strips", "gib"),
    [
        (T2V_A14B, (1280, 720), 1, 7),
        (T2V_A14B, (1280, 720), 3, 4),
        (TI2V_5B, (1280, 704), 1, 7),
        (TI2V_5B, (1280, 704), 7, 4),
    ],
    ids=["14B whole", "14B in 3 strips", "5B whole", "5B in 7 strips"],
)
def test_720p_in_16_bits_takes_what_plan_says_and_no_more(card, spec, size, strips, gib):
    video = (*size, 9)
    bundle, planned, memory = card(spec, video, strips)
    with Pipeline(bundle, residency="one-component", blocks=BlockOptions(vae_strips=strips)) as pipeline:
        frames = sum(chunk.shape[2] for chunk in pipeline.decode(noise(spec, 3, *spec.latent_shape(*video)[3:])))
    assert frames == video[2]
    assert 0.9 * planned.total < memory.peak <= planned.total <= gib * GIB
    assert memory.used == 0
    budget = make_plan(spec, TARGETS["rtx4090"], Precision.FP8, (*size, 81), vram=gib * GIB)
    (shown,) = [half for half in budget.staged_vae if half.precision is Precision.FP16]
    assert shown.fitting == replace(planned, strips=strips)


def test_the_fewest_strips_that_fit_are_chosen_and_a_smaller_budget_names_the_least(tiny_engines):
    bundle = open_bundle(tiny_engines, "engines")
    spec, video = bundle.manifest.spec, (640, 64, 9)
    sizes = list(choices(spec.vae, "vae_decoder", Precision.FP32, spec.latent_shape(*video), cache_sets=1))

    def chosen(vram):
        return PipelineVae(bundle, BlockOptions(vram=vram), np.inf, 1).chosen(video)

    assert chosen(GIB) == {}  # whole
    assert chosen(sizes[0].total) == {"vae_decoder": 1}
    several = next(size for size in sizes if size.total < 0.8 * sizes[0].total)
    assert chosen(several.total) == {"vae_decoder": several.strips}
    least = min(size.total for size in sizes)
    with pytest.raises(UserError, match=r"--vram .* for vae_decoder .* at least .* fp16") as refused:
        chosen(0.99 * least)
    named = refused.value.expected.removeprefix("at least ")
    assert list(chosen(parse_bytes(named, "--vram"))) == ["vae_decoder"]


def test_what_the_engines_cannot_take_is_refused_at_once(tiny_engines):
    bundle = open_bundle(tiny_engines, "engines")
    with Pipeline(bundle, blocks=BlockOptions(vae_strips=99)) as pipeline:
        with pytest.raises(UserError, match=r"--vae-strips 99 .* 32 latent columns .* use --vae-strips 32"):
            pipeline.fit((256, 64, 5))
        assert not pipeline._engines
    plain = replace(bundle.manifest, components=tuple(replace(c, stages=()) for c in bundle.manifest.components))
    with pytest.raises(UserError, match=r"--vae-strips for .* VAE in stages .* export and build again"):
        Pipeline(replace(bundle, manifest=plain), blocks=BlockOptions(vae_strips=2))
    build = replace(bundle.manifest.build, options={"vae_strips": "2"})
    two = replace(bundle, manifest=replace(bundle.manifest, build=build))
    with pytest.raises(UserError, match=r"--vae-strips 3 .* 1 to 2, .* build with --vae-strips 3"):
        Pipeline(two, blocks=BlockOptions(vae_strips=3))
