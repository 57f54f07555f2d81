"""A saved adapter, and the way between a model and a folder."""
