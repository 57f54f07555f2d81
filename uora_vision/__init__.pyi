from . import export, integrations
from .config import UoraConfig
from .errors import (
    ConfigError,
    DataError,
    DeadAdapterError,
    ExportError,
    FormatError,
    HubError,
    OptionError,
    StateError,
    TargetError,
    UoraError,
    UoraWarning,
)  # fmt: skip
from .lifecycle.contexts import disabled
from .lifecycle.counts import Summary, summary
from .lifecycle.informing import inform
from .lifecycle.injection import inject, remove
from .lifecycle.library import adapters
from .lifecycle.merging import MergeReport, merge, unmerge
from .lifecycle.parameter_groups import param_groups
from .lifecycle.reinit import Reinitializer
from .lifecycle.schedules import AlphaDecay, ThresholdWave
from .lifecycle.selection import activate, active_adapter, adapter_names, delete
from .lifecycle.shares import strength
from .lifecycle.verification import verify
from .predict.answers import Prediction
from .predict.predictor import Predictor, load_predictor
from .serving.routing import route
from .storage.base import Base
from .storage.folder import upgrade
from .storage.hub import push_to_hub
from .storage.save_load import load, save
from .structure.planning import Plan, plan
from .structure.row_order import Packed
from .structure.rules import register_rule
from .version import __version__

__all__ = [
    "AlphaDecay",
    "Base",
    "ConfigError",
    "DataError",
    "DeadAdapterError",
    "ExportError",
    "FormatError",
    "HubError",
    "MergeReport",
    "OptionError",
    "Packed",
    "Plan",
    "Prediction",
    "Predictor",
    "Reinitializer",
    "StateError",
    "Summary",
    "TargetError",
    "ThresholdWave",
    "UoraConfig",
    "UoraError",
    "UoraWarning",
    "__version__",
    "activate",
    "active_adapter",
    "adapter_names",
    "adapters",
    "delete",
    "disabled",
    "export",
    "inform",
    "inject",
    "integrations",
    "load",
    "load_predictor",
    "merge",
    "param_groups",
    "plan",
    "push_to_hub",
    "register_rule",
    "remove",
    "route",
    "save",
    "strength",
    "summary",
    "unmerge",
    "upgrade",
    "verify",
]  # fmt: skip
