"""Initial noise from a file: read without running code, checked, and used by both sides of a comparison."""

import os

import numpy as np
import pytest
from typer.testing import CliRunner

from runtime.noise import standard_normal
from runtime.request import Request
from wan22.errors import UserError
from wan22.specs import SPECS
from wan_trt.cli import app
from wan_trt.recipes.noise_file import read_noise

SPEC = SPECS["t2v-a14b-tiny"]
SHAPE = (16, 1, 6, 8)  # of 64x48, 1 frame
SMALL = ["--size", "64x48", "--frames", "1", "--steps", "1"]
NOISE = standard_normal((1, *SHAPE), 7)[0]


def save(path, array):
    if path.suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save(torch.from_numpy(array), path)
    else:
        {".npz": np.savez, ".npy": np.save}[path.suffix](path, array)
    return path


@pytest.mark.parametrize("name", ["noise.npz", "noise.npy", "noise.pt"])
def test_every_format_gives_the_array(tmp_path, name):
    np.testing.assert_array_equal(read_noise(save(tmp_path / name, NOISE)), NOISE)


def test_bfloat16_of_a_tensor_in_a_dictionary(tmp_path):
    torch = pytest.importorskip("torch")
    noise = torch.from_numpy(NOISE).to(torch.bfloat16)
    torch.save({"latent": noise, "seed": 42}, tmp_path / "noise.pt")
    np.testing.assert_array_equal(read_noise(tmp_path / "noise.pt"), noise.float().numpy())


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_no_code_of_a_file_runs(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save(Code(), "noise.pt")
    np.save("noise.npy", np.array([Code()], object))
    for name in ("noise.pt", "noise.npy"):
        with pytest.raises(UserError):
            read_noise(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("noise.txt", b"", "a name ending in .npz"),
        ("nothing.npz", None, "No such file"),
        ("noise.npz", b"PK\3\4 cut", "an array that numpy saved"),
        ("noise.npy", b"", "an array that numpy saved"),
        ("noise.pt", b"not a zip", "a complete file written by torch.save"),
    ],
)
def test_what_is_no_noise_is_refused(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_noise(tmp_path / name)


def test_integers_and_several_arrays_are_refused(tmp_path):
    with pytest.raises(UserError, match="contains int64"):
        read_noise(save(tmp_path / "noise.npy", np.arange(4)))
    np.savez(tmp_path / "two.npz", a=NOISE, b=NOISE)
    with pytest.raises(UserError, match="2 arrays"):
        read_noise(tmp_path / "two.npz")


@pytest.mark.parametrize("shape", [(1, 2, 6, 8), (16, 1, 8, 6), (2, *SHAPE)])
def test_a_shape_that_does_not_fit_names_both(shape):
    request = Request("x", size=(64, 48), frames=1, noise=np.zeros(shape, np.float32))
    with pytest.raises(UserError) as error:
        request.completed(SPEC)
    assert f"noise of shape {list(shape)} | expected [1, 16, 1, 6, 8]" in str(error.value)


def test_noise_that_is_not_finite_is_refused():
    with pytest.raises(UserError, match="NaN or infinity"):
        Request("x", size=(64, 48), frames=1, noise=np.full(SHAPE, np.nan, np.float32)).completed(SPEC)


def invoke(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output


def test_generate_starts_from_it(tiny_engines, tmp_path):
    path = save(tmp_path / "noise.npz", NOISE)
    invoke("generate", tiny_engines, "x", "-o", tmp_path / "given.png", *SMALL, "--latents", path)
    invoke("generate", tiny_engines, "x", "-o", tmp_path / "seven.png", *SMALL, "--seed", 7)
    invoke("generate", tiny_engines, "x", "-o", tmp_path / "zero.png", *SMALL)
    given, seven, zero = (pixels(tmp_path / f"{name}.png") for name in ("given", "seven", "zero"))
    assert (given == seven).all()
    assert (given != zero).any()


def pixels(path):
    from PIL import Image

    return np.asarray(Image.open(path))


@pytest.mark.slow
def test_validate_gives_it_to_both_sides(flow_of, tmp_path):
    flow = flow_of("t2v-a14b-tiny")
    path = save(tmp_path / "noise.npz", NOISE)
    invoke("validate", flow.engines, flow.checkpoint, "-o", tmp_path / "r", *SMALL, "--noise", path)
    assert "the given noise" in (tmp_path / "r" / "report.json").read_text()
