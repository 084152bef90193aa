"""Example inputs: how a model is called when it is measured.

Everywhere in ``measure`` an example input is one of

- a tensor: the model is called as ``model(x)``,
- a tuple or list: ``model(*inputs)``,
- a mapping from argument names: ``model(**inputs)``.

A model that takes one dictionary or list as its only argument gets it inside a tuple:
``({"image": x},)``. This is the convention of Lightning's ``example_input_array``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

ExampleInputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
Measurable: TypeAlias = nn.Module | Callable[..., Any]


def as_call(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn example inputs into positional and keyword arguments.

    Args:
        example_inputs: A tensor, a tuple or list, or a mapping from argument names.

    Returns:
        ``(args, kwargs)`` such that the model is called as ``model(*args, **kwargs)``.

    Raises:
        ValueError: If the inputs are none of these or hold no tensor.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if not isinstance(example_inputs, (tuple, list, Mapping)):
        raise ValueError(
            f"example_inputs is {type(example_inputs).__name__}; expected a tensor, a tuple of "
            "arguments or a dict of keyword arguments. Pass for instance "
            "torch.zeros(1, 3, 224, 224)."
        )
    if not tensors_in(example_inputs):
        raise ValueError(
            f"example_inputs holds no tensor: {example_inputs!r}. Pass one batch as the model "
            "takes it, for instance torch.zeros(1, 3, 224, 224)."
        )
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs), {}


def tensors_in(example_inputs: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries, in order."""
    return [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]


def infer_batch_size(example_inputs: ExampleInputs) -> int:
    """The batch size: the first dimension of the first tensor.

    Raises:
        ValueError: If there is no tensor, the first one is a scalar or its batch is empty.
    """
    as_call(example_inputs)
    first = tensors_in(example_inputs)[0]
    if first.dim() == 0 or first.shape[0] == 0:
        raise ValueError(
            f"The first tensor of example_inputs has shape {tuple(first.shape)}; expected a batch "
            "of at least one example in its first dimension. Pass for instance "
            "torch.zeros(1, 3, 224, 224)."
        )
    return int(first.shape[0])


def with_batch_size(example_inputs: ExampleInputs, batch_size: int) -> ExampleInputs:
    """Repeat or cut the examples to another batch size.

    Every tensor whose first dimension is the present batch size is changed to
    ``(batch_size, ...)``; other tensors and plain values stay.

    Raises:
        ValueError: If ``batch_size`` is below 1, or as `infer_batch_size`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1.")
    present = infer_batch_size(example_inputs)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != present:
            return leaf
        return leaf[torch.arange(batch_size, device=leaf.device) % present]

    resized: ExampleInputs = tree_map(resize, example_inputs)
    return resized


def map_tensors(example_inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor, keeping the structure."""
    return tree_map(
        lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, example_inputs
    )


def describe(example_inputs: ExampleInputs) -> str:
    """Shapes and dtypes for an error message, such as ``(1, 3, 32, 32) float32``."""
    return ", ".join(
        f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for tensor in tensors_in(example_inputs)
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode, and each back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def prepared(model: Measurable) -> Iterator[None]:
    """Evaluation mode without gradients for a module; nothing for a plain function.

    Not ``inference_mode``: a tensor that the model caches under it could never be trained with.
    """
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(evaluating(model))
            stack.enter_context(torch.no_grad())
        yield


def device_of(model: Measurable, example_inputs: ExampleInputs) -> torch.device:
    """The first device that is not the CPU among parameters and inputs, or the CPU."""
    tensors = list(tensors_in(example_inputs))
    if isinstance(model, nn.Module):
        tensors.extend(model.parameters())
    devices = [tensor.device for tensor in tensors if tensor.device.type != "cpu"]
    return devices[0] if devices else torch.device("cpu")


def call_error(model: Measurable, example_inputs: ExampleInputs, error: Exception) -> ValueError:
    """The error to raise where a model fails on its example inputs; it gives their shapes."""
    name = type(model).__name__ if isinstance(model, nn.Module) else repr(model)
    return ValueError(
        f"{name} raised {type(error).__name__} on example_inputs of {describe(example_inputs)}: "
        f"{error}. Pass one batch as it takes it, on its device."
    )
