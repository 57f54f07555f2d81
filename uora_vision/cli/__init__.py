"""The command `uora`."""
