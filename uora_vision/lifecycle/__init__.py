"""Adapters in a model, from injection to merging."""
