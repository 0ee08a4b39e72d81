"""A prompt rewritten by a language model, at any endpoint that speaks OpenAI's chat completions.

Off unless asked for: prompt and image leave the machine. The rewritten text is judged before it is used. Whatever goes
wrong, the user's own prompt stands, and the caller learns why.
"""

import base64
import contextlib
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, Literal
from urllib.parse import urlsplit

from PIL import Image

from runtime.image import open_image
from runtime.request import Request
from wan22.errors import UserError, shortened
from wan22.looks import GROUPS

Language = Literal["same", "en", "zh"]
CONNECT_S, TOTAL_S = 3.0, 30.0
MOST_CHARACTERS, MOST_ANSWER_BYTES, IMAGE_MOST_PIXELS = 2000, 2**20, 512 * 512
KEY_VARIABLE = "WAN_TRT_EXTEND_KEY"
LANGUAGES = {"same": "the language of the prompt", "en": "English", "zh": "Chinese"}
THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)
FENCE = re.compile(r"^```[^\n]*\n(.*?)\n?```$", re.DOTALL)
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # of a terminal, and of the writing direction
QUOTES = {'"': '"', "'": "'", "“": "”", "「": "」"}

TEXT_INSTRUCTIONS = """\
You write prompts for a text-to-video model. Rewrite the user's prompt as one paragraph of 60 to 150 words in
{language}. Keep its subject, its action and every detail that it states; add no person, animal, object or text of
your own. Say what the subject and the scene look like and how things move; if nothing moves, add a slight motion.
Name only what a camera sees: no moods, no metaphors. Begin with at most four of these labels, in English, comma-
separated, if the prompt does not contradict them: {labels}. A style that the prompt names comes first; with a
drawn or animated style leave the labels out. Keep a camera movement of the prompt and give no camera angle then.
If you cannot write it, repeat the prompt as it is. Answer with the prompt alone: no quotes, no preface, no
explanation."""
IMAGE_INSTRUCTIONS = """\
You write prompts for an image-to-video model, which has the image already. Write one paragraph of at most 80 words
in {language} that says how the subjects of the image move, as the user's prompt asks, and how the camera moves if
the prompt says so. Do not describe looks, light or framing, and add nothing that is not in the image or the
prompt. If you cannot write it, repeat the prompt as it is. Answer with the prompt alone: no quotes, no preface."""
SHORTER = "That is too long. Write the same in half of the words. Answer with the prompt alone."


@dataclass(frozen=True)
class Endpoint:
    """A chat endpoint. ``url`` is its base, as http://localhost:11434/v1; ``key`` is sent there and shown nowhere."""

    url: str
    model: str = "default"
    language: Language = "same"
    key: str = ""
    connect_s: float = CONNECT_S
    total_s: float = TOTAL_S

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and not parts.username and parts.port != 0
        except ValueError:
            usable = False
        if not usable or parts.query or parts.fragment or not self.url.isprintable() or " " in self.url:
            expected = "a base URL such as http://localhost:11434/v1, without a key in it"
            remedy = f"begin it with http:// or https://; a key belongs into {KEY_VARIABLE}"
            raise UserError(f"--extend {shortened(self.url)!r}", expected, remedy)
        if "\n" in self.key or "\r" in self.key or not self.key.isascii():
            raise UserError(f"{KEY_VARIABLE} with a line break or other than ASCII", "one key", "set it again")

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""


class NotExtendedError(Exception):
    """The endpoint gave no usable prompt; the text says why."""


def extended(request: Request, endpoint: Endpoint, fits: Callable[[str], bool]) -> Request:
    """``request`` with the prompt that ``endpoint`` writes; its own prompt and the model are kept for the metadata.

    Args:
        request: with a prompt.
        endpoint: who rewrites.
        fits: whether a prompt has at most as many tokens as the text encoder takes.

    Raises:
        NotExtendedError: no answer in time, or none that can be used. The request then stands as it is.
        UserError: the image cannot be opened.
    """
    prompt = request.prompt or ""
    instructions = TEXT_INSTRUCTIONS if request.image is None else IMAGE_INSTRUCTIONS
    labels = ", ".join(term for name in ("time", "light source", "light angle", "tone", "shot", "angle", "composition")
                       for term in GROUPS[name].terms)  # fmt: skip
    content: Any = prompt
    if request.image is not None:
        image = {"type": "image_url", "image_url": {"url": _data_url(open_image(request.image))}}
        content = [image, {"type": "text", "text": prompt}]
    messages = [
        {"role": "system", "content": instructions.format(language=LANGUAGES[endpoint.language], labels=labels)},
        {"role": "user", "content": content},
    ]
    until = time.monotonic() + endpoint.total_s
    answer = _clean(_ask(endpoint, messages, request.seed, until))
    if len(answer) > MOST_CHARACTERS or not fits(answer):
        more = [{"role": "assistant", "content": answer[:MOST_CHARACTERS]}, {"role": "user", "content": SHORTER}]
        answer = _clean(_ask(endpoint, messages + more, request.seed, until))
        if len(answer) > MOST_CHARACTERS or not fits(answer):
            raise NotExtendedError(f"an answer of {len(answer)} characters, asked twice")
    return replace(request, prompt=answer, written=prompt, extended_by=f"{endpoint.model} at {endpoint.host}")


def _data_url(image: Image.Image) -> str:
    image = image.convert("RGB")
    scale = min(1.0, (IMAGE_MOST_PIXELS / (image.width * image.height)) ** 0.5)
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    encoded = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(encoded, "PNG")
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


def _ask(endpoint: Endpoint, messages: list[dict[str, Any]], seed: int, until: float) -> str:
    """The text of the first choice. Redirects are not followed."""
    body = json.dumps({
        "model": endpoint.model, "messages": messages, "temperature": 0.2, "seed": seed % 2**31, "max_tokens": 1024,
        "stream": False,
    })  # fmt: skip
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    parts = urlsplit(endpoint.url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=endpoint.connect_s)
    clock: threading.Timer | None = None
    try:
        connection.connect()
        sock = connection.sock
        sock.settimeout(_left(until))
        clock = threading.Timer(_left(until), _cut, [sock])  # a timeout of the socket begins anew with every byte
        clock.daemon = True
        clock.start()
        connection.request("POST", parts.path.rstrip("/") + "/chat/completions", body.encode(), headers)
        response = connection.getresponse()
        content = b""
        while chunk := response.read1(65536):
            content += chunk
            if len(content) > MOST_ANSWER_BYTES:
                raise NotExtendedError("an answer of more than 1 MiB")
            _left(until)
        if response.status != 200:
            raise NotExtendedError(f"status {response.status}")
        return _text(json.loads(content))
    except (OSError, HTTPException, ValueError, RecursionError) as error:
        if isinstance(error, TimeoutError) or time.monotonic() >= until:
            raise NotExtendedError(f"no answer within {endpoint.total_s:g} s") from None
        if isinstance(error, OSError):
            raise NotExtendedError(f"no connection: {error.strerror or error}") from None
        wrong = (
            "an answer against the rules of HTTP" if isinstance(error, HTTPException) else "an answer that is not JSON"
        )
        raise NotExtendedError(wrong) from None
    finally:
        if clock is not None:
            clock.cancel()
        connection.close()


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _left(until: float) -> float:
    if (left := until - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def _text(answer: Any) -> str:
    try:
        choice: Mapping[str, Any] = answer["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise NotExtendedError("an answer without choices[0].message.content") from None
    if choice.get("finish_reason") == "length":
        raise NotExtendedError("an answer cut at its length")
    if not isinstance(text, str):
        raise NotExtendedError(f"a content of type {type(text).__name__}")
    return text


def _clean(text: str) -> str:
    """The prompt in an answer: without thoughts, a code fence, quotes around it, or line breaks."""
    text = THOUGHTS.sub("", text).strip()
    if fenced := FENCE.match(text):
        text = fenced[1].strip()
    if len(text) > 1 and QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1]
    text = " ".join(text.split())
    if not text or "<think>" in text.lower():
        raise NotExtendedError("an empty answer" if not text else "thoughts without an end")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise NotExtendedError("an answer that is not UTF-8")
    if CONTROLS.search(text):
        raise NotExtendedError("an answer with control characters")
    return text
