"""The nodes against ComfyUI's contract. ComfyUI is in no package index, so its three modules are stood in for here."""

import importlib.util
import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from engines.build import build_engines
from export.exporter import export_checkpoint
from export.lora.merge import LoraChoice
from export.options import ExportOptions
from runtime.generate import generate
from runtime.request import Request
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS
from wan_trt.diffusers import WanTrtPipeline

ROOT = Path(__file__).parents[2] / "comfyui"
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
DIT = SPECS["t2v-a14b-tiny"].dit
TINY = {"width": 64, "height": 64, "frames": 5, "steps": 3}


class InterruptProcessingException(BaseException):
    """As in comfy.model_management."""


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """The modules of ComfyUI that nodes may use; ``bars`` holds what was shown, ``interrupt`` ends a run."""
    seen = types.SimpleNamespace(bars=[], interrupt=lambda: False, models=tmp_path / "models")
    (seen.models / "wan_trt").mkdir(parents=True)

    class ProgressBar:
        def __init__(self, total, node_id=None):
            self.total, self.current = total, 0

        def update_absolute(self, value, total=None, preview=None):
            self.current = value
            seen.bars.append((value, total or self.total, preview))

        def update(self, value):
            self.update_absolute(self.current + value)

    def throw():
        if seen.interrupt():
            raise InterruptProcessingException

    places = {}
    modules = {
        "comfy": {},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.model_management": {"throw_exception_if_processing_interrupted": throw},
        "folder_paths": {
            "models_dir": str(seen.models),
            "add_model_folder_path": lambda name, path: places.setdefault(name, []).append(path),
            "get_folder_paths": lambda name: places[name],
            "get_temp_directory": lambda: str(tmp_path / "temp"),
            "get_filename_list": lambda name: sorted(path.name for path in (seen.models / name).glob("*")),
            "get_full_path": lambda name, file: str(path) if (path := seen.models / name / file).exists() else None,
        },
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules["comfy"], name.partition(".")[2], module)
    spec = importlib.util.spec_from_file_location("custom_nodes_wan_trt", ROOT / "__init__.py")  # as ComfyUI loads it
    package = importlib.util.module_from_spec(spec)
    sys.modules["custom_nodes_wan_trt"] = package
    spec.loader.exec_module(package)
    seen.nodes = package.NODE_CLASS_MAPPINGS
    seen.titles = package.NODE_DISPLAY_NAME_MAPPINGS
    yield seen
    opened = sys.modules["custom_nodes_wan_trt.nodes"]._open
    if opened.pipeline is not None:
        opened.pipeline.__exit__()
    for name in [name for name in sys.modules if name.startswith("custom_nodes_wan_trt")]:
        del sys.modules[name]


def types_of(node):
    """Every input's type."""
    return {name: given[0] for part in node.INPUT_TYPES().values() for name, given in part.items()}


def run(comfy, workflow, native=()):
    """The outputs of a workflow in ComfyUI's API format, by node; ``native`` stands for nodes of ComfyUI's own."""
    done = {}

    def output(link, wanted):
        number, index = link
        if number not in done:
            entry = workflow[number]
            if entry["class_type"] in dict(native):
                done[number] = dict(native)[entry["class_type"]]
            else:
                node = comfy.nodes[entry["class_type"]]
                kinds = types_of(node)
                values = {}
                for name, value in entry["inputs"].items():
                    linked = isinstance(value, list) and len(value) == 2 and value[0] in workflow
                    values[name] = output(value, kinds[name]) if linked else value
                required = node.INPUT_TYPES()["required"]
                assert set(required) <= set(values), (entry["class_type"], set(required) - set(values))
                done[number] = getattr(node(), node.FUNCTION)(**values)
        if workflow[number]["class_type"] in comfy.nodes and wanted:
            assert comfy.nodes[workflow[number]["class_type"]].RETURN_TYPES[index] == wanted
        return done[number][index]

    for number, entry in workflow.items():
        if entry["class_type"] in comfy.nodes:
            output([number, 0], "")
    return done


def small(path, **changed):
    """An example workflow with a video of the tiny models' size."""
    workflow = json.loads(path.read_text())
    for entry in workflow.values():
        entry["inputs"] |= {name: value for name, value in {**TINY, **changed}.items() if name in entry["inputs"]}
    return workflow


def as_png(pixels):
    encoded = io.BytesIO()
    Image.fromarray(np.rint(pixels.numpy() * 255).astype(np.uint8)).save(encoded, "PNG")
    return encoded.getvalue()


def scales_of(spec):
    return spec.vae.latents_mean, spec.vae.latents_std


def frames_of(path):
    with np.load(path) as arrays:
        return arrays["frames"]


def in_bytes(images):
    """An IMAGE as SaveImage and CreateVideo write it."""
    return np.clip(255.0 * images.numpy(), 0, 255).astype(np.uint8)


def test_every_node_keeps_the_contract(comfy):
    assert set(comfy.nodes) == set(comfy.titles)
    for node in comfy.nodes.values():
        assert callable(getattr(node, node.FUNCTION))
        assert isinstance(node.RETURN_TYPES, tuple)
        assert node.CATEGORY == "wan-trt"
        for part, given in node.INPUT_TYPES().items():
            assert part in ("required", "optional")
            for kind, *options in given.values():
                assert isinstance(kind, str | list)
                assert all(isinstance(option, dict) for option in options)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_links_of_the_examples_fit_and_every_input_exists(comfy, path):
    for entry in json.loads(path.read_text()).values():
        if (node := comfy.nodes.get(entry["class_type"])) is not None:
            assert set(entry["inputs"]) <= set(types_of(node))


def test_text_to_video_makes_the_frames_that_generate_makes(comfy, tiny_engines, tmp_path):
    (comfy.models / "wan_trt" / "engines").symlink_to(tiny_engines)
    done = run(comfy, small(WORKFLOWS[1]))
    request = Request("A red panda rides a bicycle through the rain", "", (64, 64), 5, seed=7, steps=3, fit="crop")
    generate(tiny_engines, request, tmp_path / "made.npz")
    assert np.array_equal(in_bytes(done["4"][0]), frames_of(tmp_path / "made.npz"))
    steps = [(value, total) for value, total, preview in comfy.bars if preview is not None]
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_image_to_video_makes_the_frames_that_generate_makes(comfy, flow_of, tmp_path):
    engines = flow_of("i2v-a14b-tiny").engines
    (comfy.models / "wan_trt" / "engines").symlink_to(engines)
    pixels = np.random.default_rng(2).integers(0, 256, (80, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    image = torch.from_numpy(pixels.astype(np.float32)[None] / 255)
    done = run(comfy, small(WORKFLOWS[0]), native=[("LoadImage", (image, None))])
    request = Request("The panda waves", "", (64, 64), 5, seed=7, steps=3, fit="crop", image=tmp_path / "image.png")
    generate(engines, request, tmp_path / "made.npz")
    assert np.array_equal(in_bytes(done["5"][0]), frames_of(tmp_path / "made.npz"))


def sampler_inputs(comfy, engines, latent, **changed):
    given = json.loads(WORKFLOWS[1].read_text())["3"]["inputs"]
    return {**given, "engines": engines, "latent": latent, "steps": 4, "solver": "euler", **changed}


def test_two_samplers_of_one_run_each_make_what_one_makes(comfy, tiny_engines):
    """KSampler (Advanced)'s way: the first leaves noise in the latents, the second adds none."""
    (comfy.models / "wan_trt" / "engines").symlink_to(tiny_engines)
    (engines,) = comfy.nodes["WanTrtEngines"]().open("engines")
    (empty,) = comfy.nodes["WanTrtEmptyLatent"]().make(engines, 64, 64, 5)
    sampler = comfy.nodes["WanTrtSampler"]()
    (whole,) = sampler.sample(**sampler_inputs(comfy, engines, empty))
    (half,) = sampler.sample(**sampler_inputs(comfy, engines, empty, end_at_step=2))
    (rest,) = sampler.sample(**sampler_inputs(comfy, engines, half, start_at_step=2, add_noise=False))
    assert (rest["samples"] - whole["samples"]).abs().max() < 1e-4 * whole["samples"].abs().max()
    assert (half["samples"] - whole["samples"]).abs().max() > 0.01
    (partly,) = sampler.sample(**sampler_inputs(comfy, engines, whole, start_at_step=2))
    assert (partly["samples"] - whole["samples"]).abs().max() > 0.01


@pytest.mark.slow
def test_loras_of_nodes_and_of_the_pipeline_give_what_an_export_with_them_gives(
    comfy, tiny_engines, tiny_checkpoint, tmp_path
):
    delta = np.full((DIT.ffn_width, DIT.width), 0.2, np.float32)
    delta[::2] *= -1
    (comfy.models / "loras").mkdir()
    for name, sign in (("ink", 1), ("oil", -1)):
        keys = {f"diffusion_model.blocks.0.ffn.{0 if sign > 0 else 2}.diff": sign * (delta if sign > 0 else delta.T)}
        save_file(
            {key: np.ascontiguousarray(value) for key, value in keys.items()},
            comfy.models / f"loras/{name}.safetensors",
        )
    ink, oil = (comfy.models / f"loras/{name}.safetensors" for name in ("ink", "oil"))
    choices = (LoraChoice(ink, 0.5, "high"), LoraChoice(oil, 0.8, "low"))
    export_checkpoint(tiny_checkpoint, tmp_path / "onnx", ExportOptions(Precision.FP32, loras=choices))
    build_engines(tmp_path / "onnx", tmp_path / "with")
    request = Request("A fox", "", (64, 64), 5, seed=7, steps=4, solver="euler")
    frames = {}
    for name, engines in (("with", tmp_path / "with"), ("without", tiny_engines)):
        generate(engines, request, tmp_path / f"{name}.npz")
        frames[name] = frames_of(tmp_path / f"{name}.npz")
    assert not np.array_equal(frames["with"], frames["without"])

    (comfy.models / "wan_trt" / "engines").symlink_to(tiny_engines)
    (engines,) = comfy.nodes["WanTrtEngines"]().open("engines")
    (empty,) = comfy.nodes["WanTrtEmptyLatent"]().make(engines, 64, 64, 5)
    node = comfy.nodes["WanTrtLora"]
    assert node.INPUT_TYPES()["required"]["file"][0] == ["ink.safetensors", "oil.safetensors"]
    (lora,) = node().choose("ink.safetensors", 0.5, "high noise")
    (lora,) = node().choose("oil.safetensors", 0.8, "low noise", lora)
    for chosen, expected in ((lora, "with"), (None, "without"), (lora, "with")):
        given = sampler_inputs(comfy, engines, empty, prompt="A fox", lora=chosen)
        (made,) = comfy.nodes["WanTrtSampler"]().sample(**given)
        assert np.array_equal(in_bytes(comfy.nodes["WanTrtDecode"]().decode(engines, made)[0]), frames[expected])

    with WanTrtPipeline.from_pretrained(tiny_engines) as pipe:
        pipe.load_lora_weights(ink, adapter_name="ink")
        pipe.load_lora_weights(oil.parent, adapter_name="oil", weight_name=oil.name, load_into_transformer_2=True)
        pipe.set_adapters(["ink", "oil"], [0.5, 0.8])
        settings = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4, "generator": 7}
        with_loras = pipe("A fox", **settings).frames
        pipe.unload_lora_weights()
        without = pipe("A fox", **settings).frames
        with pytest.raises(UserError, match="load it first"):
            pipe.set_adapters("ink")
        with pytest.raises(UserError, match="nothing is downloaded"):
            pipe.load_lora_weights("somebody/a-lora")
    with WanTrtPipeline.from_pretrained(tmp_path / "with") as pipe:
        assert np.array_equal(pipe("A fox", **settings).frames, with_loras)
    assert not np.array_equal(without, with_loras)


def test_a_batch_is_a_video_each_of_one_stream_of_noise(comfy, tiny_engines):
    (comfy.models / "wan_trt" / "engines").symlink_to(tiny_engines)
    (engines,) = comfy.nodes["WanTrtEngines"]().open("engines")
    (empty,) = comfy.nodes["WanTrtEmptyLatent"]().make(engines, 64, 64, 1, 2)
    (made,) = comfy.nodes["WanTrtSampler"]().sample(**sampler_inputs(comfy, engines, empty))
    assert made["samples"].shape[0] == 2
    assert not torch.equal(made["samples"][0], made["samples"][1])
    (images,) = comfy.nodes["WanTrtDecode"]().decode(engines, made)
    assert images.shape == (2, 64, 64, 3)


def test_images_are_encoded_as_for_a_condition_and_decode_to_their_shape(comfy, flow_of):
    (comfy.models / "wan_trt" / "engines").symlink_to(flow_of("i2v-a14b-tiny").engines)
    (engines,) = comfy.nodes["WanTrtEngines"]().open("engines")
    images = torch.rand((5, 64, 64, 3), generator=torch.Generator().manual_seed(1))
    (latent,) = comfy.nodes["WanTrtEncode"]().encode(engines, images)
    (empty,) = comfy.nodes["WanTrtEmptyLatent"]().make(engines, 64, 64, 5)
    assert latent["samples"].shape == empty["samples"].shape
    expected = engines.image_condition(engines.complete(Request("-", size=(64, 64), frames=1, image=as_png(images[0]))))
    (encoded,) = comfy.nodes["WanTrtEncode"]().encode(engines, images[:1])
    given = torch.from_numpy(expected["condition"][:, 4:])
    mean, std = (torch.tensor(values)[:, None, None, None] for values in scales_of(engines.spec))
    assert ((encoded["samples"] - mean) / std - given).abs().max() < 0.05 * given.abs().max()  # of 8 bits
    (again,) = comfy.nodes["WanTrtDecode"]().decode(engines, latent)
    assert again.shape == images.shape


def test_an_interruption_ends_the_run_within_a_step(comfy, tiny_engines):
    (comfy.models / "wan_trt" / "engines").symlink_to(tiny_engines)
    comfy.interrupt = lambda: len(comfy.bars) == 2
    with pytest.raises(InterruptProcessingException):
        run(comfy, small(WORKFLOWS[1], steps=20))
    assert len(comfy.bars) == 2


def test_what_does_not_fit_is_told_in_one_line(comfy, tiny_engines, flow_of):
    models = comfy.models / "wan_trt"
    with pytest.raises(UserError, match="copy or link it there"):
        comfy.nodes["WanTrtEngines"]().open("engines")
    (models / "engines").symlink_to(tiny_engines)
    (models / "small").symlink_to(flow_of("ti2v-5b-tiny").engines)
    assert comfy.nodes["WanTrtEngines"].INPUT_TYPES()["required"]["bundle"][0] == ["engines", "small"]
    (engines,) = comfy.nodes["WanTrtEngines"]().open("engines")
    for latent in (torch.zeros(1, 48, 2, 4, 4), torch.zeros(1, 16, 8, 8)):
        with pytest.raises(UserError, match="use the latent node of this model"):
            comfy.nodes["WanTrtDecode"]().decode(engines, {"samples": latent})
    (empty,) = comfy.nodes["WanTrtEmptyLatent"]().make(engines, 64, 64, 1)
    with pytest.raises(UserError, match="a first step before the last one"):
        comfy.nodes["WanTrtSampler"]().sample(**sampler_inputs(comfy, engines, empty, start_at_step=4))
    with pytest.raises(UserError, match="for the encoder of t2v-a14b-tiny"):
        comfy.nodes["WanTrtEncode"]().encode(engines, torch.zeros(1, 64, 64, 3))
