"""Check engines against the machine and the manifest, and find the videos that they support."""

from runtime.request import CompleteRequest, Request
from wan22.bundle import Build, Bundle, Manifest
from wan22.component import Component
from wan22.errors import UserError
from wan22.quantities import video_text
from wan22.residency import Video
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
    compiled = (part for component in bundle.manifest.components for part in component.compiled())
    names = {part: read_name(bundle.path(part.graph)) for part in compiled}
    for component, name in names.items():
        check_plan(name, bundle.manifest, component)
    return tuple(dict.fromkeys(component.graph.path for component, name in names.items() if not name))


# -- videos


def default_video(manifest: Manifest) -> Video:
    """Width, height and frames of a request without a size: the model's default if the bundle supports it.

    Otherwise the fixed size of the graphs, or the size that the engines' first profile is tuned for.
    """
    spec = manifest.spec
    usual = (*spec.sampling.sizes[0], spec.sampling.frames)
    if manifest.size is not None:
        return manifest.size
    ranges = video_ranges(manifest)
    if not ranges or any(_holds(small, large, usual) for small, _, large in ranges):
        return usual
    return ranges[0][1]


def fill_defaults(request: Request, manifest: Manifest) -> CompleteRequest:
    """``request`` with missing values filled in from the bundle of ``manifest`` and its model.

    Raises:
        UserError: see :meth:`runtime.request.Request.completed`; or the bundle does not support the video.
    """
    complete = request.completed(manifest.spec, default_video(manifest))
    shaped_by_image = complete.image is not None and complete.fit == "official"
    hint = "; with an image, --fit crop makes exactly that size" if shaped_by_image else ""
    check_video(manifest, complete.video, hint)
    return complete


def check_video(manifest: Manifest, video: Video, hint: str = "") -> None:
    """Refuse a video that the bundle does not support; ``hint`` is appended to the remedy.

    Raises:
        UserError: states the video and the supported ones in pixels and frames, and the remedy.
    """
    found = video_text(*video)
    if manifest.size is not None and manifest.size != video:
        fixed = f"{video_text(*manifest.size)}, which the engines were built for"
        raise UserError(f"a video of {found}", fixed, f"leave --size and --frames out{hint}")
    ranges = video_ranges(manifest)
    if not ranges or any(_holds(small, large, video) for small, _, large in ranges):
        return
    made = " or ".join(dict.fromkeys(_in_words(small, large) for small, _, large in ranges))
    remedy = "choose such a --size and --frames, or build with ones that cover it"
    raise UserError(f"a video of {found} is outside the engines' shapes", made, f"{remedy}{hint}")


def video_ranges(manifest: Manifest) -> list[tuple[Video, Video, Video]]:
    """The smallest, the best and the largest video of every profile; empty if any shape is supported."""
    space, time = manifest.spec.vae.spatial_stride, manifest.spec.vae.temporal_stride
    ranges = []
    for profile in manifest.build.profiles if manifest.build else ():
        sizes = zip(profile["width"], profile["height"], profile["frames"], strict=True)
        small, best, large = ((space * width, space * height, time * (count - 1) + 1) for width, height, count in sizes)
        ranges.append((small, best, large))
    return ranges


def _holds(small: Video, large: Video, video: Video) -> bool:
    return all(low <= side <= high for low, side, high in zip(small, video, large, strict=True))


def _in_words(small: Video, large: Video) -> str:
    if small == large:
        return video_text(*small)
    names = ("width", "height", "frames")
    sides = zip(names, small, large, strict=True)
    return ", ".join(f"{name} {low}" if low == high else f"{name} {low} to {high}" for name, low, high in sides)
