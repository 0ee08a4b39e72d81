"""Our readers and writers of safetensors and torch zips agree with the libraries that own the formats."""

import os
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from export.files.safetensors_file import read_metadata, read_safetensors, write_safetensors
from export.files.tensor_file import Planned
from export.files.torch_file import write_torch
from export.files.torch_reader import read_torch
from wan22.errors import UserError

VALUES = {
    "b.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a.bias": np.linspace(-1, 1, 5).astype(ml_dtypes.bfloat16),
    "scalar": np.array([7], np.float32),
}
PLAN = {name: Planned(value.dtype, value.shape) for name, value in VALUES.items()}


def pieces(name):
    flat = VALUES[name].ravel()
    yield flat[:2]
    yield flat[2:]


def as_numpy(tensor):
    return tensor.float().numpy()


@pytest.mark.parametrize(
    ("write", "load"), [(write_safetensors, safetensors.torch.load_file), (write_torch, torch.load)]
)
def test_the_library_reads_what_we_write(tmp_path, write, load):
    write(tmp_path / "file", PLAN, pieces)
    loaded = load(tmp_path / "file")
    assert {name: str(t.dtype) for name, t in loaded.items()} == {
        "b.weight": "torch.float32", "a.bias": "torch.bfloat16", "scalar": "torch.float32",
    }  # fmt: skip
    for name, value in VALUES.items():
        np.testing.assert_array_equal(as_numpy(loaded[name]), value.astype(np.float32))


def test_we_read_what_the_library_writes(tmp_path):
    state = {name: torch.from_numpy(value.astype(np.float32)) for name, value in VALUES.items()}
    state["a.bias"] = state["a.bias"].bfloat16()
    state["view"] = torch.arange(10.0)[4:]  # begins inside its storage
    torch.save(state, tmp_path / "state.pth")
    safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, tmp_path / "s", {"k": "v"})
    for stored in (read_torch(tmp_path / "state.pth"), read_safetensors(tmp_path / "s")):
        assert stored.keys() == state.keys()
        assert stored["a.bias"].dtype == ml_dtypes.bfloat16
        for name, tensor in state.items():
            np.testing.assert_array_equal(stored[name].read().astype(np.float32), as_numpy(tensor))
    assert read_metadata(tmp_path / "s") == {"k": "v"}


def test_a_torch_file_of_ours_is_a_sound_zip_with_aligned_records(tmp_path):
    write_torch(tmp_path / "state.pth", PLAN, pieces)
    assert zipfile.ZipFile(tmp_path / "state.pth").testzip() is None
    assert all(stored.offset % 64 == 0 for stored in read_torch(tmp_path / "state.pth").values())
    mapped = torch.load(tmp_path / "state.pth", mmap=True, weights_only=True)
    assert mapped["scalar"].item() == 7


@pytest.mark.parametrize(("write", "read"), [(write_safetensors, read_safetensors), (write_torch, read_torch)])
def test_zeros_take_no_space(tmp_path, write, read):
    megabyte = np.zeros(2**18, np.float32)
    write(tmp_path / "file", {"big": Planned(megabyte.dtype, (64, 2**18))}, lambda name: [megabyte] * 64)
    status = (tmp_path / "file").stat()
    assert status.st_size > 64 * 2**20
    assert status.st_blocks * 512 < 2**20
    assert not read(tmp_path / "file")["big"].read().any()


def damaged(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c[:-1], "bytes that its header declares"),
        (lambda c: c + b"\0", "bytes that its header declares"),
        (lambda c: c[:5], "no safetensors header"),
        (lambda c: c[:40], "bytes of its header"),
        (lambda c: b"\xff" * 8 + c[8:], "no safetensors header"),
        (lambda c: c.replace(b"{", b"[", 1), "invalid header"),
        (lambda c: (100_000).to_bytes(8, "little") + b"[" * 100_000, "invalid header"),
        (lambda c: c.replace(b"BF16", b"BF17"), "a.bias has type BF17"),
        (lambda c: c.replace(b"[48,58]", b"[38,48]"), "overlap"),
        (lambda c: c.replace(b"[3,4]", b"[3,5]"), r"b.weight F32\[3, 5\] in bytes 0 to 48"),
    ],
)
def test_a_damaged_safetensors_file_is_refused(tmp_path, change, words):
    write_safetensors(tmp_path / "s", PLAN, pieces)
    with pytest.raises(UserError, match=words):
        read_safetensors(damaged(tmp_path / "s", change))


def test_a_missing_file_is_refused(tmp_path):
    for read in (read_safetensors, read_torch):
        with pytest.raises(UserError, match="absent"):
            read(tmp_path / "absent")


class RunsCode:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"w": RunsCode()}, "tensors only, no code"),
        ([torch.ones(2)], "holds a list"),
        ({}, "a state dict"),
        ({"w": 3}, "'w' is not a plain tensor"),
        ({"w": torch.ones(3, 2).T}, "'w' is not a plain tensor"),
    ],
)
def test_a_torch_file_of_anything_but_tensors_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=words) as error:
        read_torch(tmp_path / "x.pth")
    assert "\n" not in str(error.value)


def rezipped(path, change, kind=zipfile.ZIP_STORED):
    """Replace every record of the zip at ``path`` by ``change(name, content)``."""
    with zipfile.ZipFile(path) as archive:
        entries = [(each.filename, archive.read(each)) for each in archive.infolist()]
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in entries:
            archive.writestr(name, change(name, content))
    return path


def pickled(content):
    """A change for :func:`rezipped`."""
    return lambda name, old: content if name.endswith("data.pkl") else old


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, old: b"big" if name.endswith("byteorder") else old, "is big-endian"),
        (lambda name, old: old[:-1] if name.endswith("data/0") else old, "ends within b.weight"),
        (pickled(b"\x80\x02r\xff\xff\xff\x7f."), "a memo of 2147483647 entries"),
        (pickled(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R."), "builtins.bytearray"),
        (pickled(b"\x80\x02ctorch.sparse\nx\n."), "an unsupported torch type"),
        (pickled(b"\x80\x02ctorchao.x\nY\n."), "a torchao tensor"),
        (pickled(b"\x80\x02\x8d\xff\xff\xff\xff\x00\x00\x00\x00."), "x.pth"),
        (pickled(b""), "x.pth"),
    ],
)
def test_a_hostile_torch_file_is_refused(tmp_path, change, words):
    write_torch(tmp_path / "x.pth", PLAN, pieces)
    with pytest.raises(UserError, match=words) as error:
        read_torch(rezipped(tmp_path / "x.pth", change))
    assert "\n" not in str(error.value)


def test_a_torch_file_that_would_grow_is_refused(tmp_path):
    write_torch(tmp_path / "x.pth", PLAN, pieces)
    grown = rezipped(tmp_path / "x.pth", lambda _name, old: old + bytes(2**22), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed or encrypted"):
        read_torch(grown)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.qint8, torch.float8_e8m0fnu, torch.uint16])
def test_types_without_a_meaning_for_weights_are_refused(tmp_path, dtype):
    odd = torch.quantize_per_tensor(torch.ones(4), 1.0, 0, dtype) if dtype == torch.qint8 else torch.ones(4).to(dtype)
    torch.save({"w": odd}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth: "):
        read_torch(tmp_path / "x.pth")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.float16, torch.float64])
def test_types_of_quantised_weights_are_read(tmp_path, dtype):
    tensor = torch.arange(6.0).reshape(2, 3).to(dtype)
    torch.save({"w": torch.nn.Parameter(tensor, requires_grad=False)}, tmp_path / "x.pth")
    stored = read_torch(tmp_path / "x.pth")["w"]
    np.testing.assert_array_equal(stored.read().astype(np.float32), tensor.float().numpy())


@pytest.mark.parametrize(
    "wrapped", [lambda s: {"state_dict": s}, lambda s: {"generator": {}, "generator_ema": s, "n": 3}]
)
def test_a_state_dict_in_a_trainers_dictionary_is_found(tmp_path, wrapped):
    torch.save(wrapped({"w": torch.ones(2)}), tmp_path / "x.pth")
    assert list(read_torch(tmp_path / "x.pth")) == ["w"]


@pytest.mark.parametrize("read", [read_safetensors, read_torch])
def test_pipes_and_devices_are_refused_without_being_opened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "a named pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=words):
            read(path)


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_truncated_torch_file_is_refused(tmp_path, kept):
    write_torch(tmp_path / "x.pth", PLAN, pieces)
    length = len((tmp_path / "x.pth").read_bytes())
    with pytest.raises(UserError, match=r"x\.pth"):
        read_torch(damaged(tmp_path / "x.pth", lambda c: c[: kept if kept > 1 else int(kept * length)]))
