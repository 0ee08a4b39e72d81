"""Options shared by several subcommands, and the parsers of their values."""

import inspect
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from typer.models import OptionInfo

from wan22.errors import UserError
from wan22.precision import Number, Precision
from wan22.shapes import parse_size
from wan_trt.cache_options import caching_from
from wan_trt.prompt_options import terms_from

if TYPE_CHECKING:
    from runtime.arrays import F32
    from runtime.request import Request

Command = TypeVar("Command", bound=Callable[..., Any])

Engines = Annotated[Path, typer.Argument(help="Engine bundle made by wan-trt build.", show_default=False)]
Prompt = Annotated[str, typer.Argument(help="Description of the video, in any language.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]
Size = Annotated[str | None, typer.Option("--size", metavar="WxH", help="Pixels, such as 832x480.")]
Frames = Annotated[int | None, typer.Option("--frames", help="Number of frames, a multiple of 4 plus 1.")]
SEED = typer.Option("--seed", metavar="INT", help="Seed of the noise, below 2**64; -1 draws and prints one.")
Seed = Annotated[int, SEED]
Noise = Annotated[
    Path | None, typer.Option("--noise", "--latents", help="Initial noise in .npz, .npy or .pt, instead of the seed's.")
]
NegativePrompt = Annotated[
    str | None, typer.Option(help="Text that the video should not match; by default the official one.")
]
Quality = Annotated[int | None, typer.Option(metavar="1...10", help="Of mp4 and webm; by default the official 8.")]
LowRank = Annotated[
    int,
    typer.Option(metavar="RANK", help="Rank of 16-bit branches beside NVFP4 matrices, as 32; by default none."),
]
PRECISIONS = f"{', '.join(list(Precision)[:-1])} or {list(Precision)[-1]}"
Image = Annotated[Path | None, typer.Option(help="JPEG, PNG or WebP to start from (I2V, TI2V).")]
LastImage = Annotated[Path | None, typer.Option(help="Image to end with (I2V).")]
Fit = Annotated[
    Literal["official", "crop"], typer.Option(help="Keep the image's aspect ratio, or crop it to exactly --size.")
]
ExactOfficial = Annotated[
    bool, typer.Option("--exact-official", help="Round sizes as the official code does, float errors included.")
]
Preset = Annotated[str | None, typer.Option(help="Named settings; wan-trt presets lists them.")]
Boundary = Annotated[
    float | None, typer.Option(help="Fraction of the timestep range below which the low-noise expert runs, as 0.875.")
]
Steps = Annotated[int | None, typer.Option(help="Number of denoising steps.")]
Shift = Annotated[float | None, typer.Option(help="Shift of the noise schedule; larger keeps the noise high longer.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale of all experts.")]
ExpertGuidance = Annotated[float | None, typer.Option(help="Guidance of this expert; 1 skips the unconditional pass.")]
Solver = Annotated[
    Literal["unipc", "dpm++", "euler", "renoise"] | None,
    typer.Option(metavar="NAME", help="unipc, dpm++, euler or renoise; by default the preset's."),
]
ReferenceDevice = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Device of PyTorch; auto means the GPU if the engines use it.")
]
Gate = Annotated[Path | None, typer.Option(help="TOML file of thresholds; a missed one sets exit code 1.")]
ListGates = Annotated[bool, typer.Option("--list-gates", help="Print the names that a gate can use, and exit.")]
Residency = Annotated[
    Literal["all", "one-expert", "one-component", "auto"],
    typer.Option(
        metavar="HOW", help="Engines that stay loaded: all, one-expert, one-component, auto (as many as fit)."
    ),
]
Schedule = Annotated[
    Literal["official", "diffusers"] | None,
    typer.Option(metavar="NAME", help="Timesteps of official or diffusers; by default the preset's."),
]

# for servers
ServedName = Annotated[str, typer.Option("--name", help="Name of the served model.")]
Topology = Annotated[
    Literal["owner", "bls"], typer.Option(help="owner: one model holds all engines; bls: one model per engine.")
]
GpuMemory = Annotated[float | None, typer.Option(help="GiB of GPU memory, for bls; by default the target's.", min=0)]
QueueSize = Annotated[int, typer.Option(help="Maximum number of waiting jobs per priority.", min=1)]
LongestJob = Annotated[int, typer.Option(help="Maximum seconds that a job runs and that a shutdown waits.", min=1)]
RequireSignature = Annotated[
    Path | None, typer.Option(help="Public Ed25519 key (PEM) that must have signed the engines.", metavar="KEY")
]

# options without defaults that several commands share, for :func:`with_options`
SAMPLING = {
    "negative_prompt": NegativePrompt, "preset": Preset, "boundary": Boundary, "steps": Steps, "shift": Shift,
    "guidance_high_noise": ExpertGuidance, "guidance_low_noise": ExpertGuidance, "guidance": Guidance, "solver": Solver,
}  # fmt: skip
SLOTS = {
    "loras": Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="FILE", help="LoRA, as export takes it, for engines with --lora-slots."),
    ]
}
LIMITS = {
    name: Annotated[int | None, typer.Option(help=f"Largest {what} of a request; by default {usual}.")]
    for name, what, usual in (
        ("max_pixels", "width times height in pixels", "the model's largest official size"),
        ("max_frames", "number of frames", "the model's"),
        ("max_steps", "number of denoising steps", "100"),
        ("max_prompt_bytes", "prompt in bytes of UTF-8", "16,384"),
        ("max_image_bytes", "image file in bytes", "33,554,432"),
    )
}

# headings of --help and their parameters; others are under "Options"
GROUPS = {
    "Video": ("size", "frames", "fps", "quality"),
    "Image": ("image", "last_image", "fit", "exact_official"),
    "Sampling": (
        "negative_prompt", "preset", "steps", "seed", "noise", "shift", "solver", "schedule", "boundary",
        "guidance", "guidance_high_noise", "guidance_low_noise",
    ),
    "Look": ("look", "style", "time", "light", "tone", "shot", "composition", "lens", "angle", "movement"),
    "Prompt": ("extend", "extend_model", "extend_language", "extend_required"),
    "Step cache": (
        "cache", "cache_threshold", "first_exact", "last_exact", "max_consecutive", "skip_steps", "reuse", "late_cfg",
    ),
    "Output": ("output", "overwrite", "verbose", "preview", "html", "as_json", "plot", "calls"),
    "Precision": (
        "precision", "text_encoder", "high_noise", "low_noise", "dit", "vae_decoder", "fp8_attention",
        "keep_high_precision", "input_scales", "input_means",
    ),
    "Memory": ("residency", "weights_in", "vram", "vae_strips"),
    "Devices": ("gpus", "parallel"),
    "LoRA": ("lora", "loras", "lora_ignore_unmatched", "checkpoint"),
    "Comparison": (
        "prompts", "seeds", "compare", "gate", "list_gates", "bench", "reference_device", "official", "official_repo",
    ),
    "Sweep": ("sweep", "values"),
    "Address": ("address", "http_port", "grpc_port", "metrics_port"),
    "Server limits": (
        "max_pixels", "max_frames", "max_steps", "max_prompt_bytes", "max_image_bytes", "queue_size", "longest_job",
        "max_silence",
    ),
    "Kubernetes": ("kubernetes", "max_pods", "prometheus"),
}  # fmt: skip

RANGE_AT_MOST = 1000


def with_options(*tables: Mapping[str, Any]) -> Callable[[Command], Command]:
    """Declare the options of ``tables`` for a command that takes them as ``**shared``."""
    options = {name: kind for table in tables for name, kind in table.items()}

    def declare(run: Command) -> Command:
        own = [p for p in inspect.signature(run).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        keyword = inspect.Parameter.KEYWORD_ONLY
        more = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in options.items()]
        run.__dict__["__signature__"] = inspect.Signature([*own, *more])
        del run.__annotations__["shared"]
        run.__annotations__.update(options)
        return run

    return declare


def with_groups(run: Callable[..., int | None]) -> Callable[..., int | None]:
    """Assign the options of ``run`` to the headings of :data:`GROUPS`, and return ``run``."""
    heading = {name: group for group, names in GROUPS.items() for name in names}
    for name, hint in run.__annotations__.items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                info.rich_help_panel = heading.get(name)
    return run


def size_of(text: str | None) -> tuple[int, int] | None:
    """Width and height in pixels; None without text."""
    return None if text is None else parse_size(text)


def kept_of(text: str | None) -> tuple[frozenset[int], dict[str, Number], bool, Number | None]:
    """The blocks, the linears and their types, whether by crest, and in what type, of ``--keep-high-precision``.

    ``"0-2,39,ffn.2=fp8,3.self_attn.o,auto"``: blocks 0, 1, 2 and 39 in 16 bits, the linear ``ffn.2`` of every block in
    FP8, one of block 3 in bfloat16, and by their crest the linears that INT8 does not suit.
    """
    blocks, linears, by_crest, number = [], dict[str, Number](), False, None
    for part in text.split(",") if text is not None else ():
        name, equals, typed = part.strip().partition("=")
        if equals and typed not in list(Number):
            raise UserError(f"--keep-high-precision {part}", "bf16, fp8 or int8 after =", "choose one of these")
        if name == "auto":
            by_crest, number = True, Number(typed) if typed else None
        elif (found := re.fullmatch(r"(?:(\d+)\.)?([a-z_]+\.\w+)", name)) is not None:
            linear = found[2] if found[1] is None else f"blocks.{int(found[1])}.{found[2]}"
            linears[linear] = Number(typed or Number.BF16)
        else:
            blocks.append(part)
    expected = "0-2,39, ffn.2=fp8 or auto"
    return frozenset(_numbers("blocks", ",".join(blocks), 999, expected) if blocks else ()), linears, by_crest, number


def seeds_of(text: str | None) -> tuple[int, ...]:
    """``"0,10-12"`` → (0, 10, 11, 12)."""
    return () if text is None else tuple(_numbers("seeds", text, 2**64 - 1, "0,1,10-12"))


def seed_of(typed: int | None) -> int:
    """The typed seed, by default 0; for -1 a random one, printed to stderr so that the run can be repeated.

    Raises:
        UserError: it is neither -1 nor a valid seed of torch.
    """
    if typed is None:
        return 0
    if not -1 <= typed < 2**64:
        raise UserError(f"seed {typed}", "0 to 2**64 - 1, or -1 to draw one", "choose another seed")
    if typed != -1:
        return typed
    drawn = secrets.randbelow(2**32)  # torch uses the low 32 bits
    typer.echo(f"seed {drawn}", err=True)
    return drawn


def noise_of(path: Path | None) -> "F32 | None":
    """The noise in the file ``path``; None without a file."""
    if path is None:
        return None
    from wan_trt.recipes.noise_file import read_noise

    return read_noise(path)


def _numbers(what: str, text: str, most: int, example: str) -> list[int]:
    """The numbers up to ``most`` in a list of numbers and ranges; ``what`` and ``example`` are for the error."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,20})(?:-(\d{1,20}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, most + 1)
        if last < first:
            raise UserError(f"{what} {text!r}", "ranges that go up", f"write {last}-{first}")
        if last > most or last - first >= RANGE_AT_MOST:
            expected = f"numbers up to {most} and ranges of at most {RANGE_AT_MOST}"
            raise UserError(f"{what} {text!r}", expected, f"write them as {example}")
        numbers.extend(range(first, last + 1))
    return numbers


def request_from(options: Mapping[str, Any]) -> "Request":
    """The request from a command's options, its ``locals()``; fields of :class:`Request` have the options' names."""
    from runtime.request import Request

    names = {field.name for field in fields(Request)} & options.keys() - {"seed", "noise", "cache"}
    by_expert = {name: options.get(f"guidance_{name}") for name in ("high_noise", "low_noise")}
    return Request(
        **{name: options[name] for name in names}
        | {
            "size": size_of(options["size"]),
            "seed": seed_of(options["seed"]),
            "noise": noise_of(options.get("noise")),
            "guidance": {name: scale for name, scale in by_expert.items() if scale is not None},
            "guidance_scale": options.get("guidance"),
            "cache": caching_from(options) if "cache" in options else None,
            "terms": terms_from(options),
        }
    )


def check_used(
    output: Path, quality: int | None, image: Path | None, fit: str, *, exact_official: bool = False
) -> None:
    """Refuse a quality for files that have none, and rules for an image without one."""
    from runtime.video import FILMS

    if quality is not None and output.suffix.lower() not in FILMS:
        raise UserError(f"--quality for {output}", f"a name ending in {' or '.join(FILMS)}", "leave --quality out")
    if image is None and (fit != "official" or exact_official):
        option = "--exact-official" if exact_official else f"--fit {fit}"
        raise UserError(f"{option} without --image", "an image to fit", f"leave {option} out")


def check_signed(engines: Path, key: Path | None) -> None:
    """Refuse engines that the owner of ``key`` did not sign; without a key accept all."""
    if key is not None:
        from runtime.signature import check_signature

        check_signature(engines, key)


def limits_of(options: Mapping[str, Any]) -> dict[str, int | None]:
    """The limits of requests, by the names of :class:`triton_repo.settings.Limits`; None means the model's."""
    queue = {"max_queue_size": options["queue_size"], "longest_job_s": options["longest_job"]}
    return {name: options[name] for name in LIMITS} | queue
