"""A stand-in for a model, to be measured: same structure and code, tensors of its own.

Measuring must not change the model. ``copy.deepcopy`` would double the memory, fails on tensors
that have a gradient history, and follows a LightningModule into its Trainer and data.
``torch.func.functional_call`` leaves behind whatever a forward stores on the module, and the
stale weights of ``nn.LSTM``. A shadow copies the tree of modules and plain containers, puts
chosen tensors in, and refers to everything else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_T = TypeVar("_T")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Shadow:
    """A model's stand-in, in evaluation mode and without hooks.

    Args:
        model: The model to copy; it is not changed.
        replace: Gives the tensor that takes a tensor's place. Called once for each.

    Attributes:
        model: The stand-in. Modules compiled by ``torch.compile`` stand there uncompiled.
    """

    def __init__(self, model: nn.Module, replace: Callable[[Tensor], Tensor]) -> None:
        self._replace = replace
        # Originals stay referenced beside their copies so that no id is used twice.
        self._copies: dict[int, tuple[Any, Any]] = {}
        self.model: nn.Module = self._copy(model)
        # By id: metrics of torchmetrics are modules that define neither == nor hash as usual.
        self._names = {id(self._copy(module)): name for name, module in model.named_modules()}

    def name_of(self, module: nn.Module) -> str | None:
        """The name in the original of one of the stand-in's modules; None for another module."""
        return self._names.get(id(module))

    def _copy(self, value: Any) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)][1]
        if isinstance(value, nn.Module):
            return self._copy_module(value)
        if isinstance(value, Tensor):
            return self._remember(value, self._replace(value))
        if type(value) is list:
            items: list[Any] = self._remember(value, [])
            items.extend(self._copy(item) for item in value)
            return items
        if type(value) in (dict, OrderedDict):
            entries = self._remember(value, type(value)())
            entries.update((key, self._copy(item)) for key, item in value.items())
            return entries
        if type(value) in (tuple, set):
            return type(value)(self._copy(item) for item in value)
        return value

    def _copy_module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return self._remember(module, module)
        compiled_from = module._modules.get("_orig_mod")  # what torch.compile(module) wraps
        if compiled_from is not None:
            uncompiled: nn.Module = self._copy(compiled_from)
            return self._remember(module, uncompiled)
        shadow: nn.Module = self._remember(module, object.__new__(type(module)))
        for key, value in module.__dict__.items():
            shadow.__dict__[key] = OrderedDict() if key in _HOOKS else self._copy(value)
        shadow.__dict__["training"] = False
        shadow.__dict__["_compiled_call_impl"] = None  # what module.compile() sets
        return shadow

    def _remember(self, original: Any, copy: _T) -> _T:
        self._copies[id(original)] = (original, copy)
        return copy


def meta_shadow(model: nn.Module) -> Shadow:
    """A shadow on the meta device: shapes without values, which costs no memory or time."""
    return Shadow(model, _to_meta)


def real_shadow(model: nn.Module) -> Shadow:
    """A shadow on the model's device: parameters are the model's own, other tensors copies."""
    return Shadow(model, lambda t: t if isinstance(t, nn.Parameter) else t.detach().clone())


def _to_meta(tensor: Tensor) -> Tensor:
    meta = torch.empty_like(tensor, device="meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
