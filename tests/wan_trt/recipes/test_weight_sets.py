"""Weight sets: requests choose LoRAs by name and get exactly what a bundle with these LoRAs gives."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from engines.build import BuildOptions, build_engines
from export.exporter import export_checkpoint
from export.lora.merge import LoraChoice
from export.options import ExportOptions
from runtime.pipeline import Pipeline
from runtime.recipe import recipe_of
from runtime.request import Request
from runtime.weight_sets import WeightSets
from triton_repo.loading import load
from triton_repo.settings import Limits, settings_of
from wan22.bundle import MergedLora, open_bundle
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS
from wan_trt.recipes.apply_lora import apply_lora
from wan_trt.recipes.weight_sets import make_weight_sets, parse_named

DIT = SPECS["t2v-a14b-tiny"].dit
REQUEST = Request("a fox", size=(64, 48), frames=1, steps=3)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for name, value in (("ink", 0.1), ("oil", -0.2)):
        delta = np.full((DIT.ffn_width, DIT.width), value, np.float32)
        delta[::2] *= -1
        save_file({"diffusion_model.blocks.0.ffn.0.diff": delta}, folder / f"{name}.safetensors")
    return {
        "ink": (LoraChoice(folder / "ink.safetensors"),),
        "oil": (LoraChoice(folder / "oil.safetensors", 0.5, "low"),),
    }


def latents(pipeline, lora=None):
    *_, last = pipeline.denoise(pipeline.complete(Request(**{**vars(REQUEST), "lora": lora})))
    return last.latents


@pytest.fixture(scope="module")
def sets(tiny_engines, loras, tmp_path_factory):
    return make_weight_sets(tiny_engines, tmp_path_factory.mktemp("sets"), loras)


@pytest.fixture
def engines_of(tiny_engines, blocks_of):
    return {"whole": tiny_engines, "blocks": blocks_of("t2v-a14b-tiny")}


@pytest.mark.slow
@pytest.mark.parametrize(("residency", "topology"), [("all", "whole"), ("one-component", "blocks")])
def test_loras_by_turns_give_what_their_bundles_give(
    engines_of, tiny_checkpoint, loras, sets, tmp_path, residency, topology
):
    engines = engines_of[topology]
    if topology == "blocks":
        sets = make_weight_sets(engines, tmp_path / "sets", loras)
    expected = {None: engines}
    for name, choices in loras.items():
        export_checkpoint(tiny_checkpoint, tmp_path / f"{name}-onnx", ExportOptions(Precision.FP32, loras=choices))
        options = BuildOptions(topology=topology)
        expected[name] = build_engines(tmp_path / f"{name}-onnx", tmp_path / name, options).folder
    alone = {}
    for name, folder in expected.items():
        with Pipeline.open(folder) as pipeline:
            alone[name] = latents(pipeline)
    assert len({found.tobytes() for found in alone.values()}) == 3
    settings = settings_of(open_bundle(engines, "engines"), Limits(10**6, 81), residency=residency, loras=sets)
    with load(settings) as served:
        for name in ("ink", "oil", None, "oil", "ink", "ink", None):
            assert (latents(served, name) == alone[name]).all(), name
        assert served.lora_swaps == 6


def test_a_set_is_known_by_its_manifest(tiny_engines, loras, sets):
    bundles = {name: open_bundle(folder, "engines") for name, folder in sets.items()}
    with Pipeline.open(tiny_engines) as pipeline:
        pipeline.weight_sets = WeightSets(pipeline.bundle, bundles)
        complete = pipeline.complete(Request(**{**vars(REQUEST), "lora": "oil"}))
        recipe = recipe_of(complete, pipeline.weight_sets.manifest("oil"), 16, 8)
        assert (recipe.lora, recipe.bundle) == ("oil", bundles["oil"].manifest.own_sha256)
        assert [(lora.strength, lora.experts) for lora in bundles["oil"].manifest.loras] == [(0.5, ("low_noise",))]
        assert {component.name for component in bundles["oil"].manifest.components} == {"high_noise", "low_noise"}
        with pytest.raises(UserError, match=r"lora 'acryl' \| expected one of ink, oil"):
            pipeline.complete(Request("x", lora="acryl"))
    with Pipeline.open(tiny_engines) as plain, pytest.raises(UserError, match="none: this server has no LoRAs"):
        plain.complete(Request("x", lora="oil"))


def test_a_set_that_was_exchanged_is_not_served(tiny_engines, sets):
    settings = settings_of(open_bundle(tiny_engines, "engines"), Limits(10**6, 81), loras=sets)
    manifest = sets["ink"] / "bundle.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content.replace(b"0.5", b"0.7") + b" ")
    try:
        with pytest.raises(UserError, match=r"bundle\.json: sha256"):
            load(settings)
    finally:
        manifest.write_bytes(content)


def test_blocks_of_a_set_are_those_of_lora_apply(gpu_blocks, loras, tmp_path):
    made = make_weight_sets(gpu_blocks, tmp_path / "sets", {"ink": loras["ink"]})
    applied = apply_lora(gpu_blocks, tmp_path / "applied", loras["ink"])
    found, base = open_bundle(made["ink"], "engines"), open_bundle(gpu_blocks, "engines")
    for name in base.manifest.spec.experts:
        weights = found.component(name).weights[1]
        assert weights.sha256 == applied.component(name).weights[1].sha256
        assert weights.sha256 != base.component(name).weights[1].sha256
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["ink"]


def test_a_name_has_a_file_an_expert_and_a_strength():
    named = parse_named(
        [
            "a=x.safetensors",
            "b=x.safetensors:high:0.5",
            "b=y.safetensors:low_noise",
            "c=z.pt:low:2",
            "d=folder::0.5",
            "e=x.pt@0.5:low",
        ]
    )
    files = {name: [(str(c.path), c.expert, c.strength) for c in choices] for name, choices in named.items()}
    assert files == {
        "a": [("x.safetensors", None, 1.0)],
        "b": [("x.safetensors", "high", 0.5), ("y.safetensors", "low", 1.0)],
        "c": [("z.pt", "low", 2.0)],
        "d": [("folder", None, 0.5)],
        "e": [("x.pt", "low", 0.5)],
    }


@pytest.mark.parametrize(
    "argument", ["x.safetensors", "=x.safetensors", "a b=x.safetensors", "a=", "a=x.safetensors:mid", "a=x.pt:low:much"]
)
def test_other_names_files_and_strengths_are_refused(argument):
    with pytest.raises(UserError):
        parse_named([argument])


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("x=style.safetensors:mid:1", "expert 'mid' | expected high or low"),
        ("x=style.safetensors:High", "expert 'High' | expected high or low"),
        ("x=style.safetensors:0.5", "expert '0.5' | expected high or low"),
        ("x=style.safetensors:high:nan", "strength 'nan' | expected a number from"),
        ("x=style.safetensors@0.5:high:2", "two strengths"),
    ],
)
def test_an_error_quotes_the_argument_and_its_syntax(argument, words):
    with pytest.raises(UserError) as error:
        parse_named([argument])
    assert f"--lora {argument!r}: {words}" in str(error.value)
    assert "NAME=FILE[:EXPERT[:STRENGTH]]" in str(error.value)


@pytest.mark.parametrize(("option", "told"), [("embedded", "has embedded weights"), ("merged", "style is merged")])
def test_engines_that_take_no_sets_are_refused(tiny_engines, loras, tmp_path, monkeypatch, option, told):
    bundle = open_bundle(tiny_engines, "engines")
    build = replace(bundle.manifest.build, backend="tensorrt")
    of_option = {"embedded": {"build": build}, "merged": {"loras": (MergedLora("style", "", 1.0, ("high_noise",)),)}}
    changed = replace(bundle, manifest=replace(bundle.manifest, **of_option[option]))
    monkeypatch.setattr("wan_trt.recipes.weight_sets.open_bundle", lambda *_: changed)
    with pytest.raises(UserError, match=told):
        make_weight_sets(tiny_engines, tmp_path / "sets", loras)
    assert list(tmp_path.iterdir()) == []
