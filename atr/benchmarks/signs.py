"""Benchmark signs."""

GROUP = "text"
