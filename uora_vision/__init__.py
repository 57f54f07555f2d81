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
from .hub import push_to_hub
from .inject import adapters, inject, remove
from .library import activate, active_adapter, adapter_names, delete, disabled
from .merge import MergeReport, merge, unmerge
from .optim import param_groups
from .packed import Packed
from .plan import Plan, plan
from .reinit import AlphaDecay, Reinitializer, ThresholdWave
from .routing import route
from .rules import register_rule
from .summary import Summary, summary
from .upgrade import upgrade
from .verify import verify

__version__ = "0.1.0"

__all__ = [
    "AlphaDecay", "Base", "ConfigError", "DeadAdapterError", "ExportError", "FormatError", "HubError", "MergeReport",
    "OptionError", "Packed", "Plan", "Reinitializer", "StateError", "Summary", "TargetError", "ThresholdWave",
    "UoraConfig", "UoraError",
    "activate", "active_adapter", "adapter_names", "adapters", "delete", "disabled", "inject", "load", "merge",
    "param_groups", "plan", "push_to_hub", "register_rule", "remove", "route", "save", "summary", "unmerge",
    "upgrade", "verify",
]  # fmt: skip
