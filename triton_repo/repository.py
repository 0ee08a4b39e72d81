"""Engine bundle → Triton model repository.

The repository contains configuration and three-line models. Engines, weights and tokenizer stay in their bundle, which
is pinned by the hash of its manifest, so that no file can be replaced.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from runtime.block_backend import BLOCKS_AS_FIT, BlockOptions, check_options
from runtime.built_for import check_plans
from triton_repo.bls_repository import check_backends, check_resident, write_bls
from triton_repo.config import as_text, owner_config
from triton_repo.settings import Limits, check_name, settings_of
from triton_repo.templates import place
from wan22.bundle import Bundle, open_bundle
from wan22.errors import UserError
from wan22.files import whole_folder
from wan22.onnx_file import check_graphs
from wan22.outputs import check_no_source
from wan22.parallel import Devices
from wan22.residency import ResidencyChoice

Topology = Literal["owner", "bls"]
MARK = ".made-by-wan-trt-triton"
VERSION = "1"


@dataclass(frozen=True)
class RepositoryOptions:
    name: str = "wan22"
    topology: Topology = "owner"
    limits: Mapping[str, int | None] = field(default_factory=dict)  # by name; the model's defaults otherwise
    engines_at: str = ""  # path of the engines on the serving machine, if it differs
    residency: ResidencyChoice = "auto"  # engines that stay loaded; bls keeps all
    drain_flag: str = ""  # while this file exists, the model reports that it is not ready
    memory_gib: float = 0.0  # GPU memory; 0 if unknown
    loras: Mapping[str, Path] = field(default_factory=dict)  # folders of weight sets by name
    overwrite: bool = False
    blocks: BlockOptions = BLOCKS_AS_FIT  # where the weights of engines in blocks are


@dataclass(frozen=True)
class Written:
    bundle: Bundle
    limits: Limits
    unread: tuple[str, ...] = ()  # plans without a readable build target
    devices: int = 1  # of one server


def check_devices(bundle: Bundle, options: RepositoryOptions, *, with_loras: bool) -> Devices:
    """The devices of ``options``, if the engines of ``bundle`` can be served on them so.

    Raises:
        UserError: they cannot.
    """
    devices = check_options(bundle, options.blocks)
    if options.topology == "bls" and (options.blocks.vae_strips is not None or devices.together):
        found = f"--{'parallel' if devices.together else 'vae-strips'} in topology bls"
        raise UserError(found, "whole engines on one device", "leave it out, or use --topology owner")
    if devices.split.experts > 1 and with_loras:
        remedy = "leave one of them out"
        raise UserError("--lora with --parallel experts", "jobs with the same weights, two at a time", remedy)
    return devices


def write_repository(engines: Path, folder: Path, options: RepositoryOptions | None = None) -> Written:
    """Write the repository ``folder`` for the engine bundle at ``engines``, after a full check.

    The stamps of the plans are checked too, since Triton's backends do not read the manifest. At every start the model
    that calls them checks the hashes, so the plans are the ones checked here.

    Raises:
        UserError: no bundle, a damaged one, a plan that was built for something else, an invalid name, an existing
            folder.
    """
    options = options or RepositoryOptions()
    check_name(options.name)
    bundle = open_bundle(engines, "engines", full_check=True)
    check_graphs(bundle)
    devices = check_devices(bundle, options, with_loras=bool(options.loras))
    unread = check_plans(bundle)
    if options.topology == "bls":
        if options.residency not in ("auto", "all"):
            found = f"--residency {options.residency} in topology bls, which keeps all engines loaded"
            raise UserError(found, "topology owner", "leave --residency out")
        if options.loras:
            found = "--lora in topology bls, whose backends hold the weights"
            raise UserError(found, "topology owner", "leave one of them out")
        check_backends(bundle)
        check_resident(bundle, options.memory_gib)
    limits = Limits.of(bundle.manifest.spec, **options.limits)
    check_no_source(folder, engines)
    with whole_folder(folder, MARK if options.overwrite else "") as temporary:
        (temporary / MARK).touch()
        settings = settings_of(
            bundle,
            limits,
            engines_at=options.engines_at,
            residency="all" if options.topology == "bls" else options.residency,
            drain_flag=options.drain_flag,
            loras=options.loras,
            blocks=options.blocks,
        )
        if options.topology == "owner":
            place("owner", temporary / options.name / VERSION)
            config = owner_config(options.name, settings, on_gpu=is_for_gpu(bundle), devices=devices.split.members)
            (temporary / options.name / "config.pbtxt").write_text(as_text(config))
        else:
            write_bls(temporary, options.name, bundle, settings)
    return Written(bundle, limits, unread, devices.split.members)


def is_for_gpu(bundle: Bundle) -> bool:
    build = bundle.manifest.build
    return build is not None and build.target != "cpu"
