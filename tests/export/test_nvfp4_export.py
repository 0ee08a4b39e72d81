"""NVFP4 from the checkpoint to the bundle: its own codes bit for bit, or made here, and what targets say to it."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from engines.build import BuildOptions, build_engines
from engines.cpu.emulation import emulate
from export.exporter import export_checkpoint
from export.files.safetensors_file import read_safetensors
from export.graphs.builder import BFLOAT16, FLOAT, GraphBuilder
from export.graphs.linear import Linears, Quantised
from export.options import ExportOptions
from export.precisions import check_quantised
from export.quantise.nvfp4 import compensated, quantise
from studies.precision.session import fill, open_graph
from tests.export.checkpoint.forms import save, tensors_of
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.precision import Number, Precision
from wan22.specs import SPECS
from wan_trt.cli import app

NAME = "ti2v-5b-tiny"
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def through_nvfp4(x):
    """Rows over their largest magnitude, then NVFP4 by ml_dtypes' conversions."""
    largest = np.maximum(np.abs(x).max(1, keepdims=True), 1e-6)
    rows = (x / largest).astype(ml_dtypes.bfloat16).astype(np.float32).reshape(len(x), -1, 16)
    scales = np.abs(rows).max(-1, keepdims=True) / np.float32(6) * np.float32(2688)
    scales = scales.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) / np.float32(2688)
    codes = (rows / np.where(scales > 0, scales, 1)).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (codes * scales).reshape(x.shape).astype(ml_dtypes.bfloat16).astype(np.float32), largest


def test_a_linear_multiplies_the_codes_of_rows_and_matrix():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((7, 64)) * np.exp(rng.standard_normal(64))).astype(np.float32)
    x[2], x[3, 16:32] = 0, 0
    matrix, bias = rng.standard_normal((24, 64), np.float32), rng.standard_normal(24, np.float32)
    g = GraphBuilder("linear")
    linears = Linears(g, BFLOAT16, Quantised(linears=Number.NVFP4))
    entering = linears.operand(g.input("x", FLOAT, ["tokens", 64]), "blocks.0.ffn.0", 64)
    g.output("y", linears.values(linears(entering, "blocks.0.ffn", "0", (64, 24))), ["tokens", 24])
    made = quantise(matrix)
    leaves = {"weight": made.codes, "group_scale": made.groups, "weight_scale": made.rows, "bias": bias}
    model = fill(g, lambda key: leaves[key.rpartition(".")[2]])
    emulate(model)
    found = open_graph(model)(x=x)[0]
    rows, scale = through_nvfp4(x)
    wide = (made.decoded() / made.rows[:, None]).astype(ml_dtypes.bfloat16).astype(np.float32)
    raw = (rows @ wide.T).astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = raw * scale * made.rows + bias
    assert np.allclose(found, expected, atol=2e-2 * np.abs(expected).max(1, keepdims=True).clip(1e-6))
    assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)
    assert np.linalg.norm(found - (x @ matrix.T + bias)) < 0.2 * np.linalg.norm(expected)


def published(folder, path, *, comfy):
    """A transformer as ModelOpt or ComfyUI write NVFP4, and the codes, scales of groups and of matrices in it."""
    written, codes = {}, {}
    rng = np.random.default_rng(1)
    for name, tensor in tensors_of(folder, "dit").items():
        if tensor.ndim != 2 or not name.startswith("blocks.") or not name.endswith(".weight"):
            written[name] = tensor.half()
            continue
        (rows, inputs), stem = tensor.shape, name.removesuffix(".weight")
        world = tensor.abs().max() / 2688
        groups = tensor.reshape(rows, -1, 16).abs().amax(-1) / 6 / world
        groups = groups.to(torch.float8_e4m3fn)
        code = torch.from_numpy(rng.integers(0, 16, (rows, inputs), np.uint8))
        even, odd = code[:, 0::2], code[:, 1::2]
        written[name] = even << 4 | odd if comfy else odd << 4 | even
        written[f"{stem}.weight_scale"] = tiled(groups) if comfy else groups
        written[f"{stem}.weight_scale_2"] = world
        if comfy:
            told = b'{"format": "nvfp4"}'
            written[f"{stem}.comfy_quant"] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
        codes[stem] = (odd << 4 | even).numpy(), groups.view(torch.uint8).numpy(), float(world)
    save(path, written)
    return codes


def tiled(scales):
    """Scales of groups in cuBLAS' tiles of 128 x 4, padded."""
    rows, columns = scales.shape
    tall, wide = -(-rows // 128), -(-columns // 4)
    padded = np.zeros((tall * 128, wide * 4), np.uint8)
    padded[:rows, :columns] = scales.view(torch.uint8).numpy()
    out = np.zeros(tall * wide * 512, np.uint8)
    for r in range(tall * 128):
        for c in range(wide * 4):
            tile = (r // 128) * wide + c // 4
            out[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = padded[r, c]
    return torch.from_numpy(out).view(torch.float8_e4m3fn).reshape(tall * 128, wide * 4)


@pytest.mark.parametrize("rank", [0, 16])
def test_a_branch_multiplies_rows_as_they_were_before_nvfp4(rank):
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((7, 64)) * np.exp(rng.standard_normal(64))).astype(np.float32)
    matrix, bias = rng.standard_normal((24, 64), np.float32), rng.standard_normal(24, np.float32)
    matrix += 3 * (rng.standard_normal((24, 8), np.float32) @ rng.standard_normal((8, 64), np.float32))
    g = GraphBuilder("linear")
    linears = Linears(g, BFLOAT16, Quantised(linears=Number.NVFP4, low_rank=rank))
    entering = linears.operand(g.input("x", FLOAT, ["tokens", 64]), "blocks.0.ffn.0", 64)
    g.output("y", linears.values(linears(entering, "blocks.0.ffn", "0", (64, 24))), ["tokens", 24])
    made = compensated(matrix, np.zeros((0, 64), np.float32), rank)
    leaves = {"weight": made.codes, "group_scale": made.groups, "weight_scale": made.rows, "bias": bias}
    leaves |= {"low_rank_down": made.down, "low_rank_up": made.up}
    model = fill(g, lambda key: leaves[key.rpartition(".")[2]])
    emulate(model)
    found = open_graph(model)(x=x)[0]
    rows, scale = through_nvfp4(x)
    expected = rows @ made.decoded().T
    if rank:
        in_16_bits = (part.astype(ml_dtypes.bfloat16) for part in (made.up, made.down, x / scale))
        up, down, whole = (part.astype(np.float32) for part in in_16_bits)
        expected += whole @ down.T @ (up * made.rows[:, None]).T
    expected = expected * scale + bias
    assert np.linalg.norm(found - expected) < 5e-3 * np.linalg.norm(expected)
    exact = x @ matrix.T + bias
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < 0.04 if rank else error > 0.08


@pytest.mark.parametrize("comfy", [True, False], ids=["ComfyUI", "ModelOpt"])
def test_codes_of_a_checkpoint_stay_bit_for_bit(flow_of, tmp_path, comfy, caplog):
    checkpoint = flow_of(NAME).checkpoint
    codes = published(checkpoint, tmp_path / "dit.safetensors", comfy=comfy)
    where = f"{checkpoint},dit={tmp_path / 'dit.safetensors'}"
    options = ExportOptions(Precision.NVFP4, parts=frozenset({"dit"}), low_rank=0 if comfy else 16)
    bundle = export_checkpoint(where, tmp_path / "onnx", options)
    stored = read_safetensors(bundle.folder / "dit.safetensors")
    branches = [stored[key].read() for key in stored if ".low_rank_" in key]
    assert len(branches) == (0 if comfy else 2 * 7 * SPECS[NAME].dit.layers)
    assert not any(np.asarray(each).astype(np.float32).any() for each in branches)
    assert ("--low-rank 16 adds zeros beside the checkpoint's own" in caplog.text) != comfy
    for stem, (packed, groups, world) in codes.items():
        module, _, name = stem.rpartition(".")
        joined = {"self_attn": "qkv", "cross_attn": "kv"}.get(module.rpartition(".")[2], "")
        key, part = (f"{module}.{joined}", joined.index(name)) if name in joined else (stem, 0)
        rows = slice(part * len(packed), (part + 1) * len(packed))
        assert np.array_equal(stored[f"{key}.weight"].read()[rows], packed), stem
        assert np.array_equal(stored[f"{key}.group_scale"].read().view(np.uint8)[rows], groups), stem
        assert np.allclose(stored[f"{key}.weight_scale"].read()[rows], world, rtol=1e-6), stem
    assert not [key for key in stored if key.endswith("input_factor")]  # the codes know of none
    assert [key for key in stored if key.endswith("input_mean")]


@pytest.mark.slow
def test_from_the_command_line_to_a_proved_bundle(flow_of, tmp_path):
    """The feed-forward of one expert in NVFP4, its other linears in INT8, the other expert in FP8."""
    checkpoint, runner = flow_of("t2v-a14b-tiny").checkpoint, CliRunner()
    words = ["export", str(checkpoint), f"{tmp_path}/onnx", "--precision", "fp8", "--high-noise", "nvfp4-ffn"]
    made = runner.invoke(app, words)
    assert made.exit_code == 0, made.output
    assert "t2v-a14b-tiny nvfp4-ffn and fp8, " in made.output
    bundle = open_bundle(tmp_path / "onnx", "graphs")
    high = bundle.component("high_noise")
    assert {kind for kind, number in high.exceptions.items() if number is Number.INT8} >= {
        "self_attn.q",
        "cross_attn.o",
    }
    dtypes = {tensor.name: tensor.dtype for tensor in high.stage("rest").weights}
    assert (dtypes["ffn.0.weight"], dtypes["self_attn.o.weight"]) == ("float4_e2m1fn", "int8")
    small = ["--size", "64x48", "--frames", "1", "--steps", "2"]
    proved = runner.invoke(app, ["validate", str(bundle.folder), str(checkpoint), "-o", f"{tmp_path}/r", *small])
    assert proved.exit_code == 0, proved.output
    for target in ("rtx4090", "h100"):
        with pytest.raises(UserError, match=r"compute capability [\d.]+ has no NVFP4 units.*use --precision int8"):
            build_engines(bundle.folder, tmp_path / "e", BuildOptions(target))


@pytest.mark.parametrize("rank", [0, 32])
def test_codes_scales_and_factors_are_the_matrix_and_the_bias_restores_the_mean(flow_of, tmp_path, rank):
    checkpoint, spec = flow_of(NAME).checkpoint, SPECS[NAME].dit
    options = ExportOptions(Precision.NVFP4, parts=frozenset({"dit"}), low_rank=rank)
    bundle = export_checkpoint(checkpoint, tmp_path / "onnx", options)
    stored = read_safetensors(bundle.folder / "dit.safetensors")
    key, official = "blocks.1.ffn.2", tensors_of(checkpoint, "dit")
    factor = stored[f"{key}.input_factor"].read()
    exact = official[f"{key}.weight"].numpy() / factor
    codes = stored[f"{key}.weight"].read()
    groups, rows = stored[f"{key}.group_scale"].read().astype(np.float32), stored[f"{key}.weight_scale"].read()
    values = E2M1[np.stack((codes & 15, codes >> 4), -1)].reshape(spec.width, -1, 16)
    found = (values * groups[:, :, None] * rows[:, None, None]).reshape(exact.shape)
    if rank:
        up, down = (stored[f"{key}.low_rank_{leaf}"].read().astype(np.float32) for leaf in ("up", "down"))
        assert (up.shape, down.shape) == ((spec.width, rank), (rank, spec.ffn_width))
        left = np.linalg.svd(exact, compute_uv=False)[rank:]
        branch = up * rows[:, None] @ down
        assert np.linalg.norm(exact - branch) < 1.05 * np.linalg.norm(left)
        assert np.linalg.norm(found + branch - exact) < 0.25 * np.linalg.norm(left)
        found += branch
    assert np.linalg.norm(found - exact) < 0.25 * np.linalg.norm(exact)
    component = bundle.component("dit")
    names = {tensor.name for tensor in component.stage("rest").weights}
    assert component.low_rank == rank
    assert ("ffn.2.low_rank_up" in names) == (rank > 0)
    bias = official[f"{key}.bias"].numpy() + official[f"{key}.weight"].numpy() @ stored[f"{key}.input_mean"].read()
    assert np.allclose(stored[f"{key}.bias"].read(), bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [{"width": 40, "heads": 2}, {"ffn_width": 1000}])
@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_dimensions_that_no_kernel_takes_are_refused(change, expert):
    spec = SPECS["t2v-a14b-tiny"]
    odd = replace(spec, dit=replace(spec.dit, **change))
    for precision in (Precision.NVFP4, Precision.INT8):
        options = ExportOptions(Precision.BF16, precisions={expert: precision})
        check_quantised(spec, options)
        with pytest.raises(UserError, match=f"{precision} for a transformer .*multiples of 16, not .*--precision bf16"):
            check_quantised(odd, options)


@pytest.mark.slow
def test_branches_have_the_same_bytes_every_time_and_are_proved(flow_of, tmp_path):
    checkpoint, runner = flow_of(NAME).checkpoint, CliRunner()
    hashes = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        words = ["--precision", "nvfp4", "--low-rank", "32"]
        made = runner.invoke(app, ["export", str(checkpoint), str(folder), *words])
        assert made.exit_code == 0, made.output
        hashes.append([file.sha256 for file in open_bundle(folder, "graphs").component("dit").weights])
    assert hashes[0] == hashes[1]
    small = ["--size", "64x64", "--frames", "5", "--steps", "2"]
    proved = runner.invoke(app, ["validate", f"{tmp_path}/first", str(checkpoint), "-o", f"{tmp_path}/r", *small])
    assert proved.exit_code == 0, proved.output
