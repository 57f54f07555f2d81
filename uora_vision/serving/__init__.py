"""Batches whose samples have different adapters."""
