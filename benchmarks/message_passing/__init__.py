"""Benchmarks of message passing in chains."""
