import shutil
from dataclasses import replace

import pytest

from wan22.bundle import file_entry, open_bundle, write_manifest

PROFILES = (
    {"frames": (1, 5, 21), "height": (60, 60, 60), "width": (104, 104, 104), "tokens": (1, 64, 512)},
    {"frames": (1, 5, 21), "height": (90, 90, 90), "width": (160, 160, 160), "tokens": (1, 64, 512)},
)


@pytest.fixture
def compiled(tiny_engines, tmp_path):
    """Engines as they would be for an H100: plans of another content, a manifest of the same shape."""

    def made(**changes):
        folder = tmp_path / "engines"
        shutil.copytree(tiny_engines, folder)
        manifest = open_bundle(folder, "engines").manifest
        components = []
        for component in manifest.components:
            plan = folder / f"{component.name}.plan"
            plan.write_bytes(changes.get("plan_of", str)(component.name).encode())
            components.append(replace(component, graph=file_entry(folder, plan), weights=changes.get("weights", ())))
        build = replace(
            manifest.build,
            target="h100",
            backend=changes.get("backend", "tensorrt"),
            compute_capability="9.0",
            profiles=tuple(part | {"rows": (30, 30, 30), "columns": (52, 52, 52)} for part in PROFILES),
        )
        write_manifest(folder, replace(manifest, components=tuple(components), build=build))
        return folder

    return made
