"""Images of a request: an upload, a data URL, or an address of a host that the operator has listed.

An address is resolved once, every address that the name has must be public, and the connection goes to the checked
address: a name cannot change in between. Redirects are not followed.
"""

import base64
import binascii
import http.client
import ipaddress
import re
import socket
import ssl
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from gateway.api_error import ApiError, invalid

MAX_IMAGE_BYTES = 20 * 2**20
DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,", re.IGNORECASE)
FETCH_S = 20.0


def image_content(name: str, given: bytes | dict[str, Any], hosts: Collection[str]) -> bytes:
    """The encoded image of field ``name``; blocks while it is fetched.

    Raises:
        ApiError: it is too large, in another form, or from a host that is not listed.
    """
    if isinstance(given, dict):
        if "file_id" in given:
            raise invalid(f"{name}.file_id", f"{name}.file_id | expected an upload or image_url", "unsupported_value")
        if set(given) != {"image_url"} or not isinstance(given["image_url"], str):
            raise invalid(name, f"{name} | expected a file, or an object with image_url alone")
        given = _from_url(name, given["image_url"], hosts)
    if not given:
        raise invalid(name, f"{name} is empty | expected a PNG, JPEG or WebP image")
    if len(given) > MAX_IMAGE_BYTES:
        raise _too_large(name)
    return given


def _too_large(name: str) -> ApiError:
    return ApiError(413, "too_large", f"{name} | expected at most {MAX_IMAGE_BYTES} bytes", name)


def _from_url(name: str, url: str, hosts: Collection[str]) -> bytes:
    if match := DATA_URL.match(url):
        if len(url) > MAX_IMAGE_BYTES * 4 // 3 + 100:
            raise _too_large(name)
        try:
            return base64.b64decode(url[match.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise invalid(name, f"{name}.image_url | expected base64 after the comma") from None
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 443
    except ValueError:
        host, port, parts = "", 0, None
    if parts is None or parts.scheme != "https" or not host or parts.username is not None:
        raise invalid(name, f"{name}.image_url | expected a data URL of a PNG, JPEG or WebP image, or https")
    if host not in hosts or port != 443:
        raise invalid(name, f"{name}.image_url: host not allowed here | send the image itself", "host_not_allowed")
    path = parts.path or "/"
    return _fetch(name, host, f"{path}?{parts.query}" if parts.query else path)


def _fetch(name: str, host: str, path: str) -> bytes:
    failed = invalid(name, f"{name}.image_url | expected an image that the host gives without redirect", "fetch_failed")
    connection = _CheckedConnection(host, public_address(name, host))
    try:
        connection.request("GET", path, headers={"Accept": "image/png, image/jpeg, image/webp"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise failed
        content = answer.read(MAX_IMAGE_BYTES + 1)
    except (OSError, http.client.HTTPException, ValueError):
        raise failed from None
    finally:
        connection.close()
    return content


def public_address(name: str, host: str) -> str:
    """The first address of ``host``; ApiError if any of its addresses is not public."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise invalid(name, f"{name}.image_url: host not found", "fetch_failed") from None
    if not all(ipaddress.ip_address(address.partition("%")[0]).is_global for address in found):
        raise invalid(name, f"{name}.image_url: host not allowed here | send the image itself", "host_not_allowed")
    return min(found)


class _CheckedConnection(http.client.HTTPSConnection):
    """A connection to ``address`` whose certificate must be that of ``host``."""

    def __init__(self, host: str, address: str) -> None:
        self._tls = ssl.create_default_context()
        super().__init__(host, 443, timeout=FETCH_S, context=self._tls)
        self._address = address

    def connect(self) -> None:
        plain = socket.create_connection((self._address, 443), FETCH_S)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)
