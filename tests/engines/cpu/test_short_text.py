"""Short and long prompts take different branches of cross-attention and give the same velocity."""

from dataclasses import replace

import numpy as np
import pytest

from engines.cpu.attention import fuse_attention
from engines.cpu.padding import merge_padding
from engines.cpu.short_text import project_short_text
from tests.engines.cpu.graphs import SPEC, inputs, kinds, run, transformer

SPLIT = (SPEC.heads, SPEC.head_width)
LONGEST = SPEC.head_width * 3 // 4 - 1  # rows of a short prompt, without the row for its padding


@pytest.fixture(scope="module")
def models():
    plain, chosen = transformer(), transformer()
    for model in (plain, chosen):
        fuse_attention(model, *SPLIT)
        merge_padding(model, *SPLIT)
    assert project_short_text(chosen, *SPLIT) == 1
    return plain, chosen


@pytest.mark.parametrize("text_rows", [0, 1, 7, LONGEST, LONGEST + 1, 512])
def test_the_result_is_the_same_for_every_length_of_prompt(models, text_rows):
    given = inputs(text_rows=text_rows)
    expected, found = (run(model, given) for model in models)
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


def test_only_a_short_prompt_is_multiplied_with_the_linear(models):
    (values,) = [node for node in models[1].graph if node.name.endswith("o/Gemm/projected")]
    branches = [[node.op_type for node in entry.as_graph()] for entry in values.attributes.values()]
    assert ["FusedMatMul" in branch for branch in branches] == [True, False]


def test_nothing_is_done_where_padding_is_not_merged():
    model = transformer(replace(SPEC, layers=1))
    fuse_attention(model, *SPLIT)
    before = kinds(model)
    assert project_short_text(model, *SPLIT) == 0
    assert kinds(model) == before
