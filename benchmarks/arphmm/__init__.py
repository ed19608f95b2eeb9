"""Switching autoregressions and remaining useful life, beside their peers."""
