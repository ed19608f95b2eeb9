"""Benchmarks of slate recommendation."""
