"""``build --vae-strips``: real engines of the stages, for strips of other sizes, and the memory that they take."""

import re
from math import prod

import pytest

from engines.build import BuildOptions, build_engines
from engines.gpu.tensorrt_backend import EngineOptions, build_engine
from engines.inspect.inspection import inspect_engines
from engines.profiles import profiles_for
from engines.targets import TARGETS
from export.exporter import export_checkpoint
from export.graphs.builder import FLOAT, FLOAT16, Placed
from export.graphs.vae_decoder import decoder_stage
from export.graphs.vae_encoder import encoder_stage
from export.options import ExportOptions
from runtime.built_for import check_plans
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.shapes import fitting_profile, own_profiles
from wan22.specs import T2V_A14B, TI2V_5B
from wan22.strips import VAE_STAGES, strips_of
from wan22.vae_memory import stage_scratch_bytes

DECODER = ExportOptions(Precision.BF16, {"vae_decoder": Precision.FP16}, parts=frozenset({"vae_decoder"}))
STRIPS = 3


@pytest.fixture(scope="module")
def graphs(tmp_path_factory, tiny_checkpoint):
    """An ONNX bundle of the decoder alone."""
    folder = tmp_path_factory.mktemp("decoder") / "onnx"
    export_checkpoint(tiny_checkpoint, folder, DECODER)
    return folder


def test_each_stage_is_compiled_once_for_whole_pictures_and_strips(graphs, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    options = BuildOptions("rtx4090", "320x160,160x320", "5", vae_strips=STRIPS)
    build_engines(graphs, tmp_path / "e", options)
    built = open_bundle(tmp_path / "e", "engines", full_check=True)
    first, following = (built.component(f"vae_decoder_{name}") for name in ("first", "next"))
    shared = {first.part(stage).graph for stage in VAE_STAGES} & {following.part(stage).graph for stage in VAE_STAGES}
    assert len(shared) == len(VAE_STAGES) - 1
    assert first.part("motion").graph != following.part("motion").graph
    assert len(list((tmp_path / "e").glob("*.plan"))) == len(VAE_STAGES) + 1
    assert first.in_stages and not first.in_blocks
    assert check_plans(built) == ()
    assert built.manifest.build.options["vae_strips"] == str(STRIPS)
    reports = {report.component: report for report in inspect_engines(tmp_path / "e")}
    assert not [problem for report in reports.values() for problem in report.problems]
    profiles = own_profiles(built.manifest.build.profiles, first.part("fine").inputs)
    spec, takes = built.manifest.spec.vae, set()
    for count in range(1, STRIPS + 1):
        for strip in strips_of(spec, "vae_decoder", 40, count):
            takes.add(fitting_profile({"strip_height": 20, "strip_width": strip.extent}, profiles))
            takes.add(fitting_profile({"strip_height": strip.extent, "strip_width": 20}, profiles))
    assert takes == {0, 1}
    with pytest.raises(UserError, match="strip_width"):
        fitting_profile({"strip_height": 20, "strip_width": 10}, profiles)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (BuildOptions("cpu", vae_strips=2), r"--vae-strips for target cpu .* takes? any number of strips"),
        (BuildOptions("rtx4090", "128x64", "5", vae_strips=99), r"--vae-strips 99 .* 16 latent columns .* 1 to 16"),
    ],
    ids=["cpu", "too many"],
)
def test_strips_that_no_build_can_have_are_refused_before_any_work(graphs, tmp_path, options, refused):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    with pytest.raises(UserError, match=refused):
        build_engines(graphs, tmp_path / "e", options)
    assert not (tmp_path / "e").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "half", "size", "precision"),
    [
        (T2V_A14B, "vae_decoder", (1280, 720), Precision.FP16),
        (T2V_A14B, "vae_decoder", (1280, 720), Precision.FP32),
        (T2V_A14B, "vae_encoder", (1280, 720), Precision.FP32),
        (TI2V_5B, "vae_decoder", (1280, 704), Precision.FP16),
        (TI2V_5B, "vae_encoder", (1280, 704), Precision.FP32),
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_the_scratch_memory_of_real_engines_is_what_plan_says(tmp_path, spec, half, size, precision):
    """The builder's log tells it without a GPU; the weights are holes in a file."""
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    compute = FLOAT16 if precision is Precision.FP16 else FLOAT
    author = decoder_stage if half == "vae_decoder" else encoder_stage
    (whole,) = profiles_for(spec, "{}x{}".format(*size), "81")
    rows, columns = spec.latent_shape(*size, 81)[3:]
    for stage, side in [*((stage, columns) for stage in VAE_STAGES), ("fine", 46)]:
        graph, placed, end = author(spec.vae, stage, False, compute), {}, 0
        for key, value in graph.weights.items():
            length = int(prod(value.shape.numpy()) * compute.itemsize)
            placed[key], end = Placed("weights", end, length), end + length
        with (tmp_path / "weights").open("wb") as file:
            file.truncate(end)
        graph.bind(placed, tmp_path)
        graph.save(tmp_path / f"{stage}.onnx")
        profile = whole | {"strip_height": (rows,) * 3, "strip_width": (side,) * 3}
        options = EngineOptions(TARGETS["rtx4090"], (profile,), graph.edges()[0])
        log = build_engine(tmp_path / f"{stage}.onnx", tmp_path / f"{stage}.plan", options).log.read_text()
        used = int(re.search(r"Total Activation Memory: (\d+) bytes", log)[1])
        assert used <= stage_scratch_bytes(spec.vae, half, stage, precision, rows * side) <= 1.15 * used, stage
