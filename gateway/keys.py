"""Bearer keys. A key is ``wan_ID_SECRET``; the database has the ID and the hash of the secret."""

import hashlib
import hmac
import math
import re
import secrets
import time
from dataclasses import dataclass

from sqlalchemy import RowMapping, func, insert, select, update

from gateway.api_error import ApiError
from gateway.database import Database, keys
from gateway.jobs import Key
from wan22.errors import UserError

BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)
FORM = re.compile(r"wan_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
NAME = re.compile(r"[\w .@-]{1,128}")
REMEMBERED_S = 1.0  # a revoked key works that long, a first key lets others in that long


@dataclass(frozen=True)
class KeyLimits:
    """Limits of one key; None means the gateway's."""

    most_waiting: int | None = None
    most_running: int | None = None
    best_priority: int = 1


class Keys:
    """Without any key in the database, requests need none, unless ``required``."""

    def __init__(self, database: Database, *, required: bool = False) -> None:
        self._database, self._required = database, required
        self._known: dict[str, RowMapping] = {}
        self._read_at = -math.inf

    @property
    def is_fresh(self) -> bool:
        """True while a check does not ask the database."""
        return time.monotonic() - self._read_at <= REMEMBERED_S

    def check(self, authorization: str | None) -> Key:
        """Who asks. Raises ApiError 401 without a valid key, if there are keys."""
        if not self.is_fresh:
            with self._database.read() as connection:
                self._known = {row["id"]: row for row in connection.execute(select(keys)).mappings()}
            self._read_at = time.monotonic()
        if not self._known and not self._required:
            return Key()
        bearer = BEARER.fullmatch((authorization or "").strip())
        match = FORM.fullmatch(bearer[1]) if bearer else None
        row = self._known.get(match[1]) if match else None
        given = _digest(match[2] if match else "")
        same = hmac.compare_digest(given, row["secret_sha256"] if row else _digest("none"))
        if row is None or not same or row["revoked_at"] is not None:
            code = "missing_api_key" if bearer is None else "invalid_api_key"
            raise ApiError(401, code, "no valid key | expected the header Authorization: Bearer KEY")
        return Key(row["id"], row["most_waiting"], row["best_priority"])

    def any(self) -> bool:
        with self._database.read() as connection:
            return bool(connection.execute(select(func.count()).select_from(keys)).scalar_one())

    def add(self, name: str, limits: KeyLimits) -> str:
        """A new key; it is not stored and cannot be shown again. Raises UserError for a name that is taken."""
        if not NAME.fullmatch(name):
            raise UserError(f"key name {name!r}", "letters, digits, spaces and . @ _ -", "choose another")
        key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        with self._database.write() as connection:
            valid = select(keys.c.id).where(keys.c.name == name, keys.c.revoked_at.is_(None))
            if connection.execute(valid).first() is not None:
                raise UserError(f"a key named {name}", "a new name", f"revoke it first, or choose another than {name}")
            row = {"id": key_id, "name": name, "secret_sha256": _digest(secret), "created_at": time.time()}
            more = {
                "most_waiting": limits.most_waiting,
                "most_running": limits.most_running,
                "best_priority": limits.best_priority,
            }
            connection.execute(insert(keys).values(row | more))
        return f"wan_{key_id}_{secret}"

    def list(self) -> list[RowMapping]:
        with self._database.read() as connection:
            return list(connection.execute(select(keys).order_by(keys.c.created_at)).mappings())

    def revoke(self, name: str) -> None:
        """Revoke the key with this name or ID. Raises UserError without one."""
        with self._database.write() as connection:
            valid = ((keys.c.name == name) | (keys.c.id == name)) & keys.c.revoked_at.is_(None)
            if not connection.execute(update(keys).where(valid).values(revoked_at=time.time())).rowcount:
                raise UserError(f"no valid key {name}", "a name of wan-trt gateway key list", "name one of them")


def _digest(secret: str) -> str:
    """A plain hash is enough: the secret is 256 random bits, not a password."""
    return hashlib.sha256(secret.encode()).hexdigest()
