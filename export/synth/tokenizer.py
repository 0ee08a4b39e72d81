"""A small Unigram tokenizer with the files of ``google/umt5-xxl``, trained on a corpus kept in the source.

T5's pipeline: NFKC-like normalisation by sentencepiece's compiled table, split at white space, ``▁`` before each word,
Viterbi over the pieces, ``</s>`` appended. Every piece is covered by characters, not bytes: transformers' T5 class
rebuilds the tokenizer without byte fallback, and then the three readers (sentencepiece, tokenizers, transformers) would
disagree.
"""

import functools
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from export.synth.corpus import lines

PIECES = 1024
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2


def write_tokenizer(folder: Path, model: bytes | None = None) -> None:
    """Writes ``spiece.model``, ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``.

    ``model`` is the content of ``spiece.model``; None trains one on the corpus of this package.
    """
    folder.mkdir(parents=True)
    model = model or trained_model()
    (folder / "spiece.model").write_bytes(model)
    converted(model).save(str(folder / "tokenizer.json"))
    specials = {"eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    _write_json(folder / "special_tokens_map.json", specials)
    _write_json(folder / "tokenizer_config.json", specials | _CONFIG)


_CONFIG = {
    "additional_special_tokens": [],
    "clean_up_tokenization_spaces": False,
    "extra_ids": 0,
    "legacy": False,
    "model_max_length": 512,
    "padding_side": "right",
    "tokenizer_class": "T5Tokenizer",
}


@functools.cache
def trained_model() -> bytes:
    """The sentencepiece model of the corpus of this package."""
    return train(lines())


def train(sentences: Iterable[str]) -> bytes:
    """A sentencepiece model with exactly ``PIECES`` pieces; one thread, so that every training gives the same."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=PIECES,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        pad_id=0,
        pad_piece=PAD,
        eos_id=1,
        eos_piece=EOS,
        unk_id=2,
        unk_piece=UNK,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def converted(model: bytes) -> Any:
    """The same model as a ``tokenizers.Tokenizer``."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    tokenizer = Tokenizer(models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], unk_id=2))
    tokenizer.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens([PAD, EOS, UNK])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, 1)]
    )
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
