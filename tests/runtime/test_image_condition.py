import numpy as np
import pytest
from PIL import Image

from runtime.image_condition import conditioning_mask, conditioning_video, fit_image, i2v_condition, video_size
from wan22.errors import UserError
from wan22.specs import SPECS

I2V, TI2V = SPECS["i2v-a14b"], SPECS["ti2v-5b"]
HD, SD = (1280, 720), (832, 480)


def photo(width, height):
    y, x = np.mgrid[:height, :width]
    values = np.stack([x * 255 / width, y * 255 / height, 127 + 100 * np.sin(x / 5 + y / 9)], -1)
    return Image.fromarray(values.astype(np.uint8))


def to_tensor(image):
    """torchvision's ``to_tensor(image).sub(0.5).div(0.5)``."""
    torch = pytest.importorskip("torch")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div(255).sub(0.5).div(0.5)


@pytest.mark.parametrize(
    ("image", "wanted", "expected"),
    [
        ((1920, 1080), HD, (1280, 720)),
        ((1920, 1080), SD, (832, 464)),
        ((1024, 1024), HD, (960, 960)),
        ((1024, 1024), SD, (624, 624)),
        ((1600, 1200), HD, (1104, 816)),
        ((1600, 1200), SD, (720, 544)),
        ((1500, 1000), HD, (1168, 768)),
        ((1500, 1000), SD, (768, 512)),
    ],
)
def test_i2v_keeps_the_shape_of_the_image_and_the_area(image, wanted, expected):
    assert video_size(I2V, image, wanted) == video_size(I2V, image, wanted, exact_official=True) == expected


@pytest.mark.parametrize("wanted", [*I2V.sampling.sizes, (1024, 1024), (960, 416)])
def test_an_image_of_the_wanted_size_gets_that_size(wanted):
    assert video_size(I2V, wanted, wanted) == wanted


def test_the_official_floor_takes_a_row_of_tokens_from_an_exact_image():
    assert video_size(I2V, SD, SD, exact_official=True) == (832, 464)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((16, 9), (1248, 704)),
        ((1, 1), (960, 928)),
        ((4, 3), (1088, 800)),
        ((3, 2), (1152, 768)),
        ((20, 11), (1280, 704)),
    ],
)
@pytest.mark.parametrize("exact_official", [False, True])
def test_ti2v_takes_the_grid_of_closest_shape(image, expected, exact_official):
    size = (image[0] * 100, image[1] * 100)
    assert video_size(TI2V, size, (1280, 704), exact_official=exact_official) == expected


@pytest.mark.parametrize("spec", [I2V, TI2V])
def test_crop_gives_the_wanted_size_whatever_the_image(spec):
    assert video_size(spec, (300, 4000), (1280, 704), "crop") == (1280, 704)


@pytest.mark.parametrize("spec", [I2V, TI2V])
@pytest.mark.parametrize("exact_official", [False, True])
@pytest.mark.parametrize("length", [40000, 80000])
def test_a_ribbon_has_no_grid(spec, exact_official, length):
    with pytest.raises(UserError, match=f"{length}x16"):
        video_size(spec, (length, 16), (1280, 704), exact_official=exact_official)


def test_a_size_off_the_grid_is_refused():
    with pytest.raises(UserError, match="1280x710"):
        video_size(I2V, (1920, 1080), (1280, 710))


def test_i2v_stretches_as_the_official_code_does():
    torch = pytest.importorskip("torch")
    image = photo(211, 150)
    theirs = torch.nn.functional.interpolate(to_tensor(image)[None], (128, 224), mode="bicubic")
    ours = fit_image(image, "stretch", (224, 128))
    assert ours.shape == (1, 3, 1, 128, 224)
    np.testing.assert_allclose(ours[:, :, 0], theirs.numpy(), rtol=0, atol=1e-5)


def test_i2v_keeps_the_overshoot():
    edge = Image.fromarray(np.repeat(np.where(np.arange(40) < 20, 0, 255).astype(np.uint8), 90).reshape(40, 30, 3))
    assert fit_image(edge, "stretch", (32, 64)).max() > 1.01


def test_ti2v_covers_and_cuts_as_the_official_code_does():
    image = photo(300, 200)
    scaled = image.resize((192, 128), Image.Resampling.LANCZOS)
    ours = fit_image(image, "cover", (160, 128))
    np.testing.assert_array_equal(ours[0, :, 0], to_tensor(scaled.crop((16, 0, 176, 128))).numpy())


@pytest.mark.parametrize("resizing", ["stretch", "cover"])
def test_crop_keeps_proportions_and_centre(resizing):
    """A disc in the middle stays a disc in the middle; the ends of the long side are cropped."""
    y, x = np.mgrid[:200, :600]
    disc = ((x - 300) ** 2 + (y - 100) ** 2 < 80**2) * np.uint8(255)
    shown = fit_image(Image.fromarray(np.repeat(disc[..., None], 3, -1)), resizing, (256, 256), "crop")[0, 0, 0] > 0
    for axis in (0, 1):
        inside = np.flatnonzero(shown.any(axis=axis))
        assert abs(inside[0] - (128 - 102.4)) <= 1.5
        assert abs(inside[-1] - (128 + 102.4)) <= 1.5


def test_crop_of_a_ribbon_needs_little_memory():
    assert fit_image(Image.new("RGB", (16, 80000)), "stretch", (1280, 720), "crop").shape == (1, 3, 1, 720, 1280)


def test_the_video_is_the_image_then_grey():
    first = np.full((1, 3, 1, 4, 6), 0.5, np.float32)
    video = conditioning_video(first, 9)
    assert video.shape == (1, 3, 9, 4, 6)
    assert (video[:, :, 0] == 0.5).all()
    assert not video[:, :, 1:].any()


def test_the_last_image_ends_the_video():
    first, last = np.full((1, 3, 1, 4, 6), 0.5, np.float32), np.full((1, 3, 1, 4, 6), -0.5, np.float32)
    video = conditioning_video(first, 9, last)
    assert (video[:, :, 8] == -0.5).all()
    assert not video[:, :, 1:8].any()


@pytest.mark.parametrize("has_last", [False, True])
def test_the_mask_is_the_frame_mask_grouped_by_four(has_last):
    torch = pytest.importorskip("torch")
    given = torch.zeros(1, 17, 2, 3)
    given[:, 0] = 1
    given[:, -1] = float(has_last)
    repeated = torch.cat([given[:, :1].repeat_interleave(4, dim=1), given[:, 1:]], dim=1)
    theirs = repeated.view(1, 5, 4, 2, 3).transpose(1, 2)
    np.testing.assert_array_equal(conditioning_mask(5, 2, 3, has_last=has_last), theirs.numpy())


def test_the_condition_is_mask_then_latents():
    latents = np.random.default_rng(0).standard_normal((1, 16, 5, 4, 6), dtype=np.float32)
    condition = i2v_condition(latents)
    assert condition.dtype == np.float32
    assert condition.shape == (1, I2V.dit.condition_channels, 5, 4, 6)
    np.testing.assert_array_equal(condition[:, :4], conditioning_mask(5, 4, 6))
    np.testing.assert_array_equal(condition[:, 4:], latents)


def test_one_frame_has_no_room_for_a_last_image():
    image = np.zeros((1, 3, 1, 4, 6), np.float32)
    with pytest.raises(UserError, match="last image"):
        conditioning_video(image, 1, image)
    with pytest.raises(UserError, match="last image"):
        conditioning_mask(1, 2, 3, has_last=True)
