"""``--topology blocks``: stages instead of a transformer, and weights files with equal offsets in every block."""

from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from engines.block_build import BlockBuild
from engines.block_weights import V_NORMS, layout_of, write_block_weights
from engines.build import BuildOptions, build_engines
from engines.inspect.inspection import inspect_engines
from engines.inspect.views import blocks_as_text
from engines.targets import TARGETS
from export.checkpoint.checkpoint import open_checkpoint
from export.exporter import export_checkpoint
from export.files.safetensors_file import read_safetensors
from export.options import ExportOptions
from export.synth.checkpoint import synthesise
from runtime.built_for import check_plans
from tests.export.test_calibrated import written
from wan22.block_layout import read_block_layout
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.progress import silent
from wan22.quantities import human_bytes
from wan22.specs import SPECS

OF_GROUPS = ["qkv_of_2", "attend_of_2", "join_of_2"]
STAGES = ["time", "text", "text_kv", "patches", "qkv", "attend", "rest", "velocity"]


@pytest.fixture(scope="module")
def fp8_blocks(tmp_path_factory, tiny_checkpoint):
    """FP8 engines for a GPU in stages, and the bundle that they were built from."""
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    root = tmp_path_factory.mktemp("fp8")
    export_checkpoint(tiny_checkpoint, root / "b", ExportOptions(Precision.FP8_ATTN))
    options = BuildOptions("rtx4090", "256x160", "5..17", topology="blocks")
    build_engines(root / "b", root / "e", options)
    return open_bundle(root / "b", "graphs"), open_bundle(root / "e", "engines", full_check=True)


def read(bundle, component, place, block=None):
    layout = read_block_layout(bundle.path(component.weights[0]))
    start = 0 if block is None else layout.first_block + block * layout.block_bytes
    dtypes = {t.name: t.dtype for stage in component.stages for t in stage.weights} | {V_NORMS: "float32"}
    found = np.fromfile(
        bundle.path(component.weights[1]), np.uint8, place.size_bytes, offset=start + place.offset
    ).view(dtypes[place.name])
    return found.reshape(place.shape)


@pytest.mark.slow
def test_both_experts_share_stages_of_a_few_kernels(fp8_blocks):
    _, built = fp8_blocks
    high, low = (built.component(f"{name}_noise") for name in ("high", "low"))
    assert [stage.name for stage in high.stages] == STAGES
    assert high.stages == low.stages
    assert high.weights[0] == low.weights[0]
    assert high.weights[1].sha256 != low.weights[1].sha256
    assert check_plans(built) == ()
    assert built.manifest.build.options["topology"] == "blocks"
    reports = {report.component: report for report in inspect_engines(built.folder)}
    assert [f"high_noise.{stage}" in reports for stage in STAGES] == [True] * len(STAGES)
    assert [len(reports[f"high_noise.{stage}"].compiled.kernels) for stage in ("qkv", "rest")] == [4, 12]
    assert not [report.problems for report in reports.values() if report.problems]
    assert [len(reports[f"high_noise.{stage}"].typical_block) for stage in ("time", "qkv", "rest")] == [0, 4, 12]
    summary = reports["high_noise.qkv"].summary()
    assert (summary["kernels_per_block"], summary["blocks_compiled"]) == (4, 1)
    assert summary["roofline_s"] == pytest.approx(summary["roofline_block_s"] * built.manifest.spec.dit.layers)
    layer, block = blocks_as_text(list(reports.values()))
    assert layer.startswith("text_encoder: a block is layer, ")
    assert block.startswith("high_noise: a block is qkv + attend + rest, 4 + 2 + 12 kernels, ")


@pytest.mark.slow
def test_one_of_two_devices_has_as_many_kernels_and_the_same_rest(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    spec = SPECS["t2v-a14b-tiny"]
    spec = replace(spec, dit=replace(spec.dit, heads=4, width=512))  # attention of one head is no fused kernel
    synthesise(spec, tmp_path / "c", "official", seed=0)
    export_checkpoint(tmp_path / "c", tmp_path / "b", ExportOptions(Precision.FP8_ATTN))
    build_engines(tmp_path / "b", tmp_path / "e", BuildOptions("rtx4090", "256x160", "17", parallel="ulysses2"))
    reports = {report.component: report for report in inspect_engines(tmp_path / "e")}
    assert not [report.problems for report in reports.values() if report.problems]
    assert [name.removeprefix("high_noise.") for name in reports if "_of_2" in name] == OF_GROUPS
    _, alone, of_two = blocks_as_text(list(reports.values()))
    assert alone.startswith("high_noise: a block is qkv + attend + rest, 4 + 2 + 12 kernels, ")
    names = "qkv_of_2 + attend_of_2 + join_of_2 + rest"
    assert of_two.startswith(f"high_noise on one of 2 devices: a block is {names}, 4 + 1 + 1 + 12 kernels, ")
    assert of_two.endswith(f", {human_bytes(reports['high_noise.rest'].compiled.scratch_bytes / 2, 0)}")


def test_attention_of_a_group_is_compiled_in_the_form_that_its_target_fuses(tmp_path, tiny_bundle):
    source, found = open_bundle(tiny_bundle, "graphs"), {}
    for target in ("rtx4090", "rtx3090", None):
        compiled = {}

        def compile_stage(graph, _component, stage, compiled=compiled):
            import onnx_ir as ir

            compiled[stage.name] = {node.op_type for node in ir.load(graph).graph}
            return stage.graph

        aim = None if target is None else TARGETS[target]
        build = BlockBuild(source, tmp_path, silent, compile_stage, groups=(2,), target=aim)
        build.component(source.component("high_noise"))
        assert list(compiled) == STAGES + OF_GROUPS
        found[target] = {name for name in compiled if "Unsqueeze" not in compiled[name] and "Softmax" in compiled[name]}
    assert found == {"rtx4090": {"attend_of_2"}, "rtx3090": set(), None: set()}


def test_stages_that_an_older_version_exported_for_a_group_are_refused(tmp_path, tiny_bundle):
    source = open_bundle(tiny_bundle, "graphs")
    older = [
        replace(c, stages=tuple(replace(s, name=s.name.replace("join", "rest")) for s in c.stages))
        for c in source.manifest.components
    ]
    manifest = replace(source.manifest, components=tuple(older), command="wan-trt export model onnx")
    build = BlockBuild(replace(source, manifest=manifest), tmp_path, silent, None, groups=(2,))
    with pytest.raises(UserError, match=r"--parallel ulysses2 .* export again: wan-trt export model onnx --overwrite"):
        build.check()
    replace(build, groups=()).check()


@pytest.mark.slow
def test_every_block_has_its_own_weights_as_the_bundle_stores_them(fp8_blocks):
    source, built = fp8_blocks
    import onnx_ir as ir

    for component in (built.component("high_noise"), built.component("low_noise")):
        layout = read_block_layout(built.path(component.weights[0]))
        graph = ir.load(source.path(source.component(component.name).graph)).graph
        stored = {name: value.const_value.numpy() for name, value in graph.initializers.items() if "." in name}
        assert all(place.offset % 256 == 0 for place in (*layout.ends, *layout.block))
        assert layout.first_block % 4096 == layout.block_bytes % 4096 == 0
        assert built.path(component.weights[1]).stat().st_size == layout.size_bytes
        for block in range(layout.blocks):
            places = {place.name: place for place in layout.block}
            for name in ("self_attn.qkv.weight", "ffn.2.weight", "modulation", "cross_attn.kv.weight_scale"):
                expected = stored[f"blocks.{block}.{name}"]
                assert np.array_equal(read(built, component, places[name], block), expected), (block, name)
            biases = [stored[f"blocks.{block}.self_attn.{part}.bias"] for part in "qkv"]
            assert np.array_equal(read(built, component, places["self_attn.qkv.bias"], block), np.concatenate(biases))
            width = len(biases[0])
            matrix = stored[f"blocks.{block}.self_attn.qkv.weight"][2 * width :].astype(np.float64)
            scales = stored[f"blocks.{block}.self_attn.qkv.weight_scale"][2 * width :]
            norms = np.linalg.norm(matrix, axis=1) * scales
            assert np.allclose(read(built, component, places[V_NORMS], block), norms, rtol=1e-5)
        assert [p.name for p in layout.block if p.offset >= layout.step_bytes] == [
            t.name for t in component.stage("text_kv").weights
        ]


@pytest.mark.slow
def test_the_text_encoder_is_a_layer_and_a_norm_and_its_rows_are_those_of_the_checkpoint(fp8_blocks):
    source, built = fp8_blocks
    import onnx_ir as ir

    from runtime.block_files import BlockFiles
    from runtime.block_text_encoder import BlockTextEncoder

    component = built.component("text_encoder")
    layout = read_block_layout(built.path(component.weights[0]))
    stored = ir.load(source.path(source.component("text_encoder").graph)).graph.initializers
    place = next(place for place in layout.block if place.name == "ffn.fc2.weight")
    for block in range(layout.blocks):
        expected = stored[f"blocks.{block}.ffn.fc2.weight"].const_value.numpy()
        assert np.array_equal(read(built, component, place, block).view(np.uint16), expected.view(np.uint16))
    with BlockFiles({"text_encoder": built.path(component.weights[1])}, layout) as files:
        shared = SimpleNamespace(layout=layout, device=SimpleNamespace(host_bytes=files.read))
        rows = BlockTextEncoder(shared, component)._embed(np.array([0, 5, 1023]))
    table = stored["token_embedding.weight"].const_value.numpy()
    assert np.array_equal(rows, table[[0, 5, 1023]].astype(np.float32))
    assert sum(stage.graph.size_bytes for stage in component.stages) < 2**21


@pytest.mark.slow
def test_scales_of_attention_hold_for_every_block_and_expert(fp8_blocks):
    source, built = fp8_blocks
    import onnx_ir as ir

    scales = built.manifest.build.attention_scales
    assert scales.keys() == {"self_attn.q_scale", "self_attn.k_scale"}
    for expert in ("high_noise", "low_noise"):
        for name, value in ir.load(source.path(source.component(expert).graph)).graph.initializers.items():
            if (short := name.split(".", 2)[-1]) in scales:
                assert value.const_value.numpy() <= scales[short]
    assert not {t.name for stage in built.component("high_noise").stages for t in stage.weights} & scales.keys()


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.FP8_ATTN, Precision.INT8_FP8_ATTN], ids=str)
def test_matrices_scaled_row_by_row_reach_the_compiler(tmp_path, precision):
    """A checkpoint's own FP8 codes, with a scale for every row, or INT8 made of them: the blocks' weights hold all."""
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    folder = written(tmp_path / "c", "rows", blocks=2)[0]
    bundle = export_checkpoint(folder, tmp_path / "b", ExportOptions(precision))
    stored = read_safetensors(bundle.folder / "dit.safetensors")
    matrix, scales = (
        np.asarray(stored[f"blocks.1.self_attn.qkv.{leaf}"].read()) for leaf in ("weight", "weight_scale")
    )
    assert len(np.unique(scales)) > 1
    factors = stored.get("blocks.1.self_attn.q.input_factor")
    assert (factors is not None) == (precision is Precision.INT8_FP8_ATTN)
    options = BuildOptions("rtx4090", "256x160", "5..17", topology="blocks")
    built = build_engines(bundle.folder, tmp_path / "blocks", options)
    component = built.component("dit")
    places = {place.name: place for place in read_block_layout(built.path(component.weights[0])).block}
    assert np.array_equal(read(built, component, places["self_attn.qkv.weight_scale"], 1), scales)
    mean = np.asarray(stored["blocks.1.self_attn.o.input_mean"].read())  # which attend subtracts
    assert np.array_equal(read(built, component, places["self_attn.o.input_mean"], 1), mean)
    width = len(scales) // 3
    rows = matrix[2 * width :].astype(np.float64) * (1 if factors is None else factors.read())
    norms = np.linalg.norm(rows, axis=1) * scales[2 * width :]
    assert np.allclose(read(built, component, places[V_NORMS], 1), norms, rtol=1e-5)
    problems = [problem for r in inspect_engines(built.folder) for problem in r.problems]
    assert problems == []


def test_blocks_that_differ_are_refused_before_anything_is_written(tmp_path, tiny_checkpoint):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    options = ExportOptions(Precision.FP8, keep_high_precision=frozenset({0}))
    export_checkpoint(tiny_checkpoint, tmp_path / "b", options)
    with pytest.raises(UserError, match=r"--topology blocks for high_noise, whose blocks differ"):
        build_engines(tmp_path / "b", tmp_path / "e", BuildOptions("rtx4090", "256x160", "5", topology="blocks"))
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_blocks_are_not_served_engine_by_engine(tmp_path, tiny_bundle):
    from triton_repo.bls_repository import check_backends

    built = build_engines(tiny_bundle, tmp_path / "e", BuildOptions(topology="blocks"))
    with pytest.raises(UserError, match="engines in blocks in topology bls"):
        check_backends(built)


def test_experts_of_different_precision_have_their_own_stages(tmp_path):
    synthesise(SPECS["t2v-a14b-tiny"], tmp_path / "c", "official", seed=0)
    options = ExportOptions(Precision.FP32, precisions={"low_noise": Precision.FP16})
    bundle = export_checkpoint(tmp_path / "c", tmp_path / "b", options)
    graphs = {c.name: {stage.graph.path for stage in c.stages} for c in bundle.manifest.components if c.stages}
    assert not graphs["high_noise"] & graphs["low_noise"]
    built = build_engines(tmp_path / "b", tmp_path / "e", BuildOptions(topology="blocks"))
    found = {path.name for path in built.folder.glob("*.weights")}
    assert found == {"high_noise.weights", "low_noise.weights", "text_encoder.weights"}
    assert not [path.name for path in built.folder.glob("*_noise.safetensors")]


@pytest.mark.parametrize("blocks", [1, 10**9])
def test_a_manifest_with_other_blocks_than_the_graph_is_refused(tiny_bundle, tmp_path, blocks):
    bundle = open_bundle(tiny_bundle, "graphs")
    component = bundle.component("high_noise")
    layout = layout_of([stage for stage in component.stages if stage.groups == 1], blocks)
    with pytest.raises(UserError, match=rf"high_noise.onnx with 2 blocks \| expected {blocks} by bundle.json"):
        write_block_weights(bundle.path(component.graph), layout, tmp_path / "w", silent)
    assert not (tmp_path / "w").exists()


def test_blocks_have_their_branches_and_norms_of_v_count_them(tmp_path, tiny_checkpoint):
    options = ExportOptions(Precision.NVFP4_FP8_ATTN, parts=frozenset({"high_noise"}), low_rank=32)
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "b", options)
    component, layers = bundle.component("high_noise"), bundle.manifest.spec.dit.layers
    layout = layout_of([stage for stage in component.stages if stage.groups == 1], layers)
    write_block_weights(bundle.path(component.graph), layout, tmp_path / "w", silent)
    place = next(place for place in layout.block if place.name == V_NORMS)
    stored, width = read_safetensors(bundle.folder / "high_noise.safetensors"), bundle.manifest.spec.dit.width
    branches = [place for place in layout.block if ".low_rank_" in place.name]
    assert len(branches) == 2 * 7
    for block in range(layers):
        for branch in branches:
            expected = stored[f"blocks.{block}.{branch.name}"].read().tobytes()
            copied = np.fromfile(
                tmp_path / "w", np.uint8, branch.size_bytes, offset=layout.region(block) + branch.offset
            )
            assert copied.tobytes() == expected
        found = np.fromfile(tmp_path / "w", np.float32, width, offset=layout.region(block) + place.offset)
        leaves = ("weight", "group_scale", "weight_scale", "low_rank_up")
        key = f"blocks.{block}.self_attn"
        codes, groups, rows, up = (stored[f"{key}.qkv.{leaf}"].read()[2 * width :] for leaf in leaves)
        codes = np.stack((codes & 15, codes >> 4), -1).view(ml_dtypes.float4_e2m1fn).reshape(width, -1, 16)
        rest = (codes.astype(np.float64) * groups.astype(np.float64)[:, :, None]).reshape(width, width)
        down = stored[f"{key}.qkv.low_rank_down"].read().astype(np.float64)
        factor = stored[f"{key}.q.input_factor"].read()
        matrix = (rest + up.astype(np.float64) @ down) * rows[:, None] * factor
        assert np.allclose(found, np.linalg.norm(matrix, axis=1), rtol=1e-4)
        official = open_checkpoint(tiny_checkpoint).weights["high_noise"].read(f"{key}.v.weight")
        assert np.linalg.norm(matrix - official) < 0.2 * np.linalg.norm(official)  # without the branch half of it
