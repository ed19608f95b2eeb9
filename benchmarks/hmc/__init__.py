"""Gradient-based samplers beside Pyro, NumPyro and BlackJAX."""
