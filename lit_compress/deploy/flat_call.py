"""A network as a function from tensors to tensors, which is what files of runtimes are."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lit_compress.measure.inputs import ExampleInputs, as_call

__all__ = ["FlatCall", "flat_inputs"]


class FlatCall(nn.Module):
    """A network whose arguments and results are flat tuples of tensors.

    Tensors are taken out of nested tuples, lists and dictionaries, in order; other arguments are
    fixed to those of the example.

    Args:
        network: The network, in evaluation mode.
        example_inputs: A tensor, a tuple of arguments or a mapping of keyword arguments.

    Attributes:
        network: The network.
        input_names: One name a tensor, from the arguments of its ``forward``.
    """

    def __init__(self, network: nn.Module, example_inputs: ExampleInputs) -> None:
        super().__init__()
        self.network = network
        leaves, self._spec = tree_flatten(as_call(example_inputs))
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.input_names = _input_names(network, example_inputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Map the tensors among the arguments to those among the results."""
        outputs, _ = self.outputs_of(tensors)
        return outputs

    def outputs_of(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], TreeSpec]:
        """The tensors among the results, and what the results look like with them.

        Raises:
            ValueError: If the network gives something that holds no tensor.
        """
        leaves = list(self._constants)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        results, spec = tree_flatten(self.network(*args, **kwargs))
        outputs = tuple(leaf for leaf in results if isinstance(leaf, Tensor))
        if not outputs:
            raise ValueError(
                f"{type(self.network).__name__} returns no tensor, so that a file of it would give "
                "nothing. Export a network whose forward returns its predictions."
            )
        return outputs, spec


def flat_inputs(example_inputs: ExampleInputs) -> tuple[Tensor, ...]:
    """The tensors of example inputs in the order of `FlatCall`, on the CPU, contiguous."""
    leaves, _ = tree_flatten(as_call(example_inputs))
    return tuple(leaf.detach().cpu().contiguous() for leaf in leaves if isinstance(leaf, Tensor))


def _input_names(network: nn.Module, example_inputs: ExampleInputs) -> tuple[str, ...]:
    """``image`` for an argument of that name, ``image_0`` and so on for a nest of tensors."""
    args, kwargs = as_call(example_inputs)
    arguments: dict[str, Any]
    try:
        arguments = dict(inspect.signature(network.forward).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # no such signature: the call itself will tell
        arguments = {**{f"input_{i}": a for i, a in enumerate(args)}, **kwargs}
    names = []
    for name, value in arguments.items():
        tensors = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
        single = len(tensors) == 1
        names += [name if single else f"{name}_{i}" for i in range(len(tensors))]
    return tuple(names)
