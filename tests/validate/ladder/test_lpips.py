"""LPIPS is measured if its package and network are available; otherwise the report says so in one line."""

import sys
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest

from validate.ladder import metrics, video
from validate.ladder.thresholds import LPIPS


@pytest.fixture(autouse=True)
def _asked_anew():
    for cached in (metrics.why_no_lpips, metrics._network):
        cached.cache_clear()
    yield
    for cached in (metrics.why_no_lpips, metrics._network):
        cached.cache_clear()


def comparison(ours, theirs):
    return SimpleNamespace(our_frames=ours, reference_frames=theirs)


def videos(side=32):
    """Three frames; the second one differs between the sides."""
    theirs = np.zeros((1, 3, 3, side, side), np.float32)
    ours = theirs.copy()
    ours[:, :, 1] = 0.5
    return ours, theirs


@pytest.fixture
def network(monkeypatch):
    """A package whose network is the mean absolute difference."""
    package = SimpleNamespace(LPIPS=lambda **_: SimpleNamespace(eval=lambda: lambda a, b: (a - b).abs().mean()))
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(metrics, "find_spec", lambda _: object())


def test_the_worst_frame_is_a_row_of_the_ladder(network):
    assert metrics.why_no_lpips() == ""
    (row,) = video.perception(comparison(*videos()))
    assert (row.metrics.lpips, row.limit) == (0.5, LPIPS)
    assert row.note.startswith("frame 2, ")
    assert not row.passed


def test_frames_too_small_for_the_network_or_not_finite_have_no_row(network):
    ours, theirs = videos()
    assert not list(video.perception(comparison(*videos(side=16))))
    assert not list(video.perception(comparison(ours * np.float32("nan"), theirs)))
    assert not list(video.perception(comparison(None, theirs)))


@pytest.mark.parametrize(
    "error", [URLError("no route\nto host"), RuntimeError("operator nms does not exist"), AttributeError("no alexnet")]
)
def test_a_network_that_cannot_be_loaded_is_reported_in_one_line(monkeypatch, error):
    def fails(**_):
        raise error

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=fails))
    monkeypatch.setattr(metrics, "find_spec", lambda _: object())
    why = metrics.why_no_lpips()
    assert why.startswith("not measured: the network of package lpips cannot be loaded (")
    assert "\n" not in why
    assert not list(video.perception(comparison(*videos())))


def test_the_package_itself_takes_our_frames(monkeypatch):
    lpips = pytest.importorskip("lpips", reason="not installed; validate does without")
    net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    monkeypatch.setattr(metrics, "_network", lambda: net)
    same, other, _ = metrics.lpips_per_frame(*videos())
    assert same == 0 < other
