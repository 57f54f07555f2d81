"""Adapters in the training tools that people use; each module imports its tool, this package imports none."""
