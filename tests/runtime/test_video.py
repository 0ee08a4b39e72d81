import errno

import av
import numpy as np
import pytest
from PIL import Image

from runtime.video import check_destination, encode_video, renamed_at_end, to_uint8
from wan22.errors import NonFiniteError, UserError

H, W = 48, 64


def chunks(frames=9, height=H, width=W):
    """A smooth moving picture in the chunks of the decoder: 1, 4, 4, ..."""
    f, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    video = np.stack([np.sin(x / 20 + f / 3), np.cos(y / 15 - f / 4), np.sin((x + y) / 25)])[None].astype(np.float32)
    yield video[:, :, :1]
    for start in range(1, frames, 4):
        yield video[:, :, start : start + 4]


def write_video(chunks, path, *settings):
    check_destination(path, frames=1)
    with renamed_at_end(path) as new:
        return encode_video(chunks, new, *settings)


def decoded(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream, [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_uint8_is_clamped_and_cut_off_like_the_official_code():
    torch = pytest.importorskip("torch")
    values = np.linspace(-1.2, 1.2, 99999, dtype=np.float32)
    theirs = (torch.from_numpy(values).clamp(-1, 1).sub_(-1).div_(2) * 255).type(torch.uint8)
    ours = to_uint8(np.broadcast_to(values, (1, 3, 1, 1, values.size)))
    assert ours.shape == (1, 1, values.size, 3)
    np.testing.assert_array_equal(ours[0, 0, :, 2], theirs.numpy())


def test_uint8_ends_with_the_channels():
    frames = np.zeros((1, 3, 2, 4, 6), np.float32)
    frames[0, 1, 1, 2, 3] = 1
    assert np.argwhere(to_uint8(frames) == 255).tolist() == [[1, 2, 3, 1]]


def test_frames_that_are_not_finite_are_never_shown():
    with pytest.raises(NonFiniteError, match="decoded frames"):
        to_uint8(np.full((1, 3, 1, 2, 2), np.nan, np.float32))


@pytest.mark.parametrize(("name", "codec"), [("out.mp4", "h264"), ("out.webm", "vp9")])
def test_a_film_holds_every_frame(tmp_path, name, codec):
    assert write_video(chunks(), tmp_path / name, 16) == 9
    stream, frames = decoded(tmp_path / name)
    assert len(frames) == 9
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == (codec, "yuv420p")
    assert stream.average_rate == 16
    assert (stream.width, stream.height) == (W, H)


@pytest.mark.parametrize("name", ["out.mp4", "out.webm"])
def test_a_film_looks_like_its_frames(tmp_path, name):
    write_video(chunks(), tmp_path / name, 16)
    for frame, chunk in zip(decoded(tmp_path / name)[1], to_uint8(np.concatenate([*chunks()], 2)), strict=True):
        error = np.mean((frame.astype(float) - chunk) ** 2)
        assert 10 * np.log10(255**2 / error) > 38


@pytest.mark.parametrize("name", ["out.mp4", "out.webm"])
@pytest.mark.parametrize("colour", [(1, -1, -1), (-1, 1, -1), (-1, -1, 1), (1, 1, 1), (-1, -1, -1)])
def test_a_film_keeps_pure_colours(tmp_path, colour, name):
    frame = np.broadcast_to(np.float32(colour).reshape(1, 3, 1, 1, 1), (1, 3, 1, H, W))
    write_video([frame], tmp_path / name, 16)
    shown = decoded(tmp_path / name)[1][0].astype(int)
    assert np.abs(shown - to_uint8(frame)[0]).max() <= 3


def test_npz_holds_the_very_frames(tmp_path):
    assert write_video(chunks(), tmp_path / "out.npz", 24) == 9
    with np.load(tmp_path / "out.npz") as file:
        np.testing.assert_array_equal(file["frames"], to_uint8(np.concatenate([*chunks()], 2)))
        assert file["fps"] == 24


def test_a_folder_gets_numbered_pngs(tmp_path):
    assert write_video(chunks(5), tmp_path / "frames", 16) == 5
    files = sorted((tmp_path / "frames").iterdir())
    assert [file.name for file in files] == [f"frame_{i:05d}.png" for i in range(5)]
    expected = to_uint8(np.concatenate([*chunks(5)], 2))
    np.testing.assert_array_equal([np.asarray(Image.open(file)) for file in files], expected)


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "frames").mkdir()
    write_video(chunks(1), tmp_path / "frames", 16)
    assert [file.name for file in tmp_path.rglob("*.png")] == ["frame_00000.png"]


def test_one_frame_makes_a_png_without_loss(tmp_path):
    write_video(chunks(1), tmp_path / "out.png", 16)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), to_uint8(next(chunks()))[0])


def test_one_frame_makes_a_jpeg(tmp_path):
    write_video(chunks(1), tmp_path / "new" / "out.jpg", 16)
    assert Image.open(tmp_path / "new" / "out.jpg").size == (W, H)


def test_an_mp4_takes_the_place_of_an_older_one(tmp_path):
    for frames in (9, 5):
        write_video(chunks(frames), tmp_path / "out.mp4", 16)
    assert len(decoded(tmp_path / "out.mp4")[1]) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.npz", "frames", "out.png"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, lambda: OSError(errno.EIO, "broken")])
def test_a_broken_run_leaves_nothing(tmp_path, name, failure):
    def broken():
        yield next(chunks())
        raise failure()

    with pytest.raises((KeyboardInterrupt, ValueError, UserError)):
        write_video(broken(), tmp_path / name, 16)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_user_error(tmp_path):
    def full():
        yield next(chunks())
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="disk full"):
        write_video(full(), tmp_path / "out.mp4", 16)
    assert not list(tmp_path.iterdir())


def test_an_older_video_survives_a_broken_run(tmp_path):
    (tmp_path / "out.mp4").write_bytes(b"old")
    with pytest.raises(NonFiniteError):
        write_video([np.full((1, 3, 1, H, W), np.inf, np.float32)], tmp_path / "out.mp4", 16)
    assert (tmp_path / "out.mp4").read_bytes() == b"old"


def test_chunks_are_asked_for_one_by_one(tmp_path):
    """When a chunk is requested, the previous one has been written."""

    def watched():
        for index, chunk in enumerate(chunks(9)):
            yield chunk
            assert len(list(tmp_path.rglob("*.png"))) == 1 + 4 * index

    write_video(watched(), tmp_path / "frames", 16)


def test_no_frames_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="no frames"):
        write_video([], tmp_path / "out.mp4", 16)


@pytest.mark.parametrize(
    ("name", "frames", "found"),
    [
        ("out.avi", 9, "out.avi"),
        ("out.png", 9, "9 frames for out.png"),
        ("taken.mp4", 9, "taken.mp4 is a folder"),
        ("full", 9, "full exists"),
    ],
)
def test_a_destination_is_refused_before_the_work(tmp_path, name, frames, found):
    (tmp_path / "taken.mp4").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file.txt").touch()
    with pytest.raises(UserError) as error:
        check_destination(tmp_path / name, frames)
    assert found in error.value.found


@pytest.mark.parametrize("name", ["link", "dangling", "dangling/x.mp4", "file.txt/out.mp4"])
def test_a_place_that_no_video_can_take_is_refused_before_the_work(tmp_path, name):
    def worked():
        raise AssertionError("it was begun")
        yield

    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file.txt").touch()
    with pytest.raises(UserError, match=r"is a link|cannot write"):
        write_video(worked(), tmp_path / name, 16)


def test_a_folder_of_frames_is_replaced_when_asked_for(tmp_path):
    write_video(chunks(5), tmp_path / "frames", 16)
    with pytest.raises(UserError, match="--overwrite"):
        check_destination(tmp_path / "frames", 1)
    check_destination(tmp_path / "frames", 1, overwrite=True)
    with renamed_at_end(tmp_path / "frames", overwrite=True) as new:
        encode_video(chunks(1), new, 16)
    assert [file.name for file in tmp_path.rglob("*.png")] == ["frame_00000.png"]


def test_a_folder_of_anything_else_is_never_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(UserError, match="an earlier result to overwrite"):
        check_destination(tmp_path / "notes", 1, overwrite=True)


def moving(frames=9, height=96, width=160):
    """A picture with detail that pans, in chunks of one frame."""
    wide = np.random.default_rng(0).normal(size=(3, height // 4, width // 2)).repeat(4, 1).repeat(4, 2)
    wide = (wide / 4).clip(-1, 1).astype(np.float32)
    return [wide[None, :, None, :, 2 * f : 2 * f + width] for f in range(frames)]


def psnr_db(path, chunks):
    shown = zip(decoded(path)[1], to_uint8(np.concatenate(chunks, 2)), strict=True)
    return 10 * np.log10(255**2 / np.mean([(a.astype(float) - b) ** 2 for a, b in shown]))


@pytest.mark.parametrize("name", ["out.mp4", "out.webm"])
def test_more_quality_is_more_bytes_and_less_error(tmp_path, name):
    video, found = moving(), []
    for quality in (3, 8, 10):
        write_video(video, tmp_path / name, 16, quality)
        found.append(((tmp_path / name).stat().st_size, psnr_db(tmp_path / name, video)))
    assert found == sorted(found)
    with pytest.raises(UserError, match="quality 11"):
        write_video(video, tmp_path / name, 16, 11)


def test_odd_sides_have_no_mp4(tmp_path):
    with pytest.raises(UserError, match="63x48"):
        write_video(chunks(1, H, 63), tmp_path / "out.mp4", 16)
    assert not list(tmp_path.iterdir())


def test_frames_per_second_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="0 frames per second"):
        write_video(chunks(), tmp_path / "out.mp4", 0)


@pytest.mark.parametrize(
    ("ending", "size", "times"),
    [("mp4", (64, 64), 20), ("mp4", (480, 832), 5), ("webm", (64, 64), 5), ("npz", (64, 64), 2)],
)
def test_the_same_frames_make_the_same_file(tmp_path, ending, size, times):
    path, files = tmp_path / f"out.{ending}", set()
    video = [*chunks(9, *size)]
    for _ in range(times):
        write_video(video, path, 16)
        files.add(path.read_bytes())
    assert len(files) == 1
