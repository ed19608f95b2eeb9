"""probkit: Bayesian-first modelling on PyTorch."""
