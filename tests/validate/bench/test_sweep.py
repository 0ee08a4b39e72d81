"""Sweeps: their points, the fitted growth, the plot."""

import re

import pytest

from runtime.request import Request
from validate.bench.sweep import Point, Sweep, options_of, sweep
from validate.bench.sweep_view import as_html, as_table, write_plot
from validate.bench.work import BenchOptions
from wan22.errors import UserError
from wan22.specs import SPECS

TINY = SPECS["t2v-a14b-tiny"]


def grown(exponent, tokens=(100, 200, 400)):
    points = tuple(Point(x, str(x), {"high_noise, ours": 3e-4 * x**exponent}) for x in tokens)
    return Sweep("frames", "<tiny>", points)


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
def test_the_exponent_of_a_power_is_found(exponent):
    found, factor = grown(exponent).fit("high_noise, ours")
    assert (found, factor) == (pytest.approx(exponent), pytest.approx(3e-4))


@pytest.mark.parametrize("values", [(1, 5, 9, 17), (5, 17, 33)])
def test_linear_work_of_the_vae_is_linear_in_pixels(values):
    """The first frame alone yields a latent frame, so tokens grow more slowly than the work."""
    times = {frames: {"vae_decoder, ours": 0.65 * frames, "dit, ours": 2.0} for frames in values}
    points = tuple(
        Point(160 * ((frames - 1) // 4 + 1), str(frames), times[frames], 64 * 64 * frames) for frames in values
    )
    found = Sweep("frames", "<tiny>", points)
    assert found.exponents()["vae_decoder, ours"] == pytest.approx(1)
    assert found.as_json()["exponents_of"] == {"vae_decoder, ours": "pixels", "dit, ours": "tokens"}
    assert found.as_json()["points"][0]["pixels"] == 64 * 64 * values[0]


def test_points_of_one_length_have_no_exponent():
    assert grown(1.0, (100, 100)).exponents() == {}


def test_a_sweep_of_frames_times_the_pieces_chosen(tiny_engines):
    options = BenchOptions(Request(size=(32, 32)), runs=1, only=("vae_decoder",))
    found = sweep(tiny_engines, None, "frames", ["1", "9"], options)
    assert [(point.label, point.x) for point in found.points] == [("1", 4), ("9", 12)]
    assert found.series == ("vae_decoder, ours",)
    assert found.exponents()["vae_decoder, ours"] > 0
    assert found.as_json()["points"][1]["frames"] == 9


def test_a_sweep_of_steps_times_whole_runs(tiny_engines):
    options = BenchOptions(Request(size=(32, 32), frames=1), whole_runs=1)
    found = sweep(tiny_engines, None, "steps", ["1", "3"], options)
    assert [(point.label, point.x) for point in found.points] == [("1", 1), ("3", 3)]
    assert found.series == ("all steps, ours",)


def test_a_sweep_names_sides_that_are_not_finite(tiny_engines, with_nan):
    options = BenchOptions(Request(size=(32, 32)), runs=1, only=("high_noise",), command="wan-trt bench")
    found = sweep(with_nan(tiny_engines, "high_noise"), None, "frames", ["1", "5"], options)
    assert found.faults[0] == "frames 1, high_noise: NaN or infinity computed by ours"
    assert found.as_json()["faults"] == list(found.faults)
    assert found.faults[0] in as_html(found)
    assert found.as_json()["conditions"]["command"] == "wan-trt bench"


def test_default_sizes_are_fractions_of_the_models_size():
    chosen = options_of("size", None, BenchOptions(), TINY)
    assert [options.request.size for options in chosen.values()] == [(128, 80), (192, 128), (256, 160)]


@pytest.mark.parametrize(("name", "start"), [("plot.png", b"\x89PNG"), ("plot.html", b"<!doctype html>")])
def test_the_ending_decides_what_is_written(tmp_path, name, start):
    write_plot(grown(1.5), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_the_page_is_self_contained():
    assert not re.findall(r"https?://|<link|<script|@import|url\(", as_html(grown(1.5)))


def test_page_and_table_show_the_exponent():
    page = as_html(grown(1.5))
    assert "<td>1.50</td>" in page
    assert "&lt;tiny&gt;" in page
    assert list(as_table(grown(1.5)).columns[-1].cells)[-2:] == ["1.50", "tokens"]


def test_a_size_beyond_the_memory_is_refused_before_any_work(tiny_engines):
    options = BenchOptions(Request(frames=1), runs=1)
    with pytest.raises(UserError, match="alone takes"):
        sweep(tiny_engines, None, "size", ["16384x16384", "64x64"], options)
