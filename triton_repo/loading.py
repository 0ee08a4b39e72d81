"""Prepare a served model: check the bundle, open the engines, run them once.

A plan is code. It is loaded only if the manifest is the one that the repository was made for and every file has the
hash in the manifest.
"""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

from PIL import Image

from runtime.arrays import require_finite
from runtime.backend import NewEngine
from runtime.block_backend import check_options
from runtime.request import Request
from triton_repo.served_pipeline import ServedPipeline
from triton_repo.settings import Settings
from wan22.bundle import MANIFEST, Bundle, Manifest, open_bundle, sha256_of
from wan22.errors import UserError
from wan22.parallel import ONE_DEVICE
from wan22.residency import Video

WARM_UP_PROMPT = "warm up"


def load(settings: Settings, new_engine: NewEngine | None = None) -> ServedPipeline:
    """A pipeline of the engines in ``settings``, or of engines that ``new_engine`` makes from its components.

    Raises:
        UserError: the bundle is not the pinned one, or differs from its manifest.
        NonFiniteError: the engines compute NaN.
    """
    bundle = trusted_bundle(settings)
    sets = {name: trusted_bundle(_of_set(settings, *pinned)) for name, pinned in settings.weight_sets().items()}
    devices = ONE_DEVICE if new_engine else check_options(bundle, settings.blocks)
    # with an expert on each device, the engines of one job must not make room for those of the other
    residency = "all" if devices.split.experts > 1 else settings.residency
    pipeline = ServedPipeline(
        bundle, residency=residency, new_engine=new_engine, weight_sets=sets, blocks=settings.blocks
    )
    if settings.warm_up:
        warm_up(pipeline)
    return pipeline


def _of_set(settings: Settings, folder: str, sha256: str) -> Settings:
    return replace(settings, engines=folder, bundle_sha256=sha256)


def trusted_bundle(settings: Settings) -> Bundle:
    """The engine bundle at ``settings.engines``, if it is unchanged since the repository was made."""
    folder = Path(settings.engines)
    again = "run wan-trt triton again for these engines"
    if (folder / MANIFEST).is_file() and (found := sha256_of(folder / MANIFEST)) != settings.bundle_sha256:
        raise UserError(f"{folder / MANIFEST}: sha256 {found[:12]}…", f"{settings.bundle_sha256[:12]}…", again)
    bundle = open_bundle(folder, "engines", full_check=settings.full_check)
    if bundle.manifest.spec.name != settings.model:
        raise UserError(f"{folder} contains {bundle.manifest.spec.name}", settings.model, again)
    return bundle


def warm_up(pipeline: ServedPipeline) -> None:
    """Open every engine and make the smallest video in which each of them runs.

    The high-noise expert runs the first of two steps, the low-noise expert the second.

    Raises:
        NonFiniteError: they compute NaN or infinity.
    """
    for component in pipeline.bundle.manifest.components:
        pipeline.load(component.name)
    spec = pipeline.spec
    width, height, frames = smallest_video(pipeline.bundle.manifest)
    grey = BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(grey, "PNG")
    image = grey.getvalue() if spec.takes.image != "no" else None
    request = Request(WARM_UP_PROMPT, size=(width, height), frames=frames, image=image)
    switch = 1 if len(spec.experts) > 1 else None
    two_steps = replace(pipeline.complete(request), solver="unipc", steps=2, sigmas=(), switch_step=switch)
    *_, step = pipeline.denoise(two_steps)
    for shown in pipeline.decode(step.latents):
        require_finite(shown, "decoded frames")


def smallest_video(manifest: Manifest) -> Video:
    """The width, height and frames of the smallest supported video, with two latent frames if possible."""
    if manifest.size is not None:
        return manifest.size
    spec, profiles = manifest.spec, manifest.build.profiles if manifest.build else ()
    profile = profiles[0] if profiles else {}
    stride, least = spec.vae.spatial_stride, spec.size_multiple
    width, height = (max(least, stride * profile.get(name, (0,))[0]) for name in ("width", "height"))
    latent_frames = max(profile.get("frames", (0,))[0], min(2, profile.get("frames", (0, 0, 2))[2]))
    return width, height, spec.vae.temporal_stride * (latent_frames - 1) + 1
