"""Whether engines were built for this machine, and each for what the manifest says of it."""

from wan22.bundle import Build, Bundle, Component, Manifest
from wan22.errors import UserError
from wan22.shapes import own_profiles
from wan22.stamp import Stamp, check_stamp, name_in


def check_build(manifest: Manifest, version: str, compute_capability: str) -> Build:
    """The manifest's build record, if engines made so run with TensorRT ``version`` on this compute capability.

    Raises:
        UserError: names the field that differs, both values and the command that builds anew.
    """
    build = manifest.build
    if build is None:
        raise UserError("a bundle without engines", "one made by wan-trt build", "run wan-trt build")
    here = {"backend_version": version, "compute_capability": compute_capability}
    for field, value in here.items():
        if getattr(build, field) != value:
            found = f"{field} {getattr(build, field)} of the engines for {build.target}"
            raise UserError(found, f"{value} of this machine", f"build here: {manifest.command}")
    return build


def check_plan(name: str, manifest: Manifest, component: Component) -> None:
    """Refuses the plan of ``component``, whose network is called ``name``, where the manifest says something else.

    Raises:
        UserError: names the field (target, precision or profiles), both values and the command that builds anew.
    """
    if manifest.build is not None:
        profiles = own_profiles(manifest.build.profiles, component.inputs)
        claimed = Stamp(manifest.build.target, component.precision, profiles)
        check_stamp(component.graph.path, name, claimed, manifest.command)


def check_plans(bundle: Bundle) -> tuple[str, ...]:
    """:func:`check_plan` for every plan of ``bundle``, read from its file: no TensorRT, no GPU.

    Returns:
        The plans that could not be checked, since no name of ours stands in their files in clear.
    """
    build = bundle.manifest.build
    if build is None or not build.backend.startswith("tensorrt"):
        return ()
    names = {component: name_in(bundle.path(component.graph)) for component in bundle.manifest.components}
    for component, name in names.items():
        check_plan(name, bundle.manifest, component)
    return tuple(dict.fromkeys(component.graph.path for component, name in names.items() if not name))
