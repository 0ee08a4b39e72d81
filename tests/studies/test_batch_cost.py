"""``python -m studies.batch_cost``: a further job, with one worker and with two."""

import re

import pytest

from studies.batch_cost import app


@pytest.mark.slow
def test_the_study_prints_what_a_further_job_costs(tiny_engines, capsys):
    options = ["--jobs", "2", "--steps", "1", "--size", "64x64", "--frames", "5", "--turns", "1", "--no-ray"]
    with pytest.raises(SystemExit) as left:
        app([str(tiny_engines), *options])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    rows = [re.search(rf"{name} +(-?\d+) ms", shown) for name in ("rendering alone", "one process", "two processes")]
    assert all(rows)
    assert int(rows[0][1]) > 0
    assert "Ray," not in shown
