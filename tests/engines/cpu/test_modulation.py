"""A norm and the modulation after it become one operator with the same result."""

from dataclasses import replace

import numpy as np

from engines.cpu.modulation import fold_modulation
from tests.engines.cpu.graphs import inputs, kinds, run, transformer
from wan22.specs import SPECS


def test_scale_and_shift_move_into_the_norm():
    model = transformer()
    before, adds = run(model, inputs()), kinds(model).count("Add")
    assert fold_modulation(model) == 3  # before attention, before the feed-forward, in the head
    assert kinds(model).count("Add") == adds - 3
    assert kinds(model).count("LayerNormalization") == 4
    assert np.abs(run(model, inputs()) - before).max() < 2e-6 * np.abs(before).max()


def test_norms_whose_frames_have_times_of_their_own_are_left_alone():
    model = transformer(replace(SPECS["ti2v-5b-tiny"].dit, layers=1))
    before = kinds(model)
    assert fold_modulation(model) == 0
    assert kinds(model) == before
