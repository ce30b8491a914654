"""Benchmark charts."""

GROUP = "text"
