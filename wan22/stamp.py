"""A stamp inside a compiled plan that records its build: the network's name, which TensorRT stores in the plan.

``wan-trt {"target":"rtx4090","precision":"fp8","profiles":[{"frames":[2,5,5],...}]}``. A manifest can be edited and
signed again, or end up next to a plan of another build; the stamp cannot.
"""

import json
import mmap
import re
from pathlib import Path

import msgspec

from wan22.errors import DAMAGED_JSON, UserError
from wan22.precision import Precision
from wan22.shapes import Profile

PREFIX = "wan-trt "
IN_CLEAR = re.compile(re.escape(PREFIX).encode() + rb"\{[ -~]*")


class Stamp(msgspec.Struct, frozen=True):
    target: str
    precision: Precision
    profiles: tuple[Profile, ...]  # restricted to the plan's inputs

    @property
    def name(self) -> str:
        """The name for the plan's network."""
        return PREFIX + msgspec.json.encode(self).decode()


def read_name(plan: Path) -> str:
    """The network's name in the file ``plan``, read without TensorRT; "" if it contains no stamp."""
    if not plan.stat().st_size:
        return ""
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = IN_CLEAR.search(content)
        text = found[0].decode() if found else ""
    try:
        return text[: json.JSONDecoder().raw_decode(text, len(PREFIX))[1]]  # the next bytes may also be printable
    except (ValueError, RecursionError):
        return text


def check_stamp(plan: str, name: str, claimed: Stamp, command: str) -> None:
    """Refuse a plan whose stamp differs from its manifest; plans without a stamp pass.

    Args:
        plan: the file's name, for the message.
        name: the network's name in the plan.
        claimed: the manifest's values.
        command: the command that built the bundle.

    Raises:
        UserError: names the differing field, both values and the command to rebuild.
    """
    if not name.startswith(PREFIX):
        return
    try:
        found = msgspec.json.decode(name.removeprefix(PREFIX), type=Stamp)
    except DAMAGED_JSON:
        stamped = f"{plan} has the stamp {name!r}"
        raise UserError(stamped, "a stamp of this version", f"run {command}") from None
    for field in Stamp.__struct_fields__:
        built, asked = getattr(found, field), getattr(claimed, field)
        if built != asked:
            raise UserError(f"{plan} was built for {field} {built}", f"{asked} as in the manifest", f"run {command}")
