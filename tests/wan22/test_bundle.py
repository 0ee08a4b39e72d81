"""A bundle is whole or it is not there, and a reader believes nothing unchecked."""

import errno
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from wan22 import bundle
from wan22.bundle import (
    MANIFEST,
    Build,
    Manifest,
    Source,
    file_entry,
    kind_of,
    open_bundle,
    refuse_existing,
    staged,
    write_manifest,
)
from wan22.component import Component, File, Tensor
from wan22.errors import UserError, refusing_disk_errors
from wan22.precision import Precision
from wan22.specs import SPECS


def write_bundle(folder: Path, **changes: object) -> Manifest:
    with staged(folder) as temporary:
        (temporary / "dit.onnx").write_bytes(b"graph")
        graph = file_entry(temporary, temporary / "dit.onnx")
        inputs = (Tensor("latents", "float32", (1, 16, "frames", "height", "width")),)
        manifest = Manifest(
            kind="graphs",
            spec=SPECS["t2v-a14b-tiny"],
            precision=Precision.FP32,
            components=(Component("dit", graph, (), inputs, (), Precision.FP32),),
            tokenizer=(),
            source=Source("checkpoint", "official", "f" * 64),
            command="wan-trt export",
        )
        manifest = replace(manifest, **changes)
        write_manifest(temporary, manifest)
    return manifest


def test_what_is_written_is_read_back(tmp_path):
    manifest = write_bundle(tmp_path / "b")
    read = open_bundle(tmp_path / "b", "graphs").manifest
    assert replace(read, own_sha256="") == manifest


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    with pytest.raises(error), staged(tmp_path / "b") as temporary:
        (temporary / "half").write_bytes(b"x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_disk_full_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match="disk full"), staged(tmp_path / "b"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_an_edited_file_is_named(tmp_path):
    write_bundle(tmp_path / "b")
    (tmp_path / "b" / "dit.onnx").write_bytes(b"grapf")
    with pytest.raises(UserError, match=r"dit\.onnx: sha256"):
        open_bundle(tmp_path / "b", "graphs")


def test_a_resized_file_is_named_with_both_sizes(tmp_path):
    write_bundle(tmp_path / "b")
    (tmp_path / "b" / "dit.onnx").write_bytes(b"gra")
    with pytest.raises(UserError, match=r"3 bytes \| expected 5 bytes"):
        open_bundle(tmp_path / "b", "graphs")


def test_a_missing_file_is_named(tmp_path):
    write_bundle(tmp_path / "b")
    (tmp_path / "b" / "dit.onnx").unlink()
    with pytest.raises(UserError, match="is missing"):
        open_bundle(tmp_path / "b", "graphs")


@pytest.mark.parametrize(
    ("made_by", "remedy"),
    [
        ("wan-trt export c b", "run wan-trt export c b --overwrite"),
        ("wan-trt export c b --overwrite", "run wan-trt export c b --overwrite"),
        ("export.export_checkpoint(...)", "run wan-trt export again"),
    ],
)
def test_a_damaged_bundle_says_how_it_was_made(tmp_path, made_by, remedy):
    write_bundle(tmp_path / "b", command=made_by)
    (tmp_path / "b" / "dit.onnx").write_bytes(b"gra")
    with pytest.raises(UserError) as refused:
        open_bundle(tmp_path / "b", "graphs")
    assert str(refused.value).endswith(f"| {remedy}")


def test_another_kind_or_version_is_refused(tmp_path):
    write_bundle(tmp_path / "b")
    with pytest.raises(UserError, match=r"b holds graphs \| expected engines, a folder made by wan-trt build"):
        open_bundle(tmp_path / "b", "engines")
    write_bundle(tmp_path / "c", format_version=99)
    with pytest.raises(UserError, match="format 99"):
        open_bundle(tmp_path / "c", "graphs")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"format_version": 1, "kind": "graphs"}', b"\xff"])
def test_a_broken_manifest_is_one_line(tmp_path, content):
    write_bundle(tmp_path / "b")
    (tmp_path / "b" / MANIFEST).write_bytes(content)
    with pytest.raises(UserError) as error:
        open_bundle(tmp_path / "b", "graphs")
    assert "\n" not in str(error.value)


def test_a_bundle_from_before_a_field_was_added_is_read(tmp_path):
    """As one that has a field which this version does not know."""
    write_bundle(tmp_path / "b")
    content = msgspec.json.decode((tmp_path / "b" / MANIFEST).read_bytes())
    content |= {"of_another_version": 1, "own_sha256": ""}
    content["own_sha256"] = hashlib.sha256(msgspec.json.encode(content)).hexdigest()
    (tmp_path / "b" / MANIFEST).write_bytes(msgspec.json.encode(content))
    assert open_bundle(tmp_path / "b", "graphs").manifest.precision == Precision.FP32


def test_a_path_out_of_the_bundle_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(b"s")
    write_bundle(tmp_path / "b", tokenizer=(replace(file_entry(tmp_path, tmp_path / "secret"), path="../secret"),))
    with pytest.raises(UserError, match="inside the bundle"):
        open_bundle(tmp_path / "b", "graphs")


@pytest.mark.parametrize("name", ["../../evil", "/evil", "", "a\0b", "a b"])
def test_a_component_that_would_name_files_elsewhere_is_refused(tmp_path, name):
    made = write_bundle(tmp_path / "a")
    write_bundle(tmp_path / "b", components=(replace(made.components[0], name=name),))
    with pytest.raises(UserError, match="a component named"):
        open_bundle(tmp_path / "b", "graphs")


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "loop", "loop/file"])
def test_a_path_that_no_disk_has_is_refused(tmp_path, path):
    write_bundle(tmp_path / "b", tokenizer=(File(path, "0" * 64, 1),))
    (tmp_path / "b" / "loop").symlink_to("loop")
    with pytest.raises(UserError), refusing_disk_errors(""):
        open_bundle(tmp_path / "b", "graphs")


@pytest.mark.parametrize("target", ["nowhere", "empty"])
def test_what_nothing_can_take_the_place_of_is_refused_before_the_work(tmp_path, target, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=r"link is a link .* name one inside it"), staged(tmp_path / "link"):
        raise AssertionError("it was begun")
    with pytest.raises(UserError, match=r"/ is a mount point .* name one inside it"), staged(Path("/")):
        raise AssertionError("it was begun")
    monkeypatch.chdir(tmp_path / "empty")
    for here in (Path(), tmp_path / "empty"):
        with pytest.raises(UserError, match=r"is the working folder .* name one inside it"), staged(here):
            raise AssertionError("it was begun")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]


def test_nothing_is_overwritten_unasked(tmp_path):
    write_bundle(tmp_path / "b")
    with pytest.raises(UserError, match="--overwrite"), staged(tmp_path / "b"):
        pass
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "photo").touch()
    with pytest.raises(UserError, match=r"home has no bundle\.json"), staged(tmp_path / "home", overwrite=True):
        pass
    with staged(tmp_path / "b", overwrite=True) as temporary:
        (temporary / "new").touch()
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["new"]


def test_a_bundle_is_not_overwritten_by_the_other_kind(tmp_path):
    write_bundle(tmp_path / "onnx")
    refuse_existing(tmp_path / "onnx", "graphs", overwrite=True)
    with pytest.raises(UserError, match=r"onnx holds graphs \| expected engines, or a new folder"):
        refuse_existing(tmp_path / "onnx", "engines", overwrite=True)
    (tmp_path / "onnx" / "bundle.json").write_text("{")  # a damaged one may be replaced
    refuse_existing(tmp_path / "onnx", "engines", overwrite=True)


def test_an_edited_manifest_is_refused(tmp_path):
    write_bundle(tmp_path / "b")
    path = tmp_path / "b" / MANIFEST
    path.write_text(path.read_text().replace('"fp32"', '"fp16"', 1))
    with pytest.raises(UserError, match=r"bundle\.json was edited"):
        open_bundle(tmp_path / "b", "graphs")


def test_a_manifest_that_may_not_be_read_is_not_taken_for_none(tmp_path, monkeypatch):
    write_bundle(tmp_path / "b")

    def denied(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(PermissionError):
        open_bundle(tmp_path / "b", "graphs")
    with pytest.raises(PermissionError):
        bundle.kind_of(tmp_path / "b")


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_bundle(tmp_path / "b")

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(bundle, "sha256_of", denied)
    with pytest.raises(UserError, match=r"b/.*: Permission denied \| expected a file that can be read"):
        open_bundle(tmp_path / "b", "graphs")


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{", b"\xff", b'{"kind": "\xf6"}', b"[" * 100_000])
def test_what_is_no_manifest_is_told_as_such(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=r"bundle\.json: "):
        open_bundle(tmp_path, "graphs")
    with pytest.raises(UserError, match="is not a bundle"):
        kind_of(tmp_path)


BUILD = Build("rtx4090", "tensorrt-rtx", "1.7.1", "8.9", ({"frames": (5, 5, 9)},), {"topology": "whole"}, 1.0)


@pytest.mark.parametrize(
    ("written", "edited"),
    [
        (b'"rtx4090"', b'"rtx5090"'),
        (b'"tensorrt-rtx"', b'"tensorrt"'),
        (b'"1.7.1"', b'"1.8.0"'),
        (b'"8.9"', b'"12.0"'),
        (b'"fp32"', b'"fp8"'),
        (b"5, 5, 9", b"5, 5, 81"),
        (b'"whole"', b'"blocks"'),
    ],
    ids=["target", "backend", "version", "compute capability", "precision", "profile", "option"],
)
def test_whatever_is_edited_of_what_engines_are_for_is_refused(tmp_path, written, edited):
    """The manifest's hash covers every field; which one it was the hash cannot tell."""
    write_bundle(tmp_path / "b", kind="engines", build=BUILD)
    path = tmp_path / "b" / MANIFEST
    content = path.read_bytes()
    changed = re.sub(rb"\s+".join(map(re.escape, written.split())), edited, content)
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(
        UserError, match=r"edited: sha256 \w+… \| expected \w+… as recorded in it \| run wan-trt build again"
    ):
        open_bundle(tmp_path / "b", "engines")


def test_engines_of_releases_with_external_weights_are_refused_with_the_command_that_builds_them(tmp_path):
    build = replace(BUILD, options={"weights": "external"})
    command = "wan-trt build onnx engines --target rtx4090 --weights external"
    write_bundle(tmp_path / "b", kind="engines", build=build, command=command)
    remedy = r"export and build again: wan-trt build onnx engines --target rtx4090 --overwrite"
    with pytest.raises(UserError, match=rf"external weights \| expected engines in blocks \| {remedy}"):
        open_bundle(tmp_path / "b", "engines")
