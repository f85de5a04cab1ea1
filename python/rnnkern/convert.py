"""Swap the recurrent modules of an existing model for rnnkern's, in place."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from rnnkern import modules

__all__ = ["convert"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNN: modules.RNN,
    nn.LSTMCell: modules.LSTMCell,
    nn.GRUCell: modules.GRUCell,
    nn.RNNCell: modules.RNNCell,
}


def _obstacle(module: nn.Module) -> str | None:
    """Return why a recurrent module cannot be swapped, or None."""
    if type(module) not in _REPLACEMENTS:
        return f"{type(module).__module__}.{type(module).__qualname__} overrides torch's module"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    return None


def _swap(module: nn.Module) -> nn.Module:
    """Return rnnkern's module with the very parameters, buffers, hooks and settings of torch's."""
    new = _REPLACEMENTS[type(module)].__new__(_REPLACEMENTS[type(module)])
    new.__dict__.update(module.__dict__)
    new.__dict__.pop("_compiled_call_impl", None)  # which calls the old module
    hooks: Iterable[Any] = new._load_state_dict_pre_hooks.values()
    for hook in hooks:  # torch's wrapper of one refers to the module weakly
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)
    if isinstance(new, modules.GRU):
        new.reset_after = True
    return new


def _is_compiled(module: nn.Module) -> bool:
    """Return whether this is what torch.compile makes of a module; it goes on calling that one."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def convert(model: ModuleT) -> ModuleT:
    """Replace every ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and cell in `model` by rnnkern's, in place.

    The new modules share the parameters, hooks, mode and settings of the old ones, so optimizers
    that hold the parameters go on working. A module that stands in several places is replaced in
    all of them by one.

    Parameters
    ----------
    model : nn.Module
        Any model; it may itself be a recurrent module, and then the return value is the new one.

    Returns
    -------
    nn.Module
        `model`, or its replacement if it is itself a recurrent module.

    Warns
    -----
    UserWarning
        For each recurrent module that stays as it is (a subclass of torch's, say), with its name
        and why, and for each that was compiled by its own ``compile()``, which is undone.

    Raises
    ------
    TypeError
        If `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    swapped: dict[nn.Module, nn.Module] = {}

    def replacement(name: str, module: nn.Module, parent: nn.Module | None = None) -> nn.Module:
        if module in swapped:
            return swapped[module]
        ours = isinstance(module, modules._Recurrent | modules._Cell)
        if ours or not isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return module
        obstacle = _obstacle(module)
        if parent is not None and _is_compiled(parent):
            obstacle = "torch.compile has it; convert first"
        if obstacle is not None:
            warnings.warn(f"rnnkern.convert: '{name}' stays as it is: {obstacle}", stacklevel=3)
            return module
        if module._compiled_call_impl is not None:
            warnings.warn(
                f"rnnkern.convert: '{name}' is no longer compiled; compile it again", stacklevel=3
            )
        swapped[module] = _swap(module)
        return swapped[module]

    for prefix, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):
            if child is not None:
                full = f"{prefix}.{name}" if prefix else name
                parent._modules[name] = replacement(full, child, parent)
    return replacement("model", model)  # type: ignore[return-value]
