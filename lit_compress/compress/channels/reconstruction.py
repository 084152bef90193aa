"""Reconstruct weights after a cut by least squares, to make up for the removed channels.

After a cut, every layer that read removed channels gets the weights with which its output, from the
channels that are left, is nearest to what it was in the dense model (He et al. 2017, "Channel
Pruning for Accelerating Very Deep Neural Networks", section 3.2; as done in He et al. 2018, "AMC",
on a few random output positions of each image). No training is needed, only calibration batches
without labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_compress.compress.calibration import Forward, evaluation_mode
from lit_compress.compress.channels.cut import KeptIndices
from lit_compress.compress.channels.groups import ChannelGroups, LeftAlone
from lit_compress.compress.channels.layer_calls import in_forward_order, watch_calls
from lit_compress.compress.channels.normal_equations import NormalEquations
from lit_compress.compress.channels.output_samples import (
    Layer,
    channels_at_end,
    input_patches,
    sample_positions,
)

__all__ = [
    "ReconstructedLayer",
    "Reconstruction",
    "gather_equations",
    "layers_to_reconstruct",
    "reason_to_leave",
    "reconstruct",
]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class ReconstructedLayer:
    """One layer with new weights.

    Attributes:
        layer: Its name.
        error_before: Share of the variance of its dense output that it did not explain on the
            calibration samples once channels were gone, at least 0.
        error_after: The same with the new weights.
        num_samples: Output positions that were looked at.
    """

    layer: str
    error_before: float
    error_after: float
    num_samples: int


@dataclass(frozen=True)
class Reconstruction:
    """What :func:`reconstruct` did.

    Attributes:
        layers: The layers with new weights, in forward order.
        left_alone: The layers that lost inputs but kept their weights, and why.
    """

    layers: tuple[ReconstructedLayer, ...]
    left_alone: tuple[LeftAlone, ...]

    def __str__(self) -> str:
        width = max([len("layer"), *(len(layer.layer) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  error before   after"]
        lines += [
            f"{layer.layer:<{width}}  {layer.error_before:12.4f} {layer.error_after:7.4f}"
            for layer in self.layers
        ]
        if self.left_alone:
            lines.append("skipped:")
            lines += [f"  {layer.layer}: {layer.reason}" for layer in self.left_alone]
        return "\n".join(lines)


def reconstruct(
    slim: nn.Module,
    dense: nn.Module,
    groups: ChannelGroups,
    keep: Tensor,
    batches: Iterable[Any],
    forward: Forward,
    *,
    sequential: bool = True,
    num_points: int = 10,
    ridge: float = 1e-2,
    max_bytes: int = 2**30,
    seed: int = 0,
) -> Reconstruction:
    """Give the layers of a cut model that lost inputs new weights and biases, in place.

    Parameters keep their identity, and only ``slim`` changes. A layer without a bias gets none.
    Batch norm statistics stay: if not ``sequential``, it pays to compute them again afterwards, see
    :func:`~lit_compress.compress.batch_norm.recalibrate_batch_norm`; if ``sequential``, the weights
    were made for the dense model's statistics, and new ones fit no better.

    Args:
        slim: The model after the cut, with the layer names of ``dense``.
        dense: The model before it.
        groups: The channels of ``dense``.
        keep: What the cut kept: bool, shape ``[groups.num_channels]``.
        batches: Calibration batches from training data, gone through more than once: a list or a
            loader, not an iterator. Their images times ``num_points`` should be several times the
            inputs (channels times kernel) of the widest layer.
        forward: Runs a model on one batch.
        sequential: Each layer's inputs come from ``slim`` with all layers before it done, so that
            errors do not add up (section 3.3 of the paper, "asymmetric"); runs both models over
            all batches once for each layer. If false, inputs come from ``dense``, which runs once
            for as many layers as ``max_bytes`` holds.
        num_points: Output positions looked at in each image and layer, at least 1.
        ridge: Pull towards the weights there are, at least 0; see :meth:`NormalEquations.solve`.
        max_bytes: Bound on the sums kept at a time if not ``sequential``; a single layer may pass
            it. A solve takes about three times the layer's share on top.
        seed: For the positions.

    Returns:
        The layers and their errors before and after.

    Raises:
        ValueError: If ``slim`` is not ``dense`` cut by ``keep``, ``batches`` is empty or an
            iterator, an argument is out of range, or a layer's input or output holds NaN or
            infinity.
    """
    kept = groups.kept_indices(keep)
    ordered, left_alone = _layers_to_solve(slim, dense, groups, kept, _first(batches), forward)
    done = []
    chunks = [[layer] for layer in ordered] if sequential else _chunks(ordered, dense, max_bytes)
    for chunk in chunks:
        equations = gather_equations(
            chunk,
            dense,
            batches,
            forward,
            inputs_from=slim if sequential else dense,
            num_points=num_points,
            seed=seed,
        )
        for layer in chunk:
            inputs, outputs = _columns(dense, layer, kept)
            module = cast(Layer, slim.get_submodule(layer))
            inputs_left = None if sequential else inputs  # slim's inputs are cut already
            done.append(_rewrite(layer, module, equations.pop(layer), inputs_left, outputs, ridge))
    return Reconstruction(tuple(done), left_alone)


def gather_equations(
    layers: Sequence[str],
    dense: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    *,
    inputs_from: nn.Module | None = None,
    num_points: int = 10,
    seed: int = 0,
) -> dict[str, NormalEquations]:
    """Gather the regression of layers' dense outputs on their inputs, in one pass.

    With the inputs of the dense model, any choice of channels can be solved from the result.

    Args:
        layers: Names of convolutions (not grouped) or linear layers.
        dense: The model whose outputs are wanted.
        batches: Calibration batches, at least one.
        forward: Runs a model on one batch.
        inputs_from: The model whose inputs are used; ``dense`` by default.
        num_points: Output positions looked at in each image and layer, at least 1; all of them
            where a layer has fewer.
        seed: For the positions.

    Returns:
        For each layer that was called, equations with one input for each weight of an output
        (ordered as ``weight.flatten(1)``) and one output for each output channel.

    Raises:
        ValueError: If ``batches`` is empty, ``num_points`` is below 1, the models call the layers
            differently, or a layer's input or output holds NaN or infinity.
    """
    if num_points < 1:
        raise ValueError(f"num_points is {num_points}, expected at least 1.")
    source = dense if inputs_from is None else inputs_from
    gathering = _Gathering(num_points, seed)
    num_calls: int | None = None  # of all layers in one batch, known after the first
    with evaluation_mode(dense, source), torch.no_grad():
        for batch in batches:
            if source is dense:
                num_calls = watch_calls(
                    layers, dense, batch, forward, gathering.see_both, num_calls
                )
            else:
                num_calls = watch_calls(
                    layers, dense, batch, forward, gathering.see_output, num_calls
                )
                watch_calls(layers, source, batch, forward, gathering.see_input, num_calls)
    if num_calls is None:
        raise ValueError("batches is empty; give at least one calibration batch.")
    return gathering.equations


def layers_to_reconstruct(dense: nn.Module, groups: ChannelGroups) -> list[str]:
    """The layers that can get new weights if any of their input channels go.

    Args:
        dense: The model.
        groups: Its channels.
    """
    readers = dict.fromkeys(
        axis.tensor.removesuffix(".weight") for axis in groups.axes if axis.role == "in"
    )
    return [layer for layer in readers if reason_to_leave(dense, layer) is None]


class _Gathering:
    """Equations of layers, fed with their calls: the wanted output first, then the input."""

    def __init__(self, num_points: int, seed: int) -> None:
        self.equations: dict[str, NormalEquations] = {}
        self._num_points = num_points
        self._generator = torch.Generator().manual_seed(seed)
        self._wanted: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # positions and outputs

    def see_both(self, layer: str, call: int, module: Layer, x: Tensor, y: Tensor) -> None:
        self.see_output(layer, call, module, x, y)
        self.see_input(layer, call, module, x, y)

    def see_output(self, layer: str, call: int, module: Layer, x: Tensor, y: Tensor) -> None:
        y = channels_at_end(module, y)
        positions = sample_positions(y.shape, self._num_points, self._generator)
        self._wanted[layer, call] = positions, y[tuple(positions.to(y.device))]

    def see_input(self, layer: str, call: int, module: Layer, x: Tensor, y: Tensor) -> None:
        if (layer, call) not in self._wanted:
            raise ValueError(
                f"{layer!r} is called more often in one model than in the other; the slim model "
                "must run as the dense one does."
            )
        positions, wanted = self._wanted.pop((layer, call))
        patches = input_patches(module, x, positions.to(x.device))
        if layer not in self.equations:
            device = "cpu" if x.device.type == "mps" else x.device  # mps has no float64
            self.equations[layer] = NormalEquations(patches.shape[1], wanted.shape[1], device)
        try:
            self.equations[layer].add(patches, wanted)
        except ValueError as error:
            raise ValueError(f"layer {layer!r}, on a calibration batch: {error}") from error


# --- Layers ---------------------------------------------------------------------------------------


def _layers_to_solve(
    slim: nn.Module,
    dense: nn.Module,
    groups: ChannelGroups,
    kept: KeptIndices,
    batch: Any,
    forward: Forward,
) -> tuple[list[str], tuple[LeftAlone, ...]]:
    """The layers that get new weights, in forward order, and the others that lost inputs."""
    candidates = _layers_that_lost_inputs(groups, kept)
    reasons = {layer: reason_to_leave(dense, layer) for layer in candidates}
    solvable = [layer for layer, reason in reasons.items() if reason is None]
    for layer in solvable:
        _check_slim(slim, dense, layer, kept)
    ordered = in_forward_order(solvable, dense, batch, forward) if solvable else []
    reasons |= {layer: "its forward is not called" for layer in solvable if layer not in ordered}
    left_alone = (LeftAlone(layer, reason) for layer, reason in reasons.items() if reason)
    return ordered, tuple(left_alone)


def _layers_that_lost_inputs(groups: ChannelGroups, kept: KeptIndices) -> list[str]:
    return [
        axis.tensor.removesuffix(".weight")
        for axis in groups.axes
        if axis.role == "in" and axis.dim in kept.get(axis.tensor, {})
    ]


def reason_to_leave(model: nn.Module, layer: str) -> str | None:
    """Why a layer cannot get new weights by least squares; ``None`` where it can.

    Args:
        model: The model.
        layer: The layer's name.
    """
    module = dict(model.named_modules(remove_duplicate=False)).get(layer)
    if module is None:
        return "is no weight of a convolution or linear layer"
    if not isinstance(module, (*_CONV, nn.Linear)):
        return f"{type(module).__name__} is no convolution or linear layer"
    if isinstance(module, _CONV) and module.groups > 1:
        return "is a grouped convolution"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a parametrization"
    owners = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight
    ]
    if len(owners) > 1:
        return f"its weight is shared: {', '.join(owners)}"
    return None


def _check_slim(slim: nn.Module, dense: nn.Module, layer: str, kept: KeptIndices) -> None:
    expected = list(dense.get_parameter(f"{layer}.weight").shape)
    for dim, indices in kept[f"{layer}.weight"].items():
        expected[dim] = indices.numel()
    weights = dict(slim.named_parameters(remove_duplicate=False))
    weight = weights.get(f"{layer}.weight")
    if weight is None or list(weight.shape) != expected:
        came = "no such weight" if weight is None else f"shape {tuple(weight.shape)}"
        raise ValueError(
            f"the slim model has {came} at {layer}.weight, expected {tuple(expected)}; pass the "
            "groups and the choice that it was cut by."
        )


def _columns(dense: nn.Module, layer: str, kept: KeptIndices) -> tuple[Tensor, Tensor | None]:
    """The inputs and outputs of a layer's equations that are left."""
    weight = dense.get_parameter(f"{layer}.weight")
    taps = weight[0, 0].numel()
    indices = kept[f"{layer}.weight"]
    inputs = (indices[1].unsqueeze(1) * taps + torch.arange(taps)).flatten()
    return inputs, indices.get(0)


def _rewrite(
    layer: str,
    module: Layer,
    equations: NormalEquations,
    inputs: Tensor | None,
    outputs: Tensor | None,
    ridge: float,
) -> ReconstructedLayer:
    weight, bias = module.weight.detach().flatten(1), module.bias
    before = equations.error(weight, bias, inputs=inputs, outputs=outputs)
    solved, offset = equations.solve(weight, bias, inputs=inputs, outputs=outputs, ridge=ridge)
    with torch.no_grad():
        module.weight.copy_(solved.view_as(module.weight))
        if bias is not None and offset is not None:
            bias.copy_(offset)
    after = equations.error(module.weight.flatten(1), bias, inputs=inputs, outputs=outputs)
    return ReconstructedLayer(layer, before, after, equations.num_samples)


def _chunks(layers: Sequence[str], dense: nn.Module, max_bytes: int) -> list[list[str]]:
    """Runs of layers whose equations take at most ``max_bytes`` together, at least one layer."""
    chunks: list[list[str]] = []
    held = 0
    for layer in layers:
        outputs, inputs = dense.get_parameter(f"{layer}.weight").flatten(1).shape
        size = 8 * inputs * (inputs + outputs)
        if not chunks or held + size > max_bytes:
            chunks.append([])
            held = 0
        chunks[-1].append(layer)
        held += size
    return chunks


def _first(batches: Iterable[Any]) -> Any:
    if iter(batches) is batches:
        raise ValueError(
            "batches is an iterator, which runs out after one pass; give a list or a DataLoader."
        )
    for batch in batches:
        return batch
    raise ValueError("batches is empty; give at least one calibration batch.")
