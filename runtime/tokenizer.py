"""From a prompt to token ids, as the official code cleans and tokenises it (wan22.md §3).

The vocabulary comes from the checkpoint's ``tokenizer.json``, read by the ``tokenizers`` library; neither transformers
nor sentencepiece is needed. Ids are not padded: the text encoder takes any length up to 512.
"""

import html
from dataclasses import dataclass
from pathlib import Path

import ftfy
import numpy as np
import tokenizers
from numpy.typing import NDArray

from wan22.errors import UserError, panics_as_errors
from wan22.specs import TEXT_TOKENS

VOCABULARY = "tokenizer.json"
END = "</s>"


@dataclass(frozen=True, eq=False)
class TokenIds:
    ids: NDArray[np.int64]  # [1, n], the last one the end of sequence, n at most 512
    truncated: bool  # the prompt had more tokens than fit


def clean(prompt: str) -> str:
    """Mends broken Unicode, undoes HTML escapes twice, and makes one space of every run of whitespace."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(mended.split())


class Tokenizer:
    """The tokenizer of a checkpoint or a bundle.

    Args:
        folder: holds ``tokenizer.json``.

    Raises:
        UserError: no such file, or not a tokenizer with an end of sequence.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / VOCABULARY
        self._tokenizer = _load(path)
        end = self._tokenizer.token_to_id(END)
        if end is None:
            raise UserError(f"{path} has no token {END}", "the tokenizer of umt5", "fetch the checkpoint again")
        self._end: int = end

    def encode(self, prompt: str, *, allow_empty: bool = False) -> TokenIds:
        """Token ids of the cleaned prompt, cut to 511, and the end of sequence.

        Raises:
            UserError: nothing is left of the prompt, unless ``allow_empty`` (a negative prompt: the end alone).
        """
        ids = self._tokenizer.encode(clean(prompt), add_special_tokens=False).ids
        if not ids and not allow_empty:
            raise UserError(f"prompt {prompt!r}", "some text", "describe the video")
        kept = [*ids[: TEXT_TOKENS - 1], self._end]
        return TokenIds(np.array([kept], np.int64), truncated=len(ids) >= TEXT_TOKENS)


def _load(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise _missing(path)
    try:
        with panics_as_errors():
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: {error}", "a tokenizer.json of umt5", "fetch the checkpoint again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _missing(path: Path) -> UserError:
    if (path.parent / "spiece.model").is_file():
        return UserError(
            f"{path.parent} has spiece.model but no {VOCABULARY}",
            f"{VOCABULARY} beside it",
            "copy it from google/umt5-xxl, or make it with transformers.AutoTokenizer and save_pretrained",
        )
    return UserError(f"{path} is missing", "the tokenizer of the checkpoint", "name the folder that holds it")
