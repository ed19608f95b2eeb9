"""Sequential Monte Carlo, beside its peers."""
