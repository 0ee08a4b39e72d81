"""The peak that commands report is what the process really had."""

import numpy as np

from wan22.memory import peak_rss_bytes


def test_the_peak_rises_with_what_is_touched_and_stays_when_it_is_freed():
    before = peak_rss_bytes()
    held = np.ones(max(before, 2**28) // 4, np.float32)  # more than is there, whatever was freed before
    during = peak_rss_bytes()
    assert during >= held.nbytes
    del held
    assert peak_rss_bytes() >= 0.99 * during  # the system counts in batches
