"""Package probkit.bo."""
