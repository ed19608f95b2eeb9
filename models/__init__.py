"""Package probkit.models."""
