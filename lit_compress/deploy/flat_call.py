"""FlatCall: a network as a function from a flat tuple of tensors to another."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_unflatten,
)

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
        fixed_batch: Whether the network takes batches of this size only.
        input_names: One name a tensor, from the arguments of its ``forward`` and the keys of
            dictionaries in them; see `_input_names`.
    """

    def __init__(self, network: nn.Module, example_inputs: ExampleInputs) -> None:
        super().__init__()
        self.network = network
        self.fixed_batch = False
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
    """One name a tensor, in the order of `FlatCall`.

    ``image`` for an argument of that name or key, ``boxes_left`` for a key of a nested dictionary,
    ``boxes_0`` for a place in a nested list, left out where it is the only one. Of a dictionary
    that is the only argument the keys are the names. Letters, digits and underscores, each once.
    """
    args, kwargs = as_call(example_inputs)
    positional = _names_of_positions(network, len(args))
    alone = len(args) == 1 and not kwargs and isinstance(args[0], Mapping)
    names: list[str] = []
    leaves: list[tuple[Any, Any]] = list(tree_flatten_with_path((args, kwargs))[0])
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            continue
        kind, first, *inner = path
        top = args[first.idx] if kind.idx == 0 else kwargs[first.key]
        name = positional[first.idx] if kind.idx == 0 else str(first.key)
        parts = [_of_key(key) for key in inner]
        if alone:
            name = parts.pop(0)
        if sum(isinstance(part, Tensor) for part in tree_leaves(top)) == 1:
            parts = [part for part in parts if not part.isdigit()]
        names.append(_unique("_".join([name, *parts]), names))
    return tuple(names)


def _names_of_positions(network: nn.Module, count: int) -> list[str]:
    """Names of positional arguments; of ``*tensors`` the first is ``tensors_0``."""
    try:
        parameters = list(inspect.signature(network.forward).parameters.values())
    except (TypeError, ValueError):  # some forwards have no signature
        parameters = []
    places = [p for p in parameters if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
    names = []
    for index in range(count):
        place = places[min(index, len(places) - 1)] if places else None
        if place is None:
            names.append(f"input_{index}")
        elif place.kind is place.VAR_POSITIONAL:
            names.append(f"{place.name}_{index - len(places) + 1}")
        else:
            names.append(place.name)
    return names


def _of_key(key: Any) -> str:
    for kind in ("key", "idx", "name"):
        if hasattr(key, kind):
            return str(getattr(key, kind))
    return str(key)


def _unique(name: str, taken: Sequence[str]) -> str:
    """A name that every runtime takes and that no other input has."""
    name = re.sub(r"\W", "_", name, flags=re.ASCII)
    name = name if name[:1].isalpha() or name[:1] == "_" else f"input_{name}"
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    return found
