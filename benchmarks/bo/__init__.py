"""Bayesian optimisation against its peers: cells of method, problem and seed, stored one by one."""
