"""Benchmark scenes."""

GROUP = "general"
