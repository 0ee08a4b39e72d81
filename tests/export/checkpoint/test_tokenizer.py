"""The tokenizer inside a GGUF text encoder, as llama.cpp's converter writes it, gives the ids of SentencePiece."""

import gguf
import numpy as np
import pytest
import sentencepiece

from export.checkpoint.describe import describe
from export.checkpoint.tokenizer import tokenizer_folder
from export.synth.tokenizer import trained_model
from runtime.tokenizer import Tokenizer, clean
from tests.export.checkpoint.forms import add_tokenizer, finish_gguf
from wan22.errors import UserError

PROMPTS = (
    "A red fox runs through fresh snow.",
    "一只猫在月光下弹钢琴，色调艳丽，过曝",
    "ｆｕｌｌ-width & 4K ﬁlm ½",
    "[PAD1030] wide   spaces",
)


def written(path, **change):
    """A text encoder without layers, and the tokenizer of tiny models."""
    writer = gguf.GGUFWriter(path, "t5encoder")
    add_tokenizer(writer, trained_model(), **change)
    writer.add_tensor("token_embd.weight", np.ones((1088, 4), np.float32))
    writer.add_tensor("enc.blk.0.attn_q.weight", np.ones((4, 4), np.float32))
    finish_gguf(writer)
    return path


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_sentencepiece(tmp_path, prompt):
    path = written(tmp_path / "umt5.gguf")
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained_model())
    expected = [*processor.encode(clean(prompt)), 1]
    assert Tokenizer(tokenizer_folder(None, path)).encode(prompt).ids.ravel().tolist() == expected
    assert describe(path).holds_tokenizer


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**6])
def test_a_piece_longer_than_the_file_is_refused(tmp_path, length):
    path = written(tmp_path / "umt5.gguf")
    content = path.read_bytes()
    first = (5).to_bytes(8, "little") + b"<pad>"
    assert content.count(first) == 1
    path.write_bytes(content.replace(first, length.to_bytes(8, "little") + b"<pad>"))
    for call in (describe, lambda path: tokenizer_folder(None, path)):
        with pytest.raises(UserError, match="longer than the header"):
            call(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"charsmap": False}, r"without its normalisation .* --tokenizer DIR"),
        ({"kind": "llama"}, "a tokenizer of type llama"),
        ({"scores": False}, "no scores or types"),
        ({"tokens": ["a", "b"]}, "no scores or types"),
        ({"charsmap": b"\x05\0\0\0abc"}, "precompiled_charsmap"),
        ({"tokens": ["x"] * 1088}, "no Unigram model with the pieces of T5"),
    ],
)
def test_a_tokenizer_that_cannot_be_trusted_is_refused(tmp_path, change, words):
    path = written(tmp_path / "umt5.gguf", **change)
    with pytest.raises(UserError, match=words) as error:
        tokenizer_folder(None, path)
    assert "\n" not in str(error.value)
    assert describe(path).holds_tokenizer == bool(change.get("charsmap", True))
