"""Check that engines were built for this machine and match their manifest."""

from wan22.bundle import Build, Bundle, Component, Manifest
from wan22.errors import UserError
from wan22.shapes import own_profiles
from wan22.stamp import Stamp, check_stamp, read_name


def check_build(manifest: Manifest, version: str, compute_capability: str) -> Build:
    """The manifest's build record, if its engines run with TensorRT ``version`` on this compute capability.

    Raises:
        UserError: they do not; names the differing field, both values and the command to rebuild.
    """
    build = manifest.build
    if build is None:
        raise UserError("a bundle without engines", "an engine bundle", "run wan-trt build")
    here = {"backend_version": version, "compute_capability": compute_capability}
    for field, value in here.items():
        if getattr(build, field) != value:
            found = f"engines for {build.target} have {field} {getattr(build, field)}"
            raise UserError(found, f"this machine's {value}", f"build here: {manifest.command}")
    return build


def check_plan(name: str, manifest: Manifest, component: Component) -> None:
    """Refuse the plan of ``component``, whose network is called ``name``, if it contradicts the manifest.

    Raises:
        UserError: names the field (target, precision or profiles), both values and the command to rebuild.
    """
    if manifest.build is not None:
        profiles = own_profiles(manifest.build.profiles, component.inputs)
        claimed = Stamp(manifest.build.target, component.precision, profiles)
        check_stamp(component.graph.path, name, claimed, manifest.command)


def check_plans(bundle: Bundle) -> tuple[str, ...]:
    """Run :func:`check_plan` for every plan of ``bundle``, reading only the files, without TensorRT or a GPU.

    Returns:
        The plans that could not be checked, because their files contain no readable stamp.
    """
    build = bundle.manifest.build
    if build is None or not build.backend.startswith("tensorrt"):
        return ()
    names = {component: read_name(bundle.path(component.graph)) for component in bundle.manifest.components}
    for component, name in names.items():
        check_plan(name, bundle.manifest, component)
    return tuple(dict.fromkeys(component.graph.path for component, name in names.items() if not name))
