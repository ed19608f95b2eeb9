"""Benchmarks of sparse Bayesian learning."""
