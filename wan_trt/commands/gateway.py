"""``wan-trt gateway``: ``/v1/videos`` over HTTP, with a durable queue in front of Triton servers."""

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from wan22.errors import UserError
from wan22.inputs import secret_in
from wan22.quantities import parse_bytes
from wan_trt import arguments as given
from wan_trt import memory_options, prompt_options
from wan_trt.commands.serve import Loras, starting
from wan_trt.console import console

if TYPE_CHECKING:
    from gateway.order import Latents
    from runtime.extend import Endpoint
    from triton_repo.server import Server

Data = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the queue and the videos are.")]
DatabaseUrl = Annotated[
    str,
    typer.Option(
        metavar="URL",
        help="postgresql://..., or @FILE with that in it, to share the queue; by default SQLite in --data.",
    ),
]
DATA = Path("wan-trt-gateway")
LATENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


# options without defaults
KEPT = {
    "key_waiting": Annotated[int | None, typer.Option(help="Waiting jobs of one key.", min=1)],
    "key_running": Annotated[int | None, typer.Option(help="Running jobs of one key.", min=1)],
    "keep_hours": Annotated[float | None, typer.Option(help="How long a video is kept; by default for ever.", min=0)],
    "keep_videos": Annotated[int | None, typer.Option(help="Number of videos that are kept.", min=1)],
    "keep_size": Annotated[str | None, typer.Option(metavar="SIZE", help="Size of all kept videos, as 200GiB.")],
    "image_host": Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="Host whose images are fetched; repeat it for more.")
    ],
}
LATENT = "NAME=FILE"
REQUESTS = {
    "latent": Annotated[
        list[str] | None,
        typer.Option(
            metavar=LATENT,
            help="Initial latents (.pt, .npy, .npz) that requests may name, as the benchmark's; repeat it.",
        ),
    ],
    "extend": Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Let requests with prompt_extend have a language model rewrite their prompt: base URL of an "
            "OpenAI-compatible endpoint. Sends prompt and image there, with the key in WAN_TRT_EXTEND_KEY.",
        ),
    ],
    "extend_key": Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with its key, in place of the environment variable.")
    ],
    "extend_model": prompt_options.EXTENSION["extend_model"],
    "extend_language": prompt_options.EXTENSION["extend_language"],
    "tell_paths": Annotated[
        bool | None,
        typer.Option("--tell-paths", help="/v1/videos/generations answers with the file's path, as its scorer wants."),
    ],
}
ACCESS = {
    "require_keys": Annotated[
        bool | None, typer.Option("--require-keys", help="Refuse requests without a key even while there is no key.")
    ],
    "any_model": Annotated[
        bool | None, typer.Option("--any-model", help="Unknown names of models mean the default one.")
    ],
}
OWN_SERVER = {
    "lora": Loras,
    "checkpoint": Annotated[str | None, typer.Option(help="The checkpoint for --lora, if it has moved.")],
    "environment": Annotated[Path | None, typer.Option(help="Environment with the nvidia-pytriton wheel.")],
}


@given.with_options(KEPT, REQUESTS, ACCESS, OWN_SERVER, given.LIMITS, memory_options.OPTIONS)
def run(
    engines: Annotated[
        Path | None, typer.Argument(help="Engines to start a server of; or give --server.", show_default=False)
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:PORT",
            help="gRPC address of a running server; repeat it for more. dns:HOST:PORT: every address of HOST.",
        ),
    ] = None,
    name: given.ServedName = "wan22",
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8080,
    data: Data = DATA,
    database: DatabaseUrl = "",
    videos: Annotated[str, typer.Option(metavar="PLACE", help="Folder or s3://BUCKET; by default in --data.")] = "",
    queue_size: Annotated[int, typer.Option(help="Maximum number of waiting jobs.", min=1)] = 100,
    cancel_within: Annotated[float, typer.Option(help="Seconds that a DELETE waits for the server.", min=0)] = 5.0,
    finish_within: Annotated[float, typer.Option(help="Seconds that an end waits for running jobs.", min=0)] = 30.0,
    longest_job: given.LongestJob = 3600,
    residency: given.Residency = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the gateway and the server log.")] = False,
    **shared: Any,
) -> int:
    """Serve /v1/videos over HTTP, until Ctrl-C or SIGTERM.

    Jobs that wait are kept for the next start. wan-trt gateway key add, list and revoke manage keys;
    wan-trt gateway move takes them and the queue to PostgreSQL.
    """
    options = locals() | shared
    if (engines is None) == (not server):
        raise UserError("engines and --server" if server else "no engines and no --server", "one of them", "give one")
    if server:
        _refuse_unused(options)
    from gateway.gateway import Options
    from gateway.start import GatewayOptions, run_gateway
    from gateway.sweep import Keep

    logging.getLogger("gateway").setLevel(logging.INFO if verbose else logging.WARNING)
    hours, size = shared["keep_hours"], shared["keep_size"]
    kept_bytes = None if size is None else int(parse_bytes(size, "--keep-size"))
    keep = Keep(None if hours is None else hours * 3600, shared["keep_videos"], kept_bytes)
    http = Options(
        frozenset(shared["image_host"] or ()), bool(shared["any_model"]), cancel_within,
        _latents(shared["latent"] or ()), _endpoint(shared), bool(shared["tell_paths"]),
    )  # fmt: skip
    with ExitStack() as stack:
        trouble: Callable[[], str] = str
        urls = tuple(dict.fromkeys(map(_address, server or ())))
        if engines is not None:
            tritonserver = stack.enter_context(_own_server(engines, options))
            urls, trouble = (f"127.0.0.1:{tritonserver.options.grpc_port}",), _watched(tritonserver)
        reason = run_gateway(
            GatewayOptions(
                data, urls, name, address, port, database_url_of(database), videos, queue_size, shared["key_waiting"],
                shared["key_running"], keep, bool(shared["require_keys"]), finish_within, http=http,
            ),
            lambda: console.print(f"the gateway is ready: http://{address}:{port}"),
            trouble,
        )  # fmt: skip
    if reason:
        raise UserError(reason, "a server that runs until stopped", "start again; the queue is kept")
    return 0


def _refuse_unused(options: Mapping[str, Any]) -> None:
    """Refuse options of a server that the gateway does not start."""
    names = (*OWN_SERVER, *given.LIMITS, *memory_options.OPTIONS, "residency", "longest_job")
    usual = {"residency": "auto", "longest_job": 3600}
    if unused := [name for name in names if options[name] != usual.get(name)]:
        found = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise UserError(f"{found} with --server", "engines to start a server of", "give it to wan-trt serve instead")


def _latents(arguments: Sequence[str]) -> "Latents":
    """The operator's latents, read now: a file that is exchanged later changes nothing."""
    from gateway.order import Latents

    files: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not LATENT_NAME.fullmatch(name) or not path or name in files:
            raise UserError(f"--latent {argument!r}", f"{LATENT}, each name once", "write it as fixed=latent.pt")
        files[name] = Path(path)
    values = {name: latents.tobytes() for name, path in files.items() if (latents := given.noise_of(path)) is not None}
    return Latents(values, files)


def _endpoint(options: Mapping[str, Any]) -> "Endpoint | None":
    """The operator's language model; None without ``--extend``."""
    from runtime.extend import KEY_VARIABLE, Endpoint

    if options["extend"] is None:
        if names := [name for name in ("extend_key", "extend_model", "extend_language") if options[name]]:
            found = ", ".join(f"--{name.replace('_', '-')}" for name in names)
            raise UserError(f"{found} without --extend", "the endpoint beside it", "add --extend URL")
        return None
    key = os.environ.get(KEY_VARIABLE, "")
    if (path := options["extend_key"]) is not None:
        key = secret_in(path, "--extend-key")
    return Endpoint(options["extend"], options["extend_model"] or "default", options["extend_language"] or "same", key)


def _address(server: str) -> str:
    from gateway.workers import BEHIND
    from triton_repo.client_errors import address_of

    return BEHIND * server.startswith(BEHIND) + address_of(server.removeprefix(BEHIND))


def database_url_of(given: str) -> str:
    """The URL, or what the file after @ contains, which other users of the machine need not see."""
    return secret_in(Path(given[1:]), "--database") if given.startswith("@") else given


@contextmanager
def _own_server(engines: Path, options: dict[str, Any]) -> "Iterator[Server]":
    """A ready server of ``engines`` on free ports of loopback."""
    from triton_repo.repository import RepositoryOptions
    from triton_repo.server import ServeOptions, free_ports

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    http_port, grpc_port, metrics_port = free_ports(3)
    ports = ServeOptions("127.0.0.1", http_port, grpc_port, metrics_port, quiet=not options["verbose"])
    limits = {key: options[key] for key in given.LIMITS} | {"longest_job_s": options["longest_job"]}
    blocks = memory_options.blocks_options(options)
    packing = RepositoryOptions(options["name"], "owner", limits, residency=options["residency"], blocks=blocks)
    loras = (options["lora"] or (), options["checkpoint"])
    with starting(engines, packing, ports, (options["environment"], None), loras) as server:
        server.wait_until_ready()
        yield server


def _watched(server: "Server") -> Callable[[], str]:
    """What to ask for the reason why ``server`` has ended; empty while it runs."""
    found: list[str] = []

    def watch() -> None:
        try:
            server.watch()
            found.append("the server has ended")
        except UserError as error:
            found.append(error.found)

    threading.Thread(target=watch, daemon=True).start()
    return lambda: found[0] if found else ""


def move(
    data: Data = DATA,
    database: Annotated[
        str, typer.Option(metavar="URL", help="An empty postgresql://... database, or @FILE with that in it.")
    ] = "",
) -> None:
    """Move the queue, the keys and the records of videos from SQLite in --data to PostgreSQL."""
    from gateway.move import move as move_records

    if not database:
        raise UserError("no --database", "the address of an empty PostgreSQL", "give one")
    console.print(f"{move_records(data, database_url_of(database))} records moved; start with --database from now on")


# -- keys


def add(
    name: Annotated[str, typer.Argument(help="Whose key it is.", show_default=False)],
    data: Data = DATA,
    database: DatabaseUrl = "",
    waiting: Annotated[int | None, typer.Option(help="Waiting jobs; by default the gateway's.", min=1)] = None,
    running: Annotated[int | None, typer.Option(help="Running jobs; by default the gateway's.", min=1)] = None,
    priority: Annotated[
        int, typer.Option(help="The best priority that it may ask for; 1 goes first.", min=1, max=2)
    ] = 1,
) -> None:
    """Make a key and print it, which is possible only now: it is stored as a hash."""
    from gateway.keys import KeyLimits

    print(_keys(data, database).add(name, KeyLimits(waiting, running, priority)))


def list_keys(data: Data = DATA, database: DatabaseUrl = "") -> None:
    """List the keys."""
    shown = Table("name", "id", "made", "state", "waiting", "running", "priority")
    for row in _keys(data, database, exist=True).list():
        made = time.strftime("%Y-%m-%d", time.gmtime(row["created_at"]))
        most = ("" if row[limit] is None else str(row[limit]) for limit in ("most_waiting", "most_running"))
        state = "revoked" if row["revoked_at"] else "valid"
        shown.add_row(row["name"], row["id"], made, state, *most, str(row["best_priority"]))
    console.print(shown)
    console.print("waiting, running: most jobs at a time, the gateway's own limit where empty; priority: the best")


def revoke(
    name: Annotated[str, typer.Argument(help="Name or id of the key.", show_default=False)],
    data: Data = DATA,
    database: DatabaseUrl = "",
) -> None:
    """End a key, whose jobs are kept."""
    _keys(data, database, exist=True).revoke(name)


def _keys(data: Path, database: str, *, exist: bool = False) -> Any:
    """The keys of a gateway, whose folder is made unless it has to ``exist``."""
    from gateway.database import SQLITE, Database
    from gateway.keys import Keys
    from gateway.start import database_url

    if exist and not database and not (data / SQLITE).is_file():
        raise UserError(f"--data {data} has no {SQLITE}", "the folder of a gateway", "name it, or --database")

    return Keys(Database(database_url(data, database_url_of(database))))
