"""Benchmark docs."""

GROUP = "text"
