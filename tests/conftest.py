"""Tiny models go through the whole flow once per session; tests of every room look at their folders."""

import json
import shutil
import signal
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from wan22.bundle import file_entry, kind_of, open_bundle, write_manifest
from wan22.component import Component
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS

if TYPE_CHECKING:
    from triton_repo.installation import Installation

TINY = "t2v-a14b-tiny"


class Flow(NamedTuple):
    checkpoint: Path  # official layout
    bundle: Path  # fp32, dynamic shapes
    engines: Path  # target cpu


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """Tests press Ctrl-C; a shell's background job ignores it, and so would every process that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def flow_of(tmp_path_factory) -> Callable[[str], Flow]:
    """``flow_of(name)`` → the folders of a tiny model, made on first use."""

    @cache
    def made(name: str) -> Flow:
        from engines.build import build_engines
        from export.exporter import export_checkpoint
        from export.options import ExportOptions
        from export.synth.checkpoint import synthesise

        root = tmp_path_factory.mktemp(name)
        flow = Flow(root / "checkpoint", root / "onnx", root / "engines")
        synthesise(SPECS[name], flow.checkpoint, "official", seed=0)
        export_checkpoint(flow.checkpoint, flow.bundle, ExportOptions(Precision.FP32))
        build_engines(flow.bundle, flow.engines)
        return flow

    return made


@pytest.fixture(scope="session")
def blocks_of(flow_of, tmp_path_factory) -> Callable[[str], Path]:
    """``blocks_of(name)`` → engines of a tiny model in blocks, for the CPU."""

    @cache
    def build(name: str) -> Path:
        from engines.build import BuildOptions, build_engines

        folder = tmp_path_factory.mktemp(name) / "blocks"
        build_engines(flow_of(name).bundle, folder, BuildOptions(topology="blocks"))
        return folder

    return build


@pytest.fixture(scope="session")
def divisible(tmp_path_factory) -> Callable[[str, int], Path]:
    """``divisible(name, heads)`` → engines of a tiny model with so many heads, for devices that divide its tokens."""

    @cache
    def build(name: str, heads: int) -> Path:
        from engines.build import BuildOptions, build_engines
        from export.exporter import export_checkpoint
        from export.options import ExportOptions
        from export.synth.checkpoint import synthesise
        from wan22.parallel import group_sizes

        root, tiny = tmp_path_factory.mktemp(f"{name}-{heads}"), SPECS[name]
        spec = replace(tiny, dit=replace(tiny.dit, heads=heads, width=max(256, 16 * heads)))
        synthesise(spec, root / "checkpoint", "official", seed=0)
        export_checkpoint(root / "checkpoint", root / "onnx", ExportOptions(Precision.FP32))
        sizes = ",".join(f"ulysses{count}" for count in group_sizes(spec.dit))
        build_engines(root / "onnx", root / "engines", BuildOptions(topology="blocks", parallel=sizes))
        return root / "engines"

    return build


@pytest.fixture(scope="session")
def tiny_checkpoint(flow_of) -> Path:
    return flow_of(TINY).checkpoint


@pytest.fixture(scope="session")
def tiny_bundle(flow_of) -> Path:
    return flow_of(TINY).bundle


@pytest.fixture(scope="session")
def tiny_engines(flow_of) -> Path:
    return flow_of(TINY).engines


@pytest.fixture(scope="session")
def installation() -> "Installation":
    from triton_repo.installation import default_environments, find_installation

    try:
        return find_installation(default_environments())
    except UserError as error:
        pytest.skip(f"{error}")


@pytest.fixture(scope="session")
def gpu_blocks(tmp_path_factory, tiny_checkpoint) -> Path:
    """FP8 engines for a GPU, which are in blocks."""
    from engines.build import BuildOptions, build_engines
    from export.exporter import export_checkpoint
    from export.options import ExportOptions

    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    root = tmp_path_factory.mktemp("gpu")
    export_checkpoint(tiny_checkpoint, root / "b", ExportOptions(Precision.FP8))
    build_engines(root / "b", root / "e", BuildOptions("rtx4090", "256x160", "5..17"))
    return root / "e"


@pytest.fixture
def with_nan(tmp_path) -> Callable[[Path, str], Path]:
    """``with_nan(bundle, "vae_encoder")`` → a copy in which a norm of that component has a NaN as a weight."""

    def made(bundle: Path, component: str) -> Path:
        folder = tmp_path / f"nan-in-{component}"
        shutil.copytree(bundle, folder)
        manifest = open_bundle(folder, kind_of(folder)).manifest
        broken = {file.path for c in manifest.components if c.name.startswith(component) for file in c.weights}
        for path in broken:
            _overwrite_a_norm(folder / path)

        def signed(part: Component) -> Component:
            return replace(part, weights=tuple(file_entry(folder, folder / file.path) for file in part.weights))

        write_manifest(folder, replace(manifest, components=tuple(map(signed, manifest.components))))
        return folder

    return made


def _overwrite_a_norm(path: Path) -> None:
    """Sets the first number of the first norm in a safetensors file of float32 to NaN, in place."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        name = next(name for name in header if "norm" in name or "gamma" in name)
        assert header[name]["dtype"] == "F32"
        file.seek(8 + length + header[name]["data_offsets"][0])
        file.write(struct.pack("<f", float("nan")))
