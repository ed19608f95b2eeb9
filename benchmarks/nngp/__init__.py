"""Scale mixtures of neural network Gaussian processes, beside their peers."""
