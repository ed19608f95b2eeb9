"""Package probkit.inference."""
