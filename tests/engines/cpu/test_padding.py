"""Rows of zeros after a prompt are computed once for any number of rows and weighted by their number."""

import numpy as np
import pytest

from engines.cpu.attention import fuse_attention
from engines.cpu.padding import merge_padding
from tests.engines.cpu.graphs import SPEC, inputs, kinds, run, transformer

SPLIT = (SPEC.heads, SPEC.head_width)


@pytest.fixture(scope="module")
def models():
    plain, merged = transformer(), transformer()
    for model in (plain, merged):
        fuse_attention(model, *SPLIT)
    assert merge_padding(merged, *SPLIT) == 1
    return plain, merged


@pytest.mark.parametrize("text_rows", [0, 1, 7, 511, 512])
def test_the_result_is_the_same_for_every_length_of_prompt(models, text_rows):
    given = inputs(text_rows=text_rows)
    expected, found = (run(model, given) for model in models)
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


def test_a_row_of_zeros_inside_the_prompt_is_a_row(models):
    given = inputs(text_rows=7)
    given["text"][:, 3] = 0
    expected, found = (run(model, given) for model in models)
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


def test_not_a_number_in_the_text_is_not_taken_for_padding(models):
    given = inputs(text_rows=7)
    given["text"][:, 400, 5] = np.nan
    assert np.isnan(run(models[1], given)).all()


def test_nothing_is_done_where_attention_is_not_fused():
    model = transformer()
    before = kinds(model)
    assert merge_padding(model, *SPLIT) == 0
    assert kinds(model) == before
