"""From inputs as people have them to predictions: the base and its adapter in one call, and results as a file."""
