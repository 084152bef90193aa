"""Simulate fixed point in float32: parameters, running statistics and activations.

Sums and products stay in float32. That tells how many bits a chip with such numbers needs, and
costs accuracy only: nothing gets smaller or faster by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from lit_compress.compress.calibration import Forward, evaluation_mode
from lit_compress.compress.quantization.formats.fixed_point_grid import (
    FixedPointGrid,
    fixed_point_grid,
)
from lit_compress.compress.quantization.formats.fixed_point_record import (
    FixedPoint,
    FixedPointRecord,
    FixedPointTensor,
    TensorKind,
)

__all__ = [
    "FixedPoint",
    "FixedPointRecord",
    "FixedPointRounding",
    "FixedPointTensor",
    "apply_fixed_point",
    "quantize_fixed_point",
    "remove_fixed_point",
]

Hook: TypeAlias = Callable[[nn.Module, Any, Any], Any]

_UNCHANGING = (nn.Identity, _DropoutNd, nn.Flatten, nn.Unflatten)
"""Layers whose outputs, in evaluation mode, are numbers that came in."""


class FixedPointRounding:
    """The rounding of a network's activations, at work until it is removed.

    Args:
        record: What is rounded.
        handles: Of the hooks that do it.
    """

    def __init__(self, record: FixedPointRecord, handles: Iterable[RemovableHandle]) -> None:
        self.record = record
        self._handles = tuple(handles)

    def remove(self) -> None:
        """Stop rounding activations; parameters and statistics stay as they are."""
        for handle in self._handles:
            handle.remove()


def quantize_fixed_point(
    network: nn.Module,
    fixed_point: FixedPoint,
    batches: Iterable[Any] = (),
    forward: Forward = lambda network, batch: network(batch),
) -> FixedPointRounding:
    """Round a network: parameters and statistics in place, activations from now on.

    Each parameter and statistic has a grid of its own. Activations are the outputs of the layers
    without sub-layers (and of ``nn.MultiheadAttention``), one grid a layer, that of the widest
    batch; results of plain functions are not rounded, and a layer that no batch reaches is not
    either. Gradients pass the rounding of activations unchanged (straight-through estimator). Take
    a ``copy.deepcopy`` first to keep the float network.

    Args:
        network: In evaluation mode meanwhile; unchanged if anything fails.
        fixed_point: What is rounded, to how many bits.
        batches: Calibration batches from training data; needed, and run twice, only for
            activations: for their ranges, then for the overflow.
        forward: Runs the network on one batch.

    Returns:
        The rounding at work, with the record for :func:`apply_fixed_point`.

    Raises:
        ValueError: If activations are to be rounded and there is no batch, a tensor holds NaN or
            infinite values, or the network's activations are rounded already.
    """
    _refuse_rounded(network)
    before: list[tuple[Tensor, Tensor]] = []
    rounded: list[FixedPointTensor] = []
    finished = False
    try:
        for name, kind, tensor in _stored_tensors(network):
            bits = fixed_point.bits_of(kind)
            if bits is not None:
                before.append((tensor, tensor.detach().clone()))
                rounded.append(_round_stored(name, kind, tensor, bits, fixed_point))
        if fixed_point.activation_bits is not None:
            rounded += _calibrate(network, fixed_point, list(batches), forward)
        finished = True
    finally:
        if not finished:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
    return apply_fixed_point(network, FixedPointRecord(fixed_point, tuple(rounded)))


def apply_fixed_point(network: nn.Module, record: FixedPointRecord) -> FixedPointRounding:
    """Round the activations of a network as those of another were; its state dict has the rest.

    Args:
        network: A network of the same structure.
        record: What :func:`quantize_fixed_point` found for the other.

    Raises:
        ValueError: If a layer of the record is missing, or the network's activations are rounded
            already.
    """
    _refuse_rounded(network)
    layers = dict(network.named_modules())
    grids = {t.name: t.grid for t in record.tensors if t.kind == "activation"}
    missing = next((name for name in grids if name not in layers), None)
    if missing is not None:
        raise ValueError(
            f"the record rounds the outputs of {missing!r}, which this {type(network).__name__} "
            "lacks. Apply the record to a network built as the rounded one was."
        )
    handles = [
        layers[name].register_forward_hook(_RoundOutputs(grid)) for name, grid in grids.items()
    ]
    return FixedPointRounding(record, handles)


def remove_fixed_point(network: nn.Module, record: FixedPointRecord) -> None:
    """Stop rounding the activations of a network; parameters and statistics stay as they are.

    Args:
        network: From :func:`quantize_fixed_point` or :func:`apply_fixed_point`, or a copy of it,
            which no :class:`FixedPointRounding` knows.
        record: What is rounded.
    """
    for tensor in record.tensors:
        if tensor.kind == "activation":
            hooks = network.get_submodule(tensor.name)._forward_hooks
            for key in [k for k, hook in hooks.items() if isinstance(hook, _RoundOutputs)]:
                del hooks[key]


@dataclass(frozen=True)
class _RoundOutputs:
    """A hook; a class, not a closure, so that copies and pickles of it work."""

    grid: FixedPointGrid

    def __call__(self, layer: nn.Module, args: Any, outputs: Any) -> Any:
        return tree_map(self._round, outputs)

    def _round(self, output: Any) -> Any:
        if not _is_real(output):
            return output
        rounded = self.grid.round(output.detach())
        return output + (rounded - output).detach() if output.requires_grad else rounded


def _refuse_rounded(network: nn.Module) -> None:
    for name, layer in network.named_modules():
        if any(isinstance(hook, _RoundOutputs) for hook in layer._forward_hooks.values()):
            raise ValueError(
                f"the outputs of {name!r} are rounded to fixed point already; call remove() of "
                "that rounding first, or begin with the float network."
            )


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _stored_tensors(network: nn.Module) -> Iterator[tuple[str, TensorKind, Tensor]]:
    """Floating-point parameters, then running statistics; shared ones once."""
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point():
            yield name, "parameter", parameter
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point() and name.rpartition(".")[2].startswith("running_"):
            yield name, "running_stat", buffer


@torch.no_grad()
def _round_stored(
    name: str, kind: TensorKind, tensor: Tensor, bits: int, fixed_point: FixedPoint
) -> FixedPointTensor:
    grid = _grid_of(name, tensor, bits, fixed_point)
    overflow = grid.num_overflow(tensor)
    tensor.copy_(grid.round(tensor))
    return FixedPointTensor(name, kind, grid, tensor.numel(), overflow)


def _grid_of(name: str, tensor: Tensor, bits: int, fixed_point: FixedPoint) -> FixedPointGrid:
    try:
        return fixed_point_grid(tensor, bits, fixed_point.method, fixed_point.overflow_rate)
    except ValueError as error:
        raise ValueError(f"{name!r} cannot be rounded to fixed point: {error}") from error


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers whose outputs are rounded."""
    layers: dict[str, nn.Module] = {}
    for name, layer in network.named_modules():
        inner = [child for child, _ in layer.named_children() if child != "parametrizations"]
        whole = not inner or isinstance(layer, nn.MultiheadAttention)
        of_a_weight = "parametrizations" in name.split(".")
        if whole and not of_a_weight and not isinstance(layer, _UNCHANGING):
            layers[name] = layer
    return layers


def _calibrate(
    network: nn.Module, fixed_point: FixedPoint, batches: list[Any], forward: Forward
) -> list[FixedPointTensor]:
    """The grids of activations, and what overflows once all of them are rounded."""
    bits = cast(int, fixed_point.activation_bits)
    if not batches:
        raise ValueError(
            "batches is empty, so the ranges of activations are unknown; give at least one "
            "calibration batch, or activation_bits=None."
        )
    grids: dict[str, FixedPointGrid] = {}
    num_values: dict[str, int] = {}
    num_overflow: dict[str, int] = {}

    def find_range(name: str, output: Tensor) -> None:
        grid = _grid_of(f"the output of {name}", output, bits, fixed_point)
        grids[name] = grids[name].union(grid) if name in grids else grid

    def count(name: str, output: Tensor) -> None:
        num_values[name] = num_values.get(name, 0) + output.numel()
        num_overflow[name] = num_overflow.get(name, 0) + grids[name].num_overflow(output)

    layers = _layers(network)
    _watch(network, layers, lambda name: [_of_each(name, find_range)], batches, forward)
    reached = {name: layer for name, layer in layers.items() if name in grids}
    _watch(
        network,
        reached,
        lambda name: [_of_each(name, count), _RoundOutputs(grids[name])],
        batches,
        forward,
    )
    return [
        FixedPointTensor(name, "activation", grids[name], num_values[name], num_overflow[name])
        for name in reached
    ]


def _of_each(name: str, see: Callable[[str, Tensor], None]) -> Hook:
    """A hook that looks at each floating-point output of a layer."""

    def hook(layer: nn.Module, args: Any, outputs: Any) -> None:
        for output in tree_leaves(outputs):
            if _is_real(output):
                see(name, output)

    return hook


def _watch(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    hooks_of: Callable[[str], list[Hook]],
    batches: list[Any],
    forward: Forward,
) -> None:
    """Run the batches with hooks on layers."""
    handles = [
        layer.register_forward_hook(hook)
        for name, layer in layers.items()
        for hook in hooks_of(name)
    ]
    try:
        with evaluation_mode(network), torch.no_grad():
            for batch in batches:
                forward(network, batch)
    finally:
        for handle in handles:
            handle.remove()
