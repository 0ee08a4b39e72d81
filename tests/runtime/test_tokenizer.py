import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from runtime.tokenizer import Tokenizer, clean
from wan22.errors import UserError

PIECES = ["<pad>", "</s>", "<unk>", "▁a", "▁cat", "▁", "c", "a", "t", "一", "只", "猫", "&", "▁&"]
END = 1


@pytest.fixture
def folder(tmp_path):
    """A tokenizer.json with the structure of umt5's, which pads and truncates by default."""
    tokenizer = tokenizers.Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(PIECES)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(32)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_ids_are_unpadded_and_end_once(folder):
    tokens = Tokenizer(folder).encode("a cat")
    assert tokens.ids.dtype == np.int64
    assert tokens.ids.tolist() == [[3, 4, END]]
    assert not tokens.truncated


def test_chinese_prompt(folder):
    assert Tokenizer(folder).encode("一只猫").ids.tolist() == [[5, 9, 10, 11, END]]


def test_a_long_prompt_keeps_511_tokens_and_the_end(folder):
    tokens = Tokenizer(folder).encode("a " * 512)
    assert tokens.ids.shape == (1, 512)
    assert tokens.ids[0, -1] == END
    assert tokens.truncated


def test_a_prompt_of_511_tokens_is_whole(folder):
    tokens = Tokenizer(folder).encode("a " * 511)
    assert tokens.ids.shape == (1, 512)
    assert not tokens.truncated


def test_equals_transformers(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    ours = Tokenizer(folder)
    for prompt in ("a cat", "一只猫 a cat & 猫", "a </s> cat", "x" * 600, "猫a " * 400, "日本語"):
        expected = theirs(prompt, max_length=512, truncation=True, padding=False)["input_ids"]
        assert ours.encode(prompt).ids[0].tolist() == expected


@pytest.mark.parametrize("prompt", ["", "  \n\t ", "&nbsp;"])
def test_an_empty_prompt_is_refused_unless_negative(folder, prompt):
    tokenizer = Tokenizer(folder)
    with pytest.raises(UserError, match="describe the video"):
        tokenizer.encode(prompt)
    assert tokenizer.encode(prompt, allow_empty=True).ids.tolist() == [[END]]


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a \n\t cat\u3000!  ", "a cat !"),
        ("rock &amp;amp; roll", "rock & roll"),
        ("cafÃ©", "café"),
        ("“quoted”", '"quoted"'),
        ("A CAT", "A CAT"),
        ("a \udcff cat", "a \ufffd cat"),
    ],
)
def test_cleaning(prompt, cleaned):
    assert clean(prompt) == cleaned


def test_spiece_alone_names_the_remedy(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"spiece.model but no tokenizer.json.*google/umt5-xxl"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x89PNG", json.dumps({"version": "1.0"}).encode()])
def test_no_tokenizer_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        Tokenizer(tmp_path)
    assert "tokenizer.json" in error.value.found


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="</s>"):
        Tokenizer(tmp_path)
