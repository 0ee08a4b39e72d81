"""LoRAs in slots: engines that are built once compute what a merged export computes, whatever LoRA a request brings."""

import re
from contextlib import ExitStack

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from engines.build import BuildOptions, build_engines
from engines.lora_slots import add_slots, with_slots
from export.checkpoint.schema import dit_tensors
from export.exporter import export_checkpoint
from export.graphs.builder import FLOAT
from export.graphs.dit import dit_graph
from export.graphs.linear import Quantised, coded_matrices
from export.lora.merge import parse_lora
from export.options import ExportOptions
from export.quantise.quantised_weights import QuantisedWeights
from runtime.block_backend import BlockOptions
from runtime.pipeline import Pipeline
from runtime.recipe import read_recipe
from runtime.request import Request
from runtime.weight_sets import WeightSets
from tests.export.conftest import made_up, run_graph  # noqa: F401  # a fixture
from tests.export.graphs.test_blocks import Stages, given_to
from tests.export.graphs.test_dit import relative_l2
from tests.runtime.test_block_transformer import given_to as given_to_engines
from tests.runtime.test_blocks_tensorrt import gpu  # noqa: F401  # a fixture
from triton_repo.loading import load
from triton_repo.settings import Limits, settings_of
from validate.ladder.onnx_side import open_for_comparison
from wan22.block_layout import read_block_layout
from wan22.bundle import open_bundle
from wan22.component import File
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS
from wan_trt.cli import app
from wan_trt.recipes.apply_lora import apply_lora
from wan_trt.recipes.lora_slots import Region, fill_linear, write_slot_set
from wan_trt.recipes.weight_sets import make_weight_sets

SPEC = SPECS["t2v-a14b-tiny"].dit
RANK = 16
REQUEST = Request("a fox", size=(64, 48), frames=1, steps=3)


def linears():
    """Every linear of a block → (in, out)."""
    attention = {f"{a}_attn.{n}": (SPEC.width, SPEC.width) for a in ("self", "cross") for n in "qkvo"}
    return attention | {"ffn.0": (SPEC.width, SPEC.ffn_width), "ffn.2": (SPEC.ffn_width, SPEC.width)}


def low_rank(rank, seed, size=0.5):
    """A LoRA for every linear of every block, about ``size`` as large as the weights."""
    rng, found = np.random.default_rng(seed), {}
    for block in range(SPEC.layers):
        for name, (entering, leaving) in linears().items():
            key = f"diffusion_model.blocks.{block}.{name}"
            found[f"{key}.lora_down.weight"] = rng.standard_normal((rank, entering), np.float32) / entering**0.5
            found[f"{key}.lora_up.weight"] = rng.standard_normal((leaving, rank), np.float32) * size / rank**0.5
            found[f"{key}.alpha"] = np.array(rank, np.float32)
    return found


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """A plain LoRA, one that also changes vectors and the ends, and one for an expert alone, as the CLI takes them."""
    folder, rng = tmp_path_factory.mktemp("loras"), np.random.default_rng(7)
    more = {
        "blocks.0.self_attn.v.diff_b": (SPEC.width,),
        "blocks.1.cross_attn.o.diff_b": (SPEC.width,),
        "blocks.1.self_attn.norm_k.diff": (SPEC.width,),
        "blocks.0.norm3.diff": (SPEC.width,),
        "blocks.1.diff_m": (1, 6, SPEC.width),
        "time_projection.1.lora_down.weight": (4, SPEC.width),
        "time_projection.1.lora_up.weight": (6 * SPEC.width, 4),
        "patch_embedding.diff_b": (SPEC.width,),
        "text_embedding.0.lora_down.weight": (4, SPEC.text_width),
        "text_embedding.0.lora_up.weight": (SPEC.width, 4),
        "head.head.diff_b": (4 * SPEC.out_channels,),
    }
    others = {f"diffusion_model.{key}": 0.1 * rng.standard_normal(shape, np.float32) for key, shape in more.items()}
    save_file(low_rank(4, 0), folder / "ink.safetensors")
    save_file(low_rank(8, 1) | others, folder / "oil.safetensors")
    save_file(low_rank(8, 2), folder / "wax.safetensors")
    return {
        "ink": (f"{folder}/ink.safetensors@0.7",),
        "oil": (f"{folder}/oil.safetensors", f"{folder}/wax.safetensors@-0.5:low"),
    }


@pytest.fixture(scope="module")
def slotted(tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slotted") / "engines"
    return build_engines(tiny_bundle, folder, BuildOptions(lora_slots=RANK)).folder


def latents(pipeline, lora=None):
    *_, last = pipeline.denoise(pipeline.complete(Request(**{**vars(REQUEST), "lora": lora})))
    return last.latents


def test_requests_take_turns_with_loras_on_open_engines_and_get_what_merged_exports_give(
    slotted, blocks_of, tiny_checkpoint, loras, tmp_path
):
    parsed = {name: tuple(map(parse_lora, each)) for name, each in loras.items()}
    export_checkpoint(tiny_checkpoint, tmp_path / "onnx", ExportOptions(Precision.FP32, loras=parsed["oil"]))
    alone = {}
    for name, folder in ((None, blocks_of("t2v-a14b-tiny")), ("oil", tmp_path / "onnx")):
        with open_for_comparison(folder) as pipeline:
            alone[name] = latents(pipeline)
    sets = make_weight_sets(slotted, tmp_path / "sets", parsed)
    small, whole = (
        sum(file.size_bytes for component in bundle.manifest.components for file in component.weights[1:])
        for bundle in (open_bundle(sets["ink"], "engines"), open_bundle(slotted, "engines"))
    )
    assert small < whole / 2
    settings = settings_of(open_bundle(slotted, "engines"), Limits(10**6, 81), residency="all", loras=sets)
    with load(settings) as served:
        opened, found = set(), {}
        for name in ("ink", "oil", None, "oil", "ink", None):
            made = latents(served, name)
            assert np.array_equal(found.setdefault(name, made), made), name
            opened.add(id(served._engines["high_noise"]))
        assert len(opened) == 1  # no engine was opened again
    assert max(relative_l2(found[name], expected) for name, expected in alone.items()) < 1e-5
    assert relative_l2(found["ink"], found[None]) > 0.05 < relative_l2(found["oil"], found["ink"])
    bundles = {name: open_bundle(folder, "engines") for name, folder in sets.items()}
    with Pipeline(open_bundle(slotted, "engines"), blocks=BlockOptions("disk")) as streaming:
        streaming.weight_sets = WeightSets(streaming.bundle, bundles)
        for name in ("oil", "ink"):
            assert np.array_equal(latents(streaming, name), found[name])


def test_slots_of_fp8_linears_carry_scales_and_the_bias_that_moved_behind_o(tmp_path, run_graph):  # noqa: F811
    weights, given, rank = made_up(dit_tensors(SPEC)), given_to(SPEC), 16
    lora = low_rank(6, 3)
    changed = dict(weights)

    def pair(name):
        key = f"diffusion_model.{name.removesuffix('.weight')}"
        return lora[f"{key}.lora_down.weight"], lora[f"{key}.lora_up.weight"]

    for name in [f"blocks.{block}.{linear}.weight" for block in range(SPEC.layers) for linear in linears()]:
        down, up = pair(name)
        changed[name] = weights[name] + up @ down
    exact = run_graph(dit_graph(SPEC), changed)(**given)[0]

    def in_fp8(official, folder, *, slots):
        folder.mkdir()
        graph = dit_graph(SPEC, FLOAT, None, Quantised())
        read = QuantisedWeights(official.__getitem__, SPEC, coded_matrices(graph))
        stages = Slotted(folder, SPEC, Quantised(), {key: np.asarray(read(key)) for key in graph.weights}, rank)
        if slots:
            stages.fill(pair, weights)
        return relative_l2(stages.velocity(given), exact)

    merged, beside = in_fp8(changed, tmp_path / "merged", slots=False), in_fp8(weights, tmp_path / "slots", slots=True)
    assert beside < 1.2 * merged < 0.08 < in_fp8(weights, tmp_path / "base", slots=False)


class Slotted(Stages):
    """The stages in FP8 with slots of zeros."""

    def __init__(self, folder, spec, quantised, stored, rank):
        super().__init__(folder, spec, FLOAT, quantised, stored)
        import onnxruntime as ort

        for name, g in self.graphs.items():
            stage = with_slots(g.stage(File("", "", 0)), rank, "float32")
            add_slots(ir.Model(g.graph, ir_version=11), stage)
            g.weights |= {str(value.name): value for value in g.graph.inputs if ".lora_" in str(value.name)}
            for tensor in stage.weights:
                if ".lora_" in tensor.name:
                    zeros = {f"blocks.{b}.{tensor.name}": np.zeros(tensor.dims, np.float32) for b in range(spec.layers)}
                    self.stored |= zeros
            g.save(folder / f"{name}.onnx")
            self.sessions[name] = ort.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])

    def fill(self, pair, official):
        slots = {key.rpartition(".")[0] for key in self.stored if ".lora_" in key}
        for linear in slots:
            names = [key for key in self.stored if key.startswith(f"{linear}.")]
            region = Named({key.split(".", 2)[2]: self.stored[key] for key in names})
            block, short = linear.split(".", 2)[1:]
            module = short.rpartition(".")[0]
            if f"{short}.bias" not in region:  # stored part by part
                parts = short.rpartition(".")[2]
                biases = [self.stored[f"blocks.{block}.{module}.{part}.bias"] for part in parts]
                region[f"{short}.bias"] = np.concatenate(biases)
            moved = official[f"blocks.{block}.{module}.v.bias"] if short.endswith("attn.o") else None
            fill_linear(short, lambda part, b=block: pair(f"blocks.{b}.{part}.weight"), region, moved)


class Named(dict):
    vector = Region.vector


@pytest.mark.slow
def test_a_command_makes_a_video_with_a_lora_and_proves_it_against_the_merged_reference(
    slotted, tiny_engines, tiny_checkpoint, loras, tmp_path
):
    runner, lora = CliRunner(), [word for each in loras["oil"] for word in ("--lora", each)]
    sizes = ["--size", "64x48", "--frames", "1", "--steps", "2"]
    made = runner.invoke(app, ["generate", str(slotted), "-o", f"{tmp_path}/a.npz", "a fox", *sizes, *lora])
    assert made.exit_code == 0, made.output
    command = ["validate", str(slotted), str(tiny_checkpoint), "-o", f"{tmp_path}/report", *sizes]
    proved = runner.invoke(app, [*command, *lora])
    assert proved.exit_code == 0, proved.output
    assert "oil.safetensors" in (tmp_path / "report" / "report.html").read_text()
    refused = runner.invoke(app, ["generate", str(tiny_engines), "-o", f"{tmp_path}/b.npz", "a fox", *sizes, *lora])
    assert refused.exit_code == 2
    assert "engines with slots" in re.sub(r"\s+", " ", refused.output)


def test_a_video_with_loras_is_made_again_with_the_same_ones(slotted, tiny_engines, loras, tmp_path):
    def run(*words):
        done = CliRunner().invoke(app, ["generate", *map(str, words)])
        return done.exit_code, re.sub(r"\s+", " ", done.output)

    lora = [word for each in loras["oil"] for word in ("--lora", each)]
    sizes, first = ["--size", "64x48", "--frames", "1", "--steps", "2"], tmp_path / "a.png"
    assert run(slotted, "a fox", "-o", first, *sizes, *lora)[0] == 0
    assert read_recipe(first).lora == "oil.safetensors@1, wax.safetensors@-0.5:low"
    code, told = run(slotted, "--again", first, "-o", tmp_path / "b.png", *lora)
    assert (code, "differ" in told) == (0, False), told
    assert (tmp_path / "b.png").read_bytes() == first.read_bytes()
    code, told = run(slotted, "--again", first, "-o", tmp_path / "c.png", "--lora", loras["ink"][0])
    assert (code, "frames may differ" in told) == (0, True), told
    code, told = run(slotted, "--again", first, "-o", tmp_path / "d.png")
    assert (code, "wax.safetensors@-0.5:low" in told, "give its --lora again" in told) == (2, True, True), told
    code, told = run(slotted, "a fox", "-o", tmp_path / "e.png", *sizes, "--checkpoint", "x")
    assert (code, "--checkpoint without --lora" in told) == (2, True), told
    code, told = run(tiny_engines, "a fox", "-o", tmp_path / "f.png", *sizes, *lora)
    assert (code, "export --lora" in told, "lora apply" in told) == (2, True, False), told  # lora apply needs blocks
    described = CliRunner().invoke(app, ["inspect", str(slotted)])
    assert f"of rank {RANK}" in described.output


def test_what_does_not_fit_is_refused_with_the_smallest_rank_that_does(slotted, tiny_engines, loras, tmp_path):
    base = open_bundle(slotted, "engines")
    save_file(low_rank(20, 0), tmp_path / "large.safetensors")
    key = "diffusion_model.blocks.0.ffn.0.diff"
    save_file({key: np.ones((SPEC.ffn_width, SPEC.width), np.float32)}, tmp_path / "full.safetensors")
    endless = low_rank(2, 0)
    endless["diffusion_model.blocks.0.ffn.2.lora_up.weight"][3, 1] = np.inf
    save_file(endless, tmp_path / "inf.safetensors")
    for files, message in {
        ("large.safetensors",): r"LoRAs of rank 20 \| expected at most 16.*build with --lora-slots 32",
        ("full.safetensors",): r"changes 1 matrices by no product.*blocks.0.ffn.0.weight \| .*lora apply",
        ("inf.safetensors",): r"NaN, infinity",
    }.items():
        choices = [parse_lora(str(tmp_path / file)) for file in files]
        with pytest.raises(UserError, match=message):
            write_slot_set(base, choices, tmp_path / "set")
    for options, message in (
        (BuildOptions(lora_slots=24), r"--lora-slots 24 \| expected a multiple of 16"),
        (BuildOptions(lora_slots=16, topology="whole"), r"--lora-slots with --topology whole"),
    ):
        with pytest.raises(UserError, match=message):
            build_engines(tiny_engines.parent / "onnx", tmp_path / "e", options)


def test_merging_into_engines_with_slots_leaves_them_empty(slotted, loras, tmp_path):
    applied = apply_lora(slotted, tmp_path / "applied", (parse_lora(loras["ink"][0]),))
    bundle = open_bundle(applied.folder, "engines")
    with Pipeline(bundle) as merged, ExitStack() as stack:
        other = stack.enter_context(Pipeline.open(slotted))
        made = write_slot_set(other.bundle, [parse_lora(loras["ink"][0])], tmp_path / "set")
        other.weight_sets = WeightSets(other.bundle, {"ink": open_bundle(made, "engines")})
        assert relative_l2(latents(merged), latents(other, "ink")) < 1e-5


def test_a_gpu_copies_what_a_lora_replaces_and_no_block(slotted, loras, tmp_path, gpu):  # noqa: F811
    made = write_slot_set(open_bundle(slotted, "engines"), [parse_lora(loras["ink"][0])], tmp_path / "set")
    given, found = given_to_engines("t2v-a14b-tiny"), {}
    for weights_in in ("vram", "disk"):
        cupy, bundle, backend = gpu(slotted, weights_in)
        sets = WeightSets(bundle, {"ink": open_bundle(made, "engines")})
        backend.blocks.component = sets.component
        step_bytes = read_block_layout(bundle.path(bundle.component("high_noise").weights[0])).step_bytes
        with backend.new_engine(bundle.component("high_noise")) as engine:
            for name in (None, "ink", None, "ink"):
                sets.choose(name)
                backend.blocks.renew()
                cupy.copied.clear()
                velocity = engine(**given)
                assert np.array_equal(found.setdefault(name, velocity), velocity)
        assert max(cupy.copied) < step_bytes  # both blocks stay; only parts of them are copied
    assert relative_l2(found["ink"], found[None]) > 0.05
