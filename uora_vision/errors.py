"""Errors raised on purpose derive from `UoraError` and the built-in type that fits; warnings are `UoraWarning`s."""


class UoraWarning(UserWarning):
    """Something works, and probably not as it was meant: a part that stays frozen, a vector that decays."""


class UoraError(Exception):
    """Base of all errors of uora_vision."""


class ConfigError(UoraError, ValueError):
    """An option has a value that cannot be used."""


class OptionError(UoraError, TypeError):
    """An option does not exist, or has the wrong type."""


class TargetError(UoraError, ValueError):
    """What was asked to be adapted is not in the model."""


class StateError(UoraError, RuntimeError):
    """The model is not in a state in which this can be done: already injected, or not injected."""


class DeadAdapterError(UoraError, RuntimeError):
    """Some adapters receive no gradient: they would train nothing."""


class HubError(UoraError, OSError):
    """A repository on the Hugging Face hub cannot be read or written."""


class ExportError(UoraError, ValueError):
    """An adapter cannot be written in the form that was asked for."""


class FormatError(UoraError, ValueError):
    """A saved adapter is damaged, of another version, or made for another model."""
