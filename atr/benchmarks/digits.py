"""Benchmark digits."""

GROUP = "general"
