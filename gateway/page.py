"""The page at ``/``: a form of what a model takes, made here, and a list of videos, which its script fills.

The script has the key, in the storage of its tab, and asks as every other client does; nothing here knows a session.
"""

import hashlib
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.api_error import ApiError, not_found
from gateway.fields import FIELDS
from gateway.gateway import Gateway
from gateway.served import ServedModel
from runtime.built_for import check_video, default_video, video_ranges
from wan22.errors import UserError
from wan22.looks import GROUPS, LOOKS
from wan22.sampling import PRESETS, presets_for

ASSETS = Path(__file__).parent / "assets"
TYPES = {"page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
# Nothing from elsewhere, nothing inline, no frame around it, and text becomes HTML at one place of the script.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types page"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}
# What "Again" does not take over: it is in the form, or follows from what is, or is for one job only.
NOT_CARRIED = {
    "prompt", "model", "seconds", "size", "num_frames", "negative_prompt", "seed", "preset", "input_reference",
    "last_image", "fit", "priority", "timeout_seconds", "preview",
}  # fmt: skip


def page_routes(gateway: Gateway) -> list[Route]:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = pages.get_template("page.html")
    contents = {name: (ASSETS / name).read_bytes() for name in TYPES}
    version = hashlib.sha256(b"".join(contents.values())).hexdigest()[:16]

    async def page(request: Request) -> Response:
        told: dict[str, Any] = {"version": version, "studio": None, "wants_key": False, "trouble": ""}
        status = 200
        try:
            await gateway.key(request)
            chosen = await gateway.model(request.query_params.get("model"))
            told["studio"] = studio(chosen, list(await gateway.models()))
            told["studio"]["extends"] = gateway.options.extend.host if gateway.options.extend else ""
        except ApiError as error:
            if "authorization" in request.headers:  # the script asks
                raise
            told["wants_key"] = error.status == 401
            if not told["wants_key"]:
                told["trouble"], status = error.message, error.status
        return Response(template.render(told), status, HEADERS, "text/html")

    async def asset(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in contents:
            raise not_found("file")
        headers = {"cache-control": "public, max-age=31536000, immutable", "x-content-type-options": "nosniff"}
        return Response(contents[name], headers=headers, media_type=TYPES[name])

    return [Route("/", page), Route("/page/{name}", asset)]


def studio(model: ServedModel, model_ids: list[str]) -> dict[str, Any]:
    """What the form of ``model`` is made of."""
    spec = model.manifest.spec
    width, height, frames = default_video(model.manifest)
    sizes = offered(model)
    only_movements = spec.takes.image == "required"
    return {
        "model": model.id,
        "models": model_ids,
        "image": spec.takes.image,
        "last_image": spec.takes.last_image,
        "sizes": sizes,
        "size": f"{width}x{height}",
        "lengths": {count: count / spec.sampling.fps for count in sorted({n for each in sizes.values() for n in each})},
        "frames": frames,
        "preset": spec.sampling.preset,
        "presets": {name: PRESETS[name].distilled for name in presets_for(spec.task)},
        "looks": {} if only_movements else LOOKS,
        "groups": {name: each.terms for name, each in GROUPS.items() if not only_movements or name == "movement"},
        "carried": [each.name for each in FIELDS if each.echoed and each.name not in NOT_CARRIED],
    }


def offered(model: ServedModel) -> dict[str, list[int]]:
    """Sizes that the engines make, the default one first: their numbers of frames.

    The sizes are the official ones and those that an engine is tuned for; more may be possible.
    """
    manifest, limits = model.manifest, model.limits
    stride = manifest.spec.vae.temporal_stride
    usual = default_video(manifest)
    best = [(width, height) for _, (width, height, _), _ in video_ranges(manifest)]
    made: dict[str, list[int]] = {}
    for width, height in (usual[:2], *best, *manifest.spec.sampling.sizes):
        if width * height > limits.max_pixels or f"{width}x{height}" in made:
            continue
        counts = [
            count
            for count in range(1, limits.max_frames + 1, stride)
            if (count > 1 or usual[2] == 1) and _makes(model, (width, height, count))
        ]
        if counts:
            made[f"{width}x{height}"] = counts
    return made


def _makes(model: ServedModel, video: tuple[int, int, int]) -> bool:
    try:
        check_video(model.manifest, video)
    except UserError:
        return False
    return True
