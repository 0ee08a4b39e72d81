"""The tokenizer of a checkpoint: the folder with ``tokenizer.json``, or one converted from SentencePiece's model.

ComfyUI's text encoders store that model as a tensor, slow tokenizers as ``spiece.model``. Its pieces, scores and
compiled normalisation suffice for a Unigram tokenizer of ``tokenizers``. GGUF files store them one by one. Without the
normalisation, full-width punctuation, which Chinese prompts contain, would get other ids, so such a file is refused.
"""

import atexit
import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

from export.files.gguf_reader import read_gguf
from export.files.tensor_file import Stored
from export.files.weights_files import SUFFIXES, read_weights, refuse_stand_in
from wan22.errors import UserError, panics_as_errors
from wan22.files import scratch_folder
from wan22.inputs import check_regular

VOCABULARY, MODEL = "tokenizer.json", "spiece.model"
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
NORMAL, UNUSED = 1, 5  # types of pieces
UNIGRAM = 1  # type of a model
GGUF_TOKENIZER = "tokenizer.ggml."
GGUF_PIECES, GGUF_CHARSMAP = f"{GGUF_TOKENIZER}tokens", f"{GGUF_TOKENIZER}precompiled_charsmap"
EXPECTED = "the tokenizer of umt5"
CONFIG = {
    "additional_special_tokens": [],
    "clean_up_tokenization_spaces": False,
    "extra_ids": 0,
    "legacy": False,
    "model_max_length": 512,
    "padding_side": "right",
    "tokenizer_class": "T5Tokenizer",
}
SPECIALS = {"eos_token": EOS, "pad_token": PAD, "unk_token": UNK}

Piece = tuple[str, float, int]  # text, score, type


def tokenizer_folder(place: Path | None, text_encoder: Path | None) -> Path:
    """A folder with ``tokenizer.json``: the one at ``place``, or a temporary one for this process.

    ``place`` is a folder or a ``spiece.model``; without either, the text encoder's file may contain the model.

    Raises:
        UserError: there is no tokenizer, or it is unreadable.
    """
    if place is not None and place.is_file():
        return _convert(place.read_bytes(), str(place))
    if place is not None and (place / VOCABULARY).is_file():
        _check(place / VOCABULARY)
        return place
    if place is not None and (place / MODEL).is_file():
        check_regular(place / MODEL)
        return _convert((place / MODEL).read_bytes(), str(place / MODEL))
    if text_encoder is not None and text_encoder.suffix in SUFFIXES and (held := _held(text_encoder)) is not None:
        return held
    if place is None:
        remedy = "name its folder, google/umt5-xxl of the official release, with --tokenizer DIR"
        raise UserError(f"{text_encoder} holds no tokenizer", EXPECTED, remedy)
    remedy = "download that folder again, or copy tokenizer.json from google/umt5-xxl"
    raise UserError(f"{place / VOCABULARY} is missing", EXPECTED, remedy)


def _held(text_encoder: Path) -> Path | None:
    """The tokenizer inside a text encoder's file."""
    found = read_weights(text_encoder)
    if GGUF_PIECES in found.metadata:
        return _from_gguf(text_encoder)
    models = [tensor for name, tensor in found.tensors.items() if name.endswith("spiece_model")]
    if not models or not isinstance(models[0], Stored):
        return None
    return _convert(models[0].read().tobytes(), f"{text_encoder}: spiece_model")


def _from_gguf(path: Path) -> Path:
    """The tokenizer of a GGUF file, whose pieces are padded with unused ones to the rows of the embedding."""
    metadata = read_gguf(path, GGUF_TOKENIZER)[1]
    kind, scores, types = (metadata.get(f"{GGUF_TOKENIZER}{key}") for key in ("model", "scores", "token_type"))
    tokens, charsmap = metadata[GGUF_PIECES], metadata.get(GGUF_CHARSMAP)
    remedy = "name the folder google/umt5-xxl of the official release with --tokenizer DIR"
    if kind != "t5" or charsmap is None:
        lack = f"of type {kind}" if kind != "t5" else "without its normalisation (precompiled_charsmap)"
        raise UserError(f"{path}: a tokenizer {lack}", EXPECTED, remedy)
    if scores is None or types is None or not len(tokens) == len(scores) == len(types):
        raise UserError(f"{path}: a tokenizer whose pieces have no scores or types", EXPECTED, remedy)
    pieces = [(str(t), float(s), int(kind)) for t, s, kind in zip(tokens, scores, types, strict=True)]
    while pieces and pieces[-1][2] == UNUSED:
        pieces.pop()
    try:
        with panics_as_errors():
            return _save(_unigram(pieces, bytes(charsmap)))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}", EXPECTED, remedy) from None


def _check(vocabulary: Path) -> None:
    import tokenizers

    refuse_stand_in(vocabulary)
    try:
        with panics_as_errors():
            tokenizers.Tokenizer.from_file(str(vocabulary))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{vocabulary}: {error}", EXPECTED, "download that folder again") from None


@lru_cache(maxsize=4)
def _convert(model: bytes, source: str) -> Path:
    try:
        with panics_as_errors():
            folder = _save(unigram(model))
    except (ValueError, TypeError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: {error}", "SentencePiece's model of umt5", "download it again") from None
    (folder / MODEL).write_bytes(model)
    return folder


def _save(tokenizer: Any) -> Path:
    """A temporary folder of this process with the files of ``tokenizer``."""
    stack = ExitStack()
    folder = stack.enter_context(scratch_folder("tokenizer"))
    atexit.register(stack.close)
    save_tokenizer(tokenizer, folder)
    return folder


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write ``tokenizer`` into ``folder``, with the settings of ``google/umt5-xxl``."""
    tokenizer.save(str(folder / VOCABULARY))
    for name, content in (("special_tokens_map.json", SPECIALS), ("tokenizer_config.json", SPECIALS | CONFIG)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def unigram(model: bytes) -> Any:
    """A ``tokenizers.Tokenizer`` for SentencePiece's ``model``, with T5's pipeline.

    Raises:
        ValueError: ``model`` is damaged, or not a Unigram model.
    """
    pieces, charsmap, kind = _parsed(model)
    if kind != UNIGRAM:
        raise ValueError("not a Unigram model")
    return _unigram(pieces, charsmap)


def _unigram(pieces: list[Piece], charsmap: bytes) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    names = [name for name, _, _ in pieces]
    if any(special not in names for special in (PAD, EOS, UNK)):
        raise ValueError("no Unigram model with the pieces of T5")
    try:
        tokenizer = Tokenizer(models.Unigram([(name, score) for name, score, _ in pieces], unk_id=names.index(UNK)))
        if charsmap:
            tokenizer.normalizer = normalizers.Precompiled(charsmap)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(str(error)) from None
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens([PAD, EOS, UNK])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, names.index(EOS))]
    )
    return tokenizer


def _parsed(model: bytes) -> tuple[list[Piece], bytes, int]:
    """The pieces with score and type, the compiled normalisation, and the model's type (1: Unigram).

    The fields are those of sentencepiece_model.proto: pieces (1: piece, score, type), trainer (2; its field 3 is the
    type), normaliser (3; its field 2 is the compiled table).
    """
    import struct

    pieces, charsmap, kind = [], b"", 1
    for number, value in _fields(model):
        if number == 1 and isinstance(value, bytes):
            entry = dict(_fields(value))
            text, score = entry.get(1, b""), entry.get(2, bytes(4))
            if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4:
                raise ValueError("a piece without text and score")
            pieces.append((text.decode(), float(struct.unpack("<f", score)[0]), int(entry.get(3, NORMAL))))
        elif number == 2 and isinstance(value, bytes):
            kind = int(dict(_fields(value)).get(3, 1))
        elif number == 3 and isinstance(value, bytes):
            found = dict(_fields(value)).get(2, b"")
            charsmap = found if isinstance(found, bytes) else b""
    return pieces, charsmap, kind


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The number and content of every field of a protocol buffer: numbers, or the bytes of anything else."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(message, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _varint(message, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"field of wire type {wire}")
        if place + length > len(message):
            raise ValueError("it ends within a field")
        yield number, message[place : place + length]
        place += length


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128 or shift > 63:
            return value, place
