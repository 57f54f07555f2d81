"""What kind of module holds a weight, under its adapter if it has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import OptionError, StateError
from .matrix import Form
from .quantised import is_quantised_linear

WRAPPED = "_old_forward"
"""Where hooks of accelerate keep the forward that they wrap."""


class Adapted:
    """Mixed in before the class of a module that has adapters; made by `adapted_class`."""

    _parameters: dict[str, Any]
    __dict__: dict[str, Any]


def check_module(model: object) -> None:
    """Whether this is a model: adapters go into modules that were made already.

    Raises:
        OptionError: it is something else.
    """
    if isinstance(model, nn.Module):
        return
    if model is None:
        hint = "a function that builds the model may lack its return"
    elif isinstance(model, str):
        hint = f"make the model first, as with timm.create_model({model!r}, pretrained=True), and give that"
    elif isinstance(model, type):
        hint = "make an instance of the class, and give that"
    elif isinstance(model, Mapping):
        hint = "build the model, load the weights into it with load_state_dict(), and give that"
    else:
        hint = "where an object keeps its model in an attribute, as a pipeline does, give that"
    given = f"the class {model.__name__}" if isinstance(model, type) else f"{type(model).__name__} {model!r:.60}"
    raise OptionError(f"a model is wanted, a torch.nn.Module, and this is {given}; {hint}")


def raw(module: Any, name: str) -> Any:
    """A parameter of a module as it is stored. Replicas of DataParallel keep theirs among the plain attributes.

    Raises:
        StateError: it is computed by a parametrization.
    """
    parameters = module._parameters
    if name in parameters:
        return parameters[name]
    if name not in module.__dict__ and is_parametrized(module, name):
        raise StateError(
            f"the {name} of an adapted {base_class(module).__name__} was parametrized after inject(). Undo that with "
            f"parametrize.remove_parametrizations(module, {name!r}); or parametrize a layer that is not adapted."
        )
    return module.__dict__[name]


def call_form(module: nn.Module) -> Form | None:
    """The form of the weight of a module that can be called adapted; None if its forward is its own."""
    if hides_forward(module):
        return None
    return "matrix" if is_quantised_linear(module) else class_call_form(base_class(module))


def hides_forward(module: Any) -> bool:
    """Whether a forward that was put on the instance hides that of its class. What only wraps it does not, as hooks of
    accelerate do, which are on every layer of a model that was spread over devices."""
    own = module.__dict__.get(WRAPPED, module.__dict__.get("forward"))
    return own is not None and not is_forward_of(own, module, type(module))


def is_forward_of(function: Any, module: Any, cls: Any) -> bool:
    """Whether a function is the forward of a class, bound to a module."""
    return getattr(function, "__self__", None) is module and function.__func__ is cls.forward


def class_call_form(cls: type[nn.Module]) -> Form | None:
    forward = cls.forward
    if forward is nn.Linear.forward:
        return "matrix"
    if issubclass(cls, nn.Conv1d | nn.Conv2d | nn.Conv3d) and forward in _CONVOLUTIONS:
        return "kernel"
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return "transposed"
    return None


_CONVOLUTIONS: tuple[Callable[..., Any], ...] = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def base_class(module: Any) -> Any:
    """The class of a module; of an adapted one, the class that it had before."""
    classes = type(module).__mro__  # fully_shard may have put classes of its own in front
    return classes[classes.index(Adapted) + 1] if Adapted in classes else classes[0]


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module, Adapted)
