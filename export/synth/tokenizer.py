"""A small Unigram tokenizer with the files of ``google/umt5-xxl``, trained on a corpus in the source code.

T5's pipeline: NFKC-like normalisation with sentencepiece's compiled table, split at white space, ``▁`` before each
word, Viterbi over the pieces, ``</s>`` appended. Pieces consist of characters, not bytes: transformers' T5 class
rebuilds the tokenizer without byte fallback, so with bytes the three readers (sentencepiece, tokenizers, transformers)
would disagree.
"""

import functools
import io
from collections.abc import Iterable
from pathlib import Path

from export.checkpoint.tokenizer import EOS, PAD, UNK, save_tokenizer, unigram
from export.synth.corpus import lines

PIECES = 1024


def write_tokenizer(folder: Path, model: bytes | None = None) -> None:
    """Write ``spiece.model``, ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``.

    ``model`` is the content of ``spiece.model``; None trains one on this package's corpus.
    """
    folder.mkdir(parents=True)
    model = model or trained_model()
    (folder / "spiece.model").write_bytes(model)
    save_tokenizer(unigram(model), folder)


@functools.cache
def trained_model() -> bytes:
    """A sentencepiece model trained on this package's corpus."""
    return train(lines())


def train(sentences: Iterable[str]) -> bytes:
    """A sentencepiece model with exactly ``PIECES`` pieces; one thread makes training deterministic."""
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
