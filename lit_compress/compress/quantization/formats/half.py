"""Convert networks to float16 or bfloat16 that still take and give float32.

Half the size. Speed is another matter: on the CPU bfloat16 is up to 4 times as fast as float32
where the processor has instructions for it and the layers are wide, and float16 is 4 to 28 times
*slower*; float16 is for GPUs, for phones and for the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map

__all__ = ["HalfPrecision", "apply_half", "remove_half", "to_half"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
T = TypeVar("T")


@dataclass(frozen=True)
class HalfPrecision:
    """What a network was put into; plain data.

    Attributes:
        dtype: ``"float16"`` or ``"bfloat16"``.
        kept: Qualified names of the tensors that stay in float32: parameters and running
            statistics of batch and instance norms.
        num_flushed: By name, how many values other than zero became zero; only where there are
            some.
    """

    dtype: str
    kept: tuple[str, ...]
    num_flushed: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(_DTYPES)}.")

    def to_plain(self) -> dict[str, Any]:
        """Dictionaries, lists, numbers and strings, for JSON or a checkpoint."""
        return {
            "dtype": self.dtype,
            "kept": list(self.kept),
            "num_flushed": dict(self.num_flushed),
        }

    @classmethod
    def from_plain(cls, plain: Any) -> HalfPrecision:
        """What :meth:`to_plain` gave, also after a turn through JSON.

        Raises:
            ValueError: If it is anything else.
        """
        try:
            flushed = {str(name): int(count) for name, count in plain["num_flushed"].items()}
            return cls(plain["dtype"], tuple(str(name) for name in plain["kept"]), flushed)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{str(plain)[:200]!r} is no record of half precision ({error}); expected "
                "{'dtype': ..., 'kept': [...], 'num_flushed': {...}} as HalfPrecision.to_plain has "
                "it."
            ) from error


def to_half(network: nn.Module, dtype: torch.dtype = torch.float16) -> HalfPrecision:
    """Store the weights of a network in half precision, in place, and compute in it.

    Inputs of the network are cast on the way in and its outputs to float32 on the way out, however
    they are nested, so that losses and metrics see what they always saw. Batch and instance norms
    keep their parameters and running statistics in float32; torch takes half inputs beside them.
    Gradients that parameters hold are dropped; the parameters stay the same objects. Training in
    float16 needs float32 weights and a loss scale, so this is for the end of the run.

    Args:
        network: Called as a module; a call of another method of it is not cast.
        dtype: ``torch.float16`` (10 bits of precision, up to 65504) or ``torch.bfloat16`` (7 bits,
            the range of float32).

    Returns:
        The record with which :func:`apply_half` prepares a network for the state dict of this one.

    Raises:
        ValueError: If the type is another one, a tensor holds NaN or finite values that the type
            does not, or the network is in half precision already; nothing was changed then.
    """
    name = str(dtype).removeprefix("torch.")
    if _DTYPES.get(name) is not dtype:
        raise ValueError(f"dtype is {dtype}, expected torch.float16 or torch.bfloat16.")
    flushed: dict[str, int] = {}
    for tensor_name, tensor in _cast_tensors(network):
        count = _flushed_to_zero(tensor_name, tensor.detach(), dtype)
        if count:
            flushed[tensor_name] = count
    kept = tuple(
        f"{owner}.{short}".lstrip(".")
        for owner, module in network.named_modules()
        if isinstance(module, _NormBase)
        for short, tensor in _own_tensors(module)
        if tensor.is_floating_point()
    )
    record = HalfPrecision(name, kept, flushed)
    apply_half(network, record)
    return record


def apply_half(network: nn.Module, record: HalfPrecision) -> None:
    """Make a float32 network one of half precision, so that it takes the state dict of another.

    Args:
        network: A network of the same structure, in place; its values are cast without a check.
        record: What :func:`to_half` returned for the other.

    Raises:
        ValueError: If the network is in half precision already.
    """
    if any(isinstance(hook, _CastInputs) for hook in network._forward_pre_hooks.values()):
        raise ValueError(
            f"this {type(network).__name__} is in half precision already; give a float32 network."
        )
    dtype = _DTYPES[record.dtype]
    for module in network.modules():
        own = torch.float32 if isinstance(module, _NormBase) else dtype
        for _, tensor in _own_tensors(module):
            if tensor.is_floating_point():
                tensor.grad = None
                tensor.data = tensor.data.to(own)
    network.register_forward_pre_hook(_CastInputs(dtype), with_kwargs=True)
    network.register_forward_hook(_CastOutputs())


def remove_half(network: nn.Module, record: HalfPrecision) -> None:
    """Make a network of half precision one of float32; its values stay rounded.

    Args:
        network: From :func:`to_half` or :func:`apply_half`, in place.
        record: The record of that.
    """
    for hooks in (network._forward_pre_hooks, network._forward_hooks):
        for key in [k for k, hook in hooks.items() if isinstance(hook, _CastInputs | _CastOutputs)]:
            del hooks[key]
            network._forward_pre_hooks_with_kwargs.pop(key, None)
    for module in network.modules():
        for _, tensor in _own_tensors(module):
            if tensor.dtype == _DTYPES[record.dtype]:
                tensor.grad = None
                tensor.data = tensor.data.float()


@dataclass(frozen=True)
class _CastInputs:
    """A hook before the call; a class, not a closure, so that copies and pickles of it work."""

    dtype: torch.dtype

    def __call__(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _cast(args, self.dtype), _cast(kwargs, self.dtype)


@dataclass(frozen=True)
class _CastOutputs:
    def __call__(self, network: nn.Module, args: tuple[Any, ...], output: T) -> T:
        return _cast(output, torch.float32)


def _cast(values: T, dtype: torch.dtype) -> T:
    """Floating-point tensors in nested containers cast; everything else as it is."""
    cast: T = tree_map(
        lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values
    )
    return cast


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _cast_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors outside of batch and instance norms, shared ones once."""
    seen: set[int] = set()
    for owner, module in network.named_modules():
        if isinstance(module, _NormBase):
            continue
        for short, tensor in _own_tensors(module):
            if tensor.is_floating_point() and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{owner}.{short}".lstrip("."), tensor


def _flushed_to_zero(name: str, tensor: Tensor, dtype: torch.dtype) -> int:
    """How many values other than zero become zero; complains where finite ones become infinite."""
    if bool(tensor.isnan().any()):
        raise ValueError(f"{name!r} holds NaN; load the weights of a run that did not diverge.")
    half = tensor.to(dtype)
    lost = half.isinf() & tensor.isfinite()
    if bool(lost.any()):
        value = float(tensor[lost].flatten()[0])
        fix = (
            "Give dtype=torch.bfloat16, which has the range of float32, or scale the layer down."
            if dtype == torch.float16
            else "Scale the layer down."
        )
        raise ValueError(
            f"{name!r} holds {value:g}, beyond the range of {str(dtype).removeprefix('torch.')} "
            f"(up to {torch.finfo(dtype).max:g}). {fix}"
        )
    return int(((half == 0) & (tensor != 0)).sum())
