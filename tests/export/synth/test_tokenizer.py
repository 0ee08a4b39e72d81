"""One small tokenizer, three readers, the same ids."""

import json

import pytest

from export.synth.tokenizer import PIECES, trained_model, write_tokenizer
from wan22.sampling import NEGATIVE_PROMPT

PROMPTS = [
    "A red fox runs through fresh snow, cinematic close-up.",
    "Zebras & giraffes   at the waterhole — 4K, f/2.8",
    "一只猫在月光下弹钢琴，电影感，慢动作",
    "熊猫🐼吃竹子 and drinks ｆｕｌｌ-width tea",
    NEGATIVE_PROMPT,
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("umt5") / "umt5-xxl"
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def ids(folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda prompt: tokenizer.encode(prompt).ids


@pytest.mark.parametrize("prompt", PROMPTS)
def test_sentencepiece_gives_the_same_ids(folder, ids, prompt):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert ids(prompt) == [*processor.encode(prompt), 1]


@pytest.mark.parametrize("reader", ["AutoTokenizer", "T5TokenizerFast", "T5Tokenizer"])
def test_transformers_gives_the_same_ids(folder, ids, reader):
    transformers = pytest.importorskip("transformers")

    tokenizer = getattr(transformers, reader).from_pretrained(folder)
    assert [tokenizer(prompt).input_ids for prompt in PROMPTS] == [ids(prompt) for prompt in PROMPTS]
    assert len(tokenizer) == PIECES


def test_special_ids(folder):
    pieces = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert [piece for piece, _ in pieces[:3]] == ["<pad>", "</s>", "<unk>"]
    assert len(pieces) == PIECES


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[2], NEGATIVE_PROMPT, "公园里有很多人在散步，天气很好"])
def test_prompts_of_both_languages_are_hardly_unknown(ids, prompt):
    assert ids(prompt).count(2) <= len(ids(prompt)) // 10
    assert len(set(ids(prompt))) > 10


def test_training_again_gives_the_same_bytes():
    first = trained_model()
    trained_model.cache_clear()
    assert trained_model() == first
