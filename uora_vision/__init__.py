"""UORA for frozen vision, vision-language and language transformers.

The public names are those below. Importing this imports torch and nothing heavy.
"""

from .config import UoraConfig
from .errors import (
    ConfigError,
    DeadAdapterError,
    ExportError,
    FormatError,
    HubError,
    OptionError,
    StateError,
    TargetError,
    UoraError,
)  # fmt: skip
from .files import load, save
from .fit import Base
from .inject import adapters, inject, remove
from .merge import MergeReport, merge, unmerge
from .optim import param_groups
from .packed import Packed
from .plan import Plan, plan
from .reinit import AlphaDecay, Reinitializer, ThresholdWave
from .rules import register_rule
from .summary import Summary, summary
from .upgrade import upgrade
from .verify import verify

__version__ = "0.1.0"

__all__ = [
    "AlphaDecay", "Base", "ConfigError", "DeadAdapterError", "ExportError", "FormatError", "HubError", "MergeReport",
    "OptionError", "Packed", "Plan", "Reinitializer", "StateError", "Summary", "TargetError", "ThresholdWave",
    "UoraConfig", "UoraError",
    "adapters", "inject", "load", "merge", "param_groups", "plan", "register_rule", "remove", "save", "summary",
    "unmerge", "upgrade", "verify",
]  # fmt: skip
