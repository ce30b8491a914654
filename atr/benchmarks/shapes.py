"""Benchmark shapes."""

GROUP = "general"
