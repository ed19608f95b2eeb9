"""Benchmarks of functional tensor decompositions."""
