"""LoRAs for engines in blocks: new files of weights, the stages that are there."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from engines.build import BuildOptions, build_engines
from export.checkpoint.checkpoint import open_checkpoint
from export.exporter import export_checkpoint
from export.lora.file import lora_file
from export.lora.merge import LoraChoice
from export.options import ExportOptions
from export.synth.checkpoint import synthesise
from wan22.bundle import open_bundle, write_manifest
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS
from wan_trt.cli import app
from wan_trt.recipes.apply_lora import apply_lora, check_same_checkpoint

TINY = "t2v-a14b-tiny"


@pytest.mark.slow
def test_loras_make_new_weight_files_for_the_engine_that_is_there(tmp_path, gpu_blocks):
    lora, shape = tmp_path / "style.safetensors", (SPECS[TINY].dit.ffn_width, SPECS[TINY].dit.width)
    save_file({"diffusion_model.blocks.0.ffn.0.diff": np.full(shape, 0.1, np.float32)}, lora)
    told = CliRunner().invoke(
        app, ["lora", "apply", str(gpu_blocks), f"{lora}:high", "-o", str(tmp_path / "new" / "styled")]
    )
    assert told.exit_code == 0, told.output
    old, new = (open_bundle(folder, "engines", full_check=True) for folder in (gpu_blocks, tmp_path / "new" / "styled"))
    assert new.component("high_noise").graph == old.component("high_noise").graph
    assert new.component("high_noise").weights[1].sha256 != old.component("high_noise").weights[1].sha256
    assert new.component("low_noise").weights == old.component("low_noise").weights
    assert new.manifest.loras[0].experts == ("high_noise",)
    assert (tmp_path / "new" / "styled" / "high_noise.rest.plan").samefile(gpu_blocks / "high_noise.rest.plan")


@pytest.mark.slow
def test_a_lora_that_outgrows_the_scales_of_the_engine_is_refused(tmp_path, tiny_checkpoint):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    experts = frozenset({"high_noise", "low_noise"})
    export_checkpoint(tiny_checkpoint, tmp_path / "b", ExportOptions(Precision.FP8_ATTN, parts=experts))
    build_engines(tmp_path / "b", tmp_path / "e", BuildOptions("rtx4090", "256x160", "5..17"))
    lora, width = tmp_path / "norm.safetensors", SPECS[TINY].dit.width
    save_file({"diffusion_model.blocks.0.self_attn.norm_q.diff": np.full(width, 9, np.float32)}, lora)
    told = CliRunner().invoke(app, ["lora", "apply", str(tmp_path / "e"), str(lora), "-o", str(tmp_path / "new")])
    assert told.exit_code == 2
    assert "self_attn.q_scale" in told.output
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_no_lora_is_refused_without_an_option_that_lora_apply_lacks(tmp_path):
    with pytest.raises(UserError, match=r"no weights \| expected one LoRA \| name its file") as error:
        lora_file(tmp_path)
    assert "--lora" not in str(error.value)


def test_engines_with_their_weights_inside_are_refused(tmp_path, tiny_engines):
    with pytest.raises(UserError, match="has embedded weights"):
        apply_lora(tiny_engines, tmp_path / "new", [LoraChoice(tmp_path / "style.safetensors")])
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_moved_is_told_with_the_option_that_names_it(tmp_path, tiny_engines):
    old = open_bundle(tiny_engines, "engines").manifest
    gone = replace(old.source, checkpoint=f"{tmp_path / 'gone'},vae={tmp_path / 'vae.safetensors'}")
    write_manifest(shutil.copytree(tiny_engines, tmp_path / "e"), replace(old, source=gone))
    told = CliRunner().invoke(app, ["lora", "apply", str(tmp_path / "e"), "x.safetensors", "-o", str(tmp_path / "new")])
    assert told.exit_code == 2
    assert "gone" in told.output
    assert "name it with --checkpoint" in told.output.replace("\n", " ")


@pytest.mark.parametrize(("model", "seed"), [(TINY, 1), ("ti2v-5b-tiny", 0)], ids=["other weights", "another model"])
def test_another_checkpoint_is_refused(tmp_path, tiny_engines, model, seed):
    synthesise(SPECS[model], tmp_path / "other", "official", seed)
    engines = open_bundle(tiny_engines, "engines")
    check_same_checkpoint(engines, open_checkpoint(engines.manifest.source.checkpoint))
    with pytest.raises(UserError, match=rf"a {model}: not the checkpoint of the engines \| expected that of {TINY} at"):
        check_same_checkpoint(engines, open_checkpoint(tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "rank"), [(Precision.FP32, 0), (Precision.FP8_ATTN, 0), (Precision.NVFP4_FP8_ATTN, 32)]
)
def test_loras_make_new_files_of_blocks_as_a_build_of_them_would(tmp_path, tiny_checkpoint, precision, rank):
    target = ("cpu",) if precision is Precision.FP32 else ("rtx5090" if rank else "rtx4090", "256x160", "5..17")
    if precision is not Precision.FP32:
        pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    lora, shape = tmp_path / "style.safetensors", (SPECS[TINY].dit.ffn_width, SPECS[TINY].dit.width)
    save_file({"diffusion_model.blocks.0.ffn.0.diff": np.full(shape, 0.1, np.float32)}, lora)
    experts, choice = frozenset({"high_noise", "low_noise"}), LoraChoice(lora)
    for folder, loras in (("plain", ()), ("styled", (choice,))):
        options = ExportOptions(precision, parts=experts, loras=loras, low_rank=rank)
        export_checkpoint(tiny_checkpoint, tmp_path / folder / "b", options)
        build_engines(tmp_path / folder / "b", tmp_path / folder / "e", BuildOptions(*target, topology="blocks"))
    apply_lora(tmp_path / "plain" / "e", tmp_path / "applied", [choice])
    applied, styled = (open_bundle(tmp_path / name, "engines", full_check=True) for name in ("applied", "styled/e"))
    for name in sorted(experts):
        assert applied.component(name).weights[1].sha256 == styled.component(name).weights[1].sha256
    words = ["lora", "apply", str(applied.folder), f"{lora}@0.5", "-o", str(tmp_path / "again")]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    assert "replaces: style.safetensors@1\n" in told.output
    assert [each.strength for each in open_bundle(tmp_path / "again", "engines").manifest.loras] == [0.5]
