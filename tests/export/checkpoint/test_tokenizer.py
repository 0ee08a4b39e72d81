"""The tokenizer inside a GGUF text encoder, as llama.cpp's converter writes it, gives the ids of SentencePiece."""

import gguf
import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from export.checkpoint.describe import describe
from export.checkpoint.tokenizer import tokenizer_folder
from export.synth.tokenizer import trained_model
from runtime.tokenizer import Tokenizer, clean
from wan22.errors import UserError

PROMPTS = (
    "A red fox runs through fresh snow.",
    "一只猫在月光下弹钢琴，色调艳丽，过曝",
    "ｆｕｌｌ-width & 4K ﬁlm ½",
    "[PAD1030] wide   spaces",
)


def written(path, *, kind="t5", charsmap=True, scores=True, tokens=None, padding=64):
    """A text encoder without layers, and the tokenizer of tiny models, padded to the rows of the embedding."""
    model = sentencepiece_model_pb2.ModelProto.FromString(trained_model())
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_tokenizer_model(kind)
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    pieces += [
        (f"[PAD{number}]", -10000.0, gguf.TokenType.UNUSED) for number in range(len(pieces), len(pieces) + padding)
    ]
    names, values, types = map(list, zip(*pieces, strict=True))
    writer.add_token_list(tokens or names)
    if scores:
        writer.add_token_scores(values)
    writer.add_token_types(types)
    if charsmap:
        writer.add_precompiled_charsmap(model.normalizer_spec.precompiled_charsmap)
    writer.add_tensor("token_embd.weight", np.ones((len(pieces), 4), np.float32))
    writer.add_tensor("enc.blk.0.attn_q.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_sentencepiece(tmp_path, prompt):
    path = written(tmp_path / "umt5.gguf")
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained_model())
    expected = [*processor.encode(clean(prompt)), 1]
    assert Tokenizer(tokenizer_folder(None, path)).encode(prompt).ids.ravel().tolist() == expected
    assert describe(path).holds_tokenizer


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"charsmap": False}, r"without its normalisation .* --tokenizer DIR"),
        ({"kind": "llama"}, "a tokenizer of type llama"),
        ({"scores": False}, "no scores or types"),
        ({"tokens": ["a", "b"]}, "no scores or types"),
        ({"tokens": ["x"] * 1088}, "no Unigram model with the pieces of T5"),
    ],
)
def test_a_tokenizer_that_cannot_be_trusted_is_refused(tmp_path, change, words):
    path = written(tmp_path / "umt5.gguf", **change)
    with pytest.raises(UserError, match=words) as error:
        tokenizer_folder(None, path)
    assert "\n" not in str(error.value)
    assert describe(path).holds_tokenizer == ("charsmap" not in change)
