"""VBench on our videos, the quality gate of MLPerf's text-to-video benchmark, in an environment of its own."""
