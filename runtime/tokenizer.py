"""Clean and tokenise a prompt like the official code (wan22.md §3).

The ``tokenizers`` library reads the vocabulary from the checkpoint's ``tokenizer.json``, without transformers or
sentencepiece. Ids are not padded: the text encoder takes any length up to 512.
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
    ids: NDArray[np.int64]  # [1, n], n at most 512; the last id is the end of sequence
    truncated: bool  # the prompt had too many tokens


def clean(prompt: str) -> str:
    """Repair broken Unicode, unescape HTML twice, and collapse whitespace to single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split())


class Tokenizer:
    """The tokenizer of a checkpoint or a bundle.

    Args:
        folder: contains ``tokenizer.json``.

    Raises:
        UserError: the file is missing, not a tokenizer, or has no end of sequence.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / VOCABULARY
        self._tokenizer = _load(path)
        end = self._tokenizer.token_to_id(END)
        if end is None:
            raise UserError(f"{path} has no token {END}", "the tokenizer of umt5", "download the checkpoint again")
        self._end: int = end

    def encode(self, prompt: str, *, allow_empty: bool = False) -> TokenIds:
        """The token ids of the cleaned prompt, at most 511, and the end of sequence.

        Raises:
            UserError: the cleaned prompt is empty, unless ``allow_empty`` (for negative prompts).
        """
        ids = self._tokenizer.encode(clean(prompt), add_special_tokens=False).ids
        if not ids and not allow_empty:
            raise UserError(f"prompt {prompt!r}", "some text", "describe the video")
        kept = [*ids[: TEXT_TOKENS - 1], self._end]
        return TokenIds(np.array([kept], np.int64), truncated=len(ids) >= TEXT_TOKENS)


def _load(path: Path) -> tokenizers.Tokenizer:
    if (path.parent / "spiece.model").is_file() and not path.is_file():
        found = f"{path.parent} has spiece.model but no {VOCABULARY}"
        remedy = "copy it from google/umt5-xxl, or create it with transformers.AutoTokenizer and save_pretrained"
        raise UserError(found, f"{VOCABULARY} in the same folder", remedy)
    if not path.is_file():
        raise UserError(f"{path} is missing", "the checkpoint's tokenizer", "give the folder that contains it")
    try:
        with panics_as_errors():
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{path}: {error}", "the tokenizer.json of umt5", "download the checkpoint again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
