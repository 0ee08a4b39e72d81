"""What a compiled plan says of itself: what it was built for, in its name, which TensorRT keeps inside the plan.

``wan-trt {"target":"rtx4090","precision":"fp8","profiles":[{"frames":[2,5,5],...}]}``. A manifest can be signed again
after it was edited, or lie beside a plan of another build; the plan cannot.
"""

import json
import mmap
import re
from pathlib import Path

import msgspec

from wan22.errors import UserError
from wan22.shapes import Profile
from wan22.specs import Precision

PREFIX = "wan-trt "
IN_CLEAR = re.compile(re.escape(PREFIX).encode() + rb"\{[ -~]*")


class Stamp(msgspec.Struct, frozen=True):
    target: str
    precision: Precision
    profiles: tuple[Profile, ...]  # of the plan's own inputs

    @property
    def name(self) -> str:
        """The name of the network that the plan is compiled from."""
        return PREFIX + msgspec.json.encode(self).decode()


def name_in(plan: Path) -> str:
    """The name of the network as it stands in the file ``plan``, read without TensorRT; "" where none of ours does."""
    if not plan.stat().st_size:
        return ""
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = IN_CLEAR.search(content)
        text = found[0].decode() if found else ""
    try:
        return text[: json.JSONDecoder().raw_decode(text, len(PREFIX))[1]]  # what follows may be readable by chance
    except ValueError:
        return text


def check_stamp(plan: str, name: str, claimed: Stamp, command: str) -> None:
    """Refuses a plan that was built for something else than its manifest claims; plans without a stamp pass.

    Args:
        plan: the file's name, for the message.
        name: the network's name in the plan.
        claimed: what the manifest says of it.
        command: what made the bundle.

    Raises:
        UserError: names the field that differs, both values and the command that builds anew.
    """
    if not name.startswith(PREFIX):
        return
    try:
        found = msgspec.json.decode(name.removeprefix(PREFIX), type=Stamp)
    except msgspec.DecodeError:
        raise UserError(f"{plan} is named {name!r}", "a name that this version writes", f"run {command}") from None
    for field in Stamp.__struct_fields__:
        built, asked = getattr(found, field), getattr(claimed, field)
        if built != asked:
            raise UserError(f"{plan} was built for {field} {built}", f"{asked} of the manifest", f"run {command}")
