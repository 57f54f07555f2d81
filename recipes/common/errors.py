"""What is wrong with how a recipe is used. The message says what was found and what to do; no traceback is needed."""

from __future__ import annotations

from uora_vision.errors import DataError as DataError


class RecipeError(Exception):
    """Base of the errors that the command line shows as one line."""


class ModelError(RecipeError):
    """The model cannot be used."""


class MethodError(RecipeError):
    """The method cannot be applied."""


class CheckpointError(RecipeError):
    """The checkpoint cannot be used."""


class OutputError(RecipeError):
    """The output folder cannot be used."""


class PrecisionError(RecipeError):
    """The precision is unknown or not to be had on this device."""


class TrainingError(RecipeError):
    """Training cannot go on; the message says at which step."""
