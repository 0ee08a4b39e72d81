"""A VAE in stages, picture by picture in strips, gives what diffusers' whole decode and encode give."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import runtime.vae
from export.checkpoint.schema import vae_tensors
from export.graphs.builder import FLOAT, FLOAT16
from export.graphs.vae_decoder import decoder_stage
from export.graphs.vae_encoder import encoder_stage
from runtime.vae import Stages, _StripDecoder, _StripEncoder, decode_in_strips, encode_in_strips
from tests.export.conftest import made_up
from tests.export.graphs.vae_chunks import MODELS, decoded, encoded, write
from wan22.errors import UserError
from wan22.specs import SPECS, T2V_A14B, TI2V_5B
from wan22.strips import VAE_STAGES, caches_of, halo, strips_of

STAGES = {"vae_decoder": decoder_stage, "vae_encoder": encoder_stage}
SIDE = 41  # latent columns: longer than two halos, and no strips divide it evenly


class Session:
    """A graph in ONNX Runtime behind the interface of an engine."""

    def __init__(self, graph, weights, folder):
        self.inputs, self.outputs = graph.edges()
        self._session = ort.InferenceSession(write(graph, weights, folder))

    def __call__(self, **inputs):
        results = self._session.run(None, inputs)
        return results[0] if len(results) == 1 else tuple(results)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def stages(model, tmp_path_factory):
    """``stages(half)`` → the stages of a half of ``model``."""
    spec, weights, made = SPECS[model].vae, made_up(vae_tensors(SPECS[model].vae)), {}

    def of(half):
        folder = tmp_path_factory.mktemp(half)
        kinds = (("middle", False), ("motion", True), ("motion", False), ("coarse", False), ("fine", False))
        if half not in made:
            made[half] = Stages(spec, *(Session(STAGES[half](spec, *kind), weights, folder) for kind in kinds))
        return made[half]

    return of


def latents(model, frames, rows, columns):
    shape = (1, SPECS[model].vae.latent_channels, frames, rows, columns)
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def pixels(model, frames, rows, columns):
    stride = SPECS[model].vae.spatial_stride
    shape = (1, 3, frames, rows * stride, columns * stride)
    return np.random.default_rng(2).uniform(-1, 1, shape).astype(np.float32)


def decode(stages, z, count):
    return np.concatenate(list(decode_in_strips(stages, z, count)), axis=2)


@pytest.mark.parametrize(
    ("shape", "counts"), [((2, 2, SIDE), (1, 3)), ((1, SIDE, 1), (2,))], ids=["wide", "tall image"]
)
def test_strips_decode_to_the_whole_video(model, stages, shape, counts):
    z = latents(model, *shape)
    expected = decoded(model, z)
    for count in counts:
        assert np.abs(decode(stages("vae_decoder"), z, count) - expected).max() <= 1e-5
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("shape", "counts"), [((5, 2, SIDE), (1, 3)), ((1, SIDE, 1), (2,))], ids=["wide", "tall image"]
)
def test_strips_encode_to_the_whole_video(model, stages, shape, counts):
    video, told = pixels(model, *shape), []
    expected = encoded(model, video)
    for count in counts:
        found = encode_in_strips(stages("vae_encoder"), video, count, lambda *state: told.append(state))
        assert np.abs(found - expected).max() <= 1e-5
    assert told[-1] == ("encode image", counts[-1] * shape[0], counts[-1] * shape[0], "frames")


@pytest.mark.parametrize("half", STAGES)
def test_a_strip_takes_exactly_what_it_depends_on(model, stages, half):
    """NaN beyond what a strip takes does not reach what it gives; NaN one column nearer does."""
    spec, (before, behind) = SPECS[model].vae, halo(SPECS[model].vae, half)
    side, start, stop = before + behind + 3, before + 1, before + 2  # a strip of one column, with more on either side
    whole = np.random.default_rng(3).standard_normal((1, spec.decoder_widths[0], 2, 1, side), dtype=np.float32)
    stride, parts = spec.spatial_stride, [slice(0, 1), slice(1, 2)]
    if half == "vae_encoder":
        whole, parts = pixels(model, 5, 1, side), [slice(0, 1), slice(1, 5)]

    def spoilt(low, high):
        """True if the column is NaN where those outside ``low`` to ``high`` are."""
        given, scale = whole.copy(), stride if half == "vae_encoder" else 1
        given[..., : low * scale] = given[..., high * scale :] = np.nan
        strip = (_StripDecoder if half == "vae_decoder" else _StripEncoder)(stages(half))
        made = np.concatenate([strip(given[:, :, part]) for part in parts], axis=2)
        column = made[..., start * stride // scale : stop * stride // scale]
        return not np.isfinite(column).all()

    low, high = start - before, stop + behind
    assert [spoilt(low, high), spoilt(low + 1, high), spoilt(low, high - 1)] == [False, True, True]


def test_more_strips_than_columns_are_refused_before_any_call(model):
    z, video = latents(model, 1, 2, 3), pixels(model, 1, 2, 3)
    nothing = Stages(SPECS[model].vae, *[None] * 5)
    with pytest.raises(UserError, match=r"--vae-strips 4 for a video of 3 latent columns .* 1 to 3 .* --vae-strips 3"):
        next(decode_in_strips(nothing, z, 4))
    with pytest.raises(UserError, match="1 to 3"):
        encode_in_strips(nothing, video, 4)


@pytest.mark.parametrize("spec", [T2V_A14B.vae, TI2V_5B.vae], ids=["2.1", "2.2"])
@pytest.mark.parametrize("half", STAGES)
def test_stages_have_the_weights_and_caches_of_the_whole_graph(spec, half):
    kinds = [(stage, first) for stage in VAE_STAGES for first in ([True, False] if stage == "motion" else [False])]
    graphs = {kind: STAGES[half](spec, *kind) for kind in kinds}
    outer = {"vae_decoder": "conv2.", "vae_encoder": "conv1."}[half]
    part = half.removeprefix("vae_")
    expected = {key for key in vae_tensors(spec) if key.startswith((f"{part}.", outer))}
    assert {key for graph in graphs.values() for key in graph.weights} == expected
    every = spec.decoder_caches if half == "vae_decoder" else spec.encoder_caches
    found = []
    for stage in VAE_STAGES:
        start, caches = caches_of(spec, half, stage)
        outputs = graphs[stage, False].edges()[1]
        names = [tensor.name for tensor in outputs if tensor.name.startswith("next_cache")]
        assert names == [f"next_cache_{start + index:02d}" for index in range(len(caches))]
        found += [(start + index, cache) for index, cache in enumerate(caches)]
    assert [cache for _, cache in sorted(found, key=lambda item: item[0])] == list(every)


@pytest.mark.parametrize("compute", [FLOAT, FLOAT16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("half", STAGES)
def test_onnx_accepts_every_stage(model, half, compute, tmp_path):
    weights = made_up(vae_tensors(SPECS[model].vae))
    for stage in VAE_STAGES:
        for first in (True, False) if stage == "motion" else (False,):
            path = write(STAGES[half](SPECS[model].vae, stage, first, compute), weights, tmp_path)
            onnx.checker.check_model(path, full_check=True)


def test_strips_divide_a_side_without_gaps():
    for side in (1, 5, 44, 160):
        for count in range(1, side + 1):
            strips = strips_of(TI2V_5B.vae, "vae_decoder", side, count)
            assert [strip.start for strip in strips] == [0, *(strip.stop for strip in strips[:-1])]
            assert strips[-1].stop == side
            assert all(strip.low <= strip.start < strip.stop <= strip.high for strip in strips)
    assert runtime.vae.check_strips(160, (90, 160)) is None
