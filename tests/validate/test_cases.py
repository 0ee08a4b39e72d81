"""Several prompts and seeds: every pair is a run, and one command repeats it."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.prompts import read_prompts
from runtime.request import Request
from validate import ValidateOptions, validate
from validate.cases import cases_of
from wan22.errors import UserError
from wan_trt.arguments import seeds_of

TYPED = "wan-trt validate engines ck -o out --steps 4 --prompts p.txt --seeds=0,7 --gate g.toml"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('# comment\nA fox\n{"prompt": "It\'s a hen", "image": "hen.png"}\n')
    return path


def test_every_prompt_runs_with_every_seed(prompts):
    cases = cases_of(ValidateOptions(prompts=prompts, seeds=(0, 7), command=TYPED), "optional")
    assert [(case.number, case.options.request.prompt, case.options.request.seed) for case in cases] == [
        (1, "A fox", 0),
        (2, "A fox", 7),
        (3, "It's a hen", 0),
        (4, "It's a hen", 7),
    ]
    assert cases[3].options.request.image == prompts.parent / "hen.png"


def test_the_command_of_a_case_repeats_it_alone(prompts):
    command = cases_of(ValidateOptions(prompts=prompts, seeds=(0, 7), command=TYPED), "optional")[3].command
    assert shlex.split(command) == [
        *("wan-trt", "validate", "engines", "ck", "--steps", "4", "--gate", "g.toml", "-o", "case-4", "--seed", "7"),
        *("--prompt", "It's a hen", "--image", str(prompts.parent / "hen.png")),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "no prompts"), (b"# only\n", "no prompts"), (b"\xff\xfe", "not UTF-8")],
)
def test_files_without_valid_prompts(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        cases_of(ValidateOptions(prompts=path), "no")


def test_one_source_of_prompts_and_no_seed_twice(prompts):
    with pytest.raises(UserError, match="--prompts with --prompt"):
        cases_of(ValidateOptions(Request("a"), prompts=prompts), "optional")
    with pytest.raises(UserError, match="each seed once"):
        cases_of(ValidateOptions(seeds=(1, 1)), "no")
    with pytest.raises(UserError, match="--seeds with --seed 3"):
        cases_of(ValidateOptions(Request(seed=3), seeds=(1, 2)), "no")


def test_the_byte_order_mark_is_not_part_of_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf# comment\nA fox\n")
    assert [case.options.request.prompt for case in cases_of(ValidateOptions(prompts=path), "no")] == ["A fox"]


def test_an_empty_prompt_does_not_become_the_default(tiny_engines, tiny_checkpoint, tmp_path):
    with pytest.raises(UserError, match="prompt"):
        options = ValidateOptions(Request(" ", size=(32, 32), frames=1))
        validate(tiny_engines, tiny_checkpoint, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_seeds_are_parsed():
    assert seeds_of("0, 10-12") == (0, 10, 11, 12)
    assert seeds_of(None) == ()
    assert seeds_of(str(2**64 - 1)) == (2**64 - 1,)
    for text in ("", "a", "3-1", "0-5000", "-1", "1,,2", str(2**64)):
        with pytest.raises(UserError, match="seeds"):
            seeds_of(text)


def test_the_first_case_climbs_the_full_ladder_and_the_others_what_differs(tiny_engines, tiny_checkpoint, tmp_path):
    asked = ValidateOptions(Request(size=(32, 32), frames=1, steps=2), seeds=(0, 3))
    found = validate(tiny_engines, tiny_checkpoint, tmp_path, asked)
    assert found
    first, second = ({row.subject for row in case.rows} for case in found.cases)
    assert second == {"token_ids", "embeddings", "latents", "frames", "ssim"}
    assert first > second
    again = ValidateOptions(replace(asked.request, seed=3), overwrite=True)
    alone = validate(tiny_engines, tiny_checkpoint, tmp_path, again)
    latents = [[row.metrics for row in case.steps] for case in (found.cases[1], alone.cases[0])]
    assert latents[0] == latents[1]
    assert "seeds 0 3, guidance" in found.facts["sampling"]
    assert "seed 3, guidance" in alone.facts["sampling"]
    assert found.facts["prompt"] == alone.facts["prompt"]
    assert "wan-trt " in found.facts["versions"]
    assert found.facts["date"].endswith(" UTC")


def test_gates_and_bench_are_read_before_any_work(tiny_engines, tiny_checkpoint, tmp_path):
    gate, bench = tmp_path / "gate.toml", tmp_path / "bench.json"
    gate.write_text("[validate]\nlatent.relative_l2.max = 1")
    bench.write_text("{}")
    wrong = {"unknown key validate.latent.relative_l2": {"gate": gate}, "format None": {"bench": bench}}
    wrong |= {"No such file": {"bench": Path("nowhere.json")}}
    for message, options in wrong.items():
        with pytest.raises(UserError, match=message):
            validate(tiny_engines, tiny_checkpoint, tmp_path / "out", ValidateOptions(**options))
    assert not (tmp_path / "out").exists()


def test_a_prompt_may_begin_with_a_hash(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('#\n# a comment\n#cinematic street\n{"prompt": "# of the beast"}\n')
    assert [prompt.text for prompt in read_prompts(path, "no")] == ["#cinematic street", "# of the beast"]
