"""Language models and particles."""
