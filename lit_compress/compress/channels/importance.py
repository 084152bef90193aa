"""Channel importance: one score for each channel; those with the highest scores stay.

A channel that several layers make together (a residual sum, a depthwise convolution behind it) has
one score for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lit_compress.compress.channels.groups import ChannelAxis, ChannelGroups
from lit_compress.compress.channels.statistics import (
    ActivationStatistic,
    channel_parameters,
    sum_by_channel,
    sum_other_dims,
)

__all__ = [
    "ACTIVATION_STATISTICS",
    "IMPORTANCES",
    "Importance",
    "ImportanceFunction",
    "ImportanceKind",
    "Normalization",
    "channel_importance",
]

ImportanceKind = Literal[
    "l1",
    "l2",
    "group",
    "bn_scale",
    "taylor",
    "fpgm",
    "apoz",
    "activation",
    "contribution",
    "lamp",
    "random",
]
Normalization = Literal["none", "mean", "max"]
ImportanceFunction: TypeAlias = Callable[[nn.Module, ChannelGroups], Tensor]
Importance: TypeAlias = ImportanceKind | ImportanceFunction

ACTIVATION_STATISTICS: dict[str, ActivationStatistic] = {
    "apoz": "nonzero",
    "activation": "magnitude",
    "contribution": "contribution",
}
"""The kinds that need activations, and the statistic of each."""

_COMPARABLE = ("taylor", "lamp", "random")  # scores of different groups compare as they are


def channel_importance(
    model: nn.Module,
    groups: ChannelGroups,
    kind: Importance = "l2",
    *,
    normalize: Normalization | None = None,
    measured: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Score every channel; those with the highest scores are to stay.

    - ``"l1"``, ``"l2"``: norm of the weights that make it, depthwise ones included (Li et al. 2017,
      "Pruning Filters for Efficient ConvNets", section 3.1).
    - ``"group"``: mean, over all tensors that make, scale or read it, of its sum of squares there;
      norms count by their weight (Fang et al. 2023, "DepGraph", equation 6 without its sparse
      training). What is read with small weights matters little, however large it is made.
    - ``"bn_scale"``: absolute scale of its norm layers (Liu et al. 2017, "Network Slimming",
      section 3); l2 in groups without a norm.
    - ``"taylor"``: squared first-order change of the loss without it (Molchanov et al. 2019,
      "Importance Estimation for Neural Network Pruning", equation 8).
    - ``"fpgm"``: sum of distances to the group's other filters (He et al. 2019, "Filter Pruning via
      Geometric Median", equation 6): filters that others can stand in for go first.
    - ``"apoz"``: share of values that are not zero where it is read (Hu et al. 2016, "Network
      Trimming", equation 1); says little behind GELU or SiLU, which are hardly ever zero.
    - ``"activation"``: mean absolute value where it is read.
    - ``"contribution"``: share of the output variance of the layers that read it, which is what is
      lost with it: the error of He et al. 2017 ("Channel Pruning for Accelerating Very Deep Neural
      Networks", equation 1), were the channels uncorrelated and the mean made up for.
    - ``"lamp"``: squared l2 norm over the sum of those in the group not smaller (Lee et al. 2021,
      "Layer-Adaptive Sparsity for the Magnitude-based Pruning", equation 3).
    - ``"random"``: uniform in [0, 1).

    Where several layers make a channel (l1, l2, bn_scale, fpgm, lamp), each layer's scores are
    first divided by their mean in the group, then averaged over the layers, so that no layer
    outweighs the others by its scale; Fang et al. 2023 ("DepGraph", section 3.3) add them up as
    they are. The average is multiplied by the mean over the layers of those means, so that with
    one layer a score is the plain norm. A group without such a weight is scored by its per-channel
    parameters, and without those all of its channels are equal.

    Args:
        model: The module that was traced.
        groups: Its channels.
        kind: One of the above, or a function of the model and the groups that gives the scores,
            shape ``[num_channels]``.
        normalize: What each score is divided by, so that groups compare: ``"mean"`` or ``"max"`` of
            its group, or ``"none"``. By default ``"mean"``, but ``"none"`` for taylor, lamp and
            random, which compare as they are, and for a function.
        measured: For ``"taylor"`` what
            :func:`~lit_compress.compress.channels.statistics.measure_taylor` gives, for ``"apoz"``,
            ``"activation"`` and ``"contribution"`` what
            :func:`~lit_compress.compress.channels.statistics.measure_activations` gives; shape
            ``[num_channels]``. Groups with a NaN in it are scored by l2.
        seed: For ``"random"``.

    Returns:
        float32 on the CPU, shape ``[num_channels]``, finite.

    Raises:
        ValueError: If ``kind`` or ``normalize`` is unknown, ``measured`` is missing, superfluous
            or of another shape, a parameter holds NaN or infinity, or the groups do not fit the
            model.
    """
    if normalize not in (None, "none", "mean", "max"):
        raise ValueError(f"normalize is {normalize!r}, expected 'none', 'mean' or 'max'.")
    if callable(kind):
        scores = _checked(kind(model, groups), f"importance {kind!r} gave", groups)
        return _normalized(scores, groups, normalize or "none")
    if kind not in IMPORTANCES:
        raise ValueError(
            f"importance is {kind!r}, expected a function or one of {', '.join(IMPORTANCES)}."
        )
    _check_measured(kind, measured, groups)
    scores = IMPORTANCES[kind](_Evidence(model, groups, measured, seed))
    default: Normalization = "none" if kind in _COMPARABLE else "mean"
    return _normalized(_checked(scores, kind, groups), groups, normalize or default)


@dataclass(frozen=True, eq=False)
class _Evidence:
    """What a score may be made from."""

    model: nn.Module
    groups: ChannelGroups
    measured: Tensor | None
    seed: int

    def weights(self) -> list[tuple[ChannelAxis, Tensor]]:
        """Weights that make channels and depthwise weights; no biases, norms, or other factors."""
        return [
            (axis, parameter.detach().float())
            for axis, parameter in channel_parameters(self.model, self.groups)
            if parameter.dim() > 1
            and (axis.role == "out" or parameter.numel() > parameter.shape[axis.dim])
        ]

    def norm_scales(self) -> list[tuple[ChannelAxis, Tensor]]:
        """The weights of norm layers, of whatever class that is named so."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        scales = []
        for axis, parameter in channel_parameters(self.model, self.groups):
            layer, _, short = axis.tensor.rpartition(".")
            classes = type(modules.get(layer)).__mro__
            if short == "weight" and any("Norm" in known.__name__ for known in classes):
                scales.append((axis, parameter.detach().float()))
        return scales

    def readers(self) -> list[tuple[ChannelAxis, Tensor]]:
        """The weights that read channels."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return [
            (axis, parameters[axis.tensor].detach().float())
            for axis in self.groups.axes
            if axis.role == "in" and axis.tensor in parameters
        ]

    def norms(self, power: int, of: list[tuple[ChannelAxis, Tensor]]) -> Tensor:
        """Norms of the channels' parts of some tensors; NaN where none holds the channel."""
        layers = []
        for axis, weight in of:
            sums = sum_other_dims(weight.abs().pow(power), axis.dim)
            sums = sum_by_channel(sums, axis, self.groups.num_channels)
            layers.append(sums.pow(1 / power))
        return _across_layers(layers, self.groups)


# --- The kinds ------------------------------------------------------------------------------------


def _l1(evidence: _Evidence) -> Tensor:
    return _filled(evidence.norms(1, evidence.weights()), _without_weights(evidence), evidence)


def _l2(evidence: _Evidence) -> Tensor:
    return _filled(evidence.norms(2, evidence.weights()), _without_weights(evidence), evidence)


def _group(evidence: _Evidence) -> Tensor:
    layers = [
        sum_by_channel(sum_other_dims(w.square(), axis.dim), axis, evidence.groups.num_channels)
        for axis, w in (*evidence.weights(), *evidence.readers(), *evidence.norm_scales())
    ]
    absent = torch.full((evidence.groups.num_channels,), torch.nan)
    return _filled(torch.stack([absent, *layers]).nanmean(0), _without_weights(evidence), evidence)


def _bn_scale(evidence: _Evidence) -> Tensor:
    return _filled(evidence.norms(1, evidence.norm_scales()), _l2(evidence), evidence)


def _measured(evidence: _Evidence) -> Tensor:
    assert evidence.measured is not None
    measured = evidence.measured.to("cpu", torch.float32)
    return _filled(measured, _l2(evidence), evidence)


def _fpgm(evidence: _Evidence) -> Tensor:
    layers = []
    for axis, weight in evidence.weights():
        scores = torch.full((evidence.groups.num_channels,), torch.nan)
        group_of = _group_of(evidence.groups)[axis.channels.clamp(min=0)]
        for group in torch.unique(group_of[axis.channels >= 0]):
            indices = ((axis.channels >= 0) & (group_of == group)).nonzero().flatten()
            channels, filters = _filters(axis, weight, indices)
            scores[channels] = torch.cdist(filters, filters).sum(1).cpu()
        layers.append(scores)
    return _filled(_across_layers(layers, evidence.groups), _without_weights(evidence), evidence)


def _filters(axis: ChannelAxis, weight: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The channels that some indices of an axis belong to, and the filter of each.

    A channel that holds several indices has a longer filter; the shorter ones end in zeros.
    """
    held = axis.channels[indices]
    channels, counts = torch.unique(held, return_counts=True)
    order = indices[held.argsort(stable=True)].to(weight.device)
    parts = weight.movedim(axis.dim, 0).flatten(1).index_select(0, order)
    padded = nn.utils.rnn.pad_sequence(list(torch.split(parts, counts.tolist())), batch_first=True)
    return channels, padded.flatten(1)


def _lamp(evidence: _Evidence) -> Tensor:
    squares = _l2(evidence).double().square()
    scores = torch.zeros_like(squares)
    for group in evidence.groups.groups:
        span = evidence.groups.span(group.name)
        ascending = squares[span].sort().values
        not_smaller = ascending.flip(0).cumsum(0).flip(0)
        first = torch.searchsorted(ascending, squares[span].contiguous())  # ties score alike
        scores[span] = _ratio(squares[span], not_smaller[first])
    return scores.float()


def _random(evidence: _Evidence) -> Tensor:
    generator = torch.Generator().manual_seed(evidence.seed)
    return torch.rand(evidence.groups.num_channels, generator=generator)


IMPORTANCES: dict[str, Callable[[_Evidence], Tensor]] = {
    "l1": _l1,
    "l2": _l2,
    "group": _group,
    "bn_scale": _bn_scale,
    "taylor": _measured,
    "fpgm": _fpgm,
    "apoz": _measured,
    "activation": _measured,
    "contribution": _measured,
    "lamp": _lamp,
    "random": _random,
}
"""The kinds by name."""


# --- Groups and layers ----------------------------------------------------------------------------


def _group_of(groups: ChannelGroups) -> Tensor:
    """The group of each channel, by number, shape ``[num_channels]``."""
    sizes = torch.tensor([group.num_channels for group in groups.groups], dtype=torch.int64)
    return torch.arange(sizes.numel()).repeat_interleave(sizes)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the denominator is 0."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / denominator.masked_fill(zero, 1.0))


def _across_layers(layers: list[Tensor], groups: ChannelGroups) -> Tensor:
    """One score from the scores of several layers, each NaN where the layer lacks the channel."""
    if not layers:
        return torch.full((groups.num_channels,), torch.nan)
    scores = torch.stack(layers)
    group_of = _group_of(groups)
    sums = torch.zeros(len(layers), len(groups.groups))
    counts = sums.index_add(1, group_of, (~scores.isnan()).float())
    means = sums.index_add(1, group_of, scores.nan_to_num()) / counts  # NaN where not in the group
    relative = torch.where(scores.isnan(), torch.nan, _ratio(scores, means[:, group_of]))
    return relative.nanmean(0) * means.nanmean(0)[group_of]


def _filled(scores: Tensor, others: Tensor, evidence: _Evidence) -> Tensor:
    """The scores, and the others in every group that lacks one."""
    group_of = _group_of(evidence.groups)
    missing = torch.zeros(len(evidence.groups.groups)).index_add(
        0, group_of, scores.isnan().float()
    )
    return torch.where(missing[group_of] > 0, others, scores)


def _without_weights(evidence: _Evidence) -> Tensor:
    """Scores from per-channel parameters alone, and 1 in groups that have none."""
    everything = [
        (axis, parameter.detach().float())
        for axis, parameter in channel_parameters(evidence.model, evidence.groups)
    ]
    ones = torch.ones(evidence.groups.num_channels)
    return _filled(evidence.norms(2, everything), ones, evidence)


def _normalized(scores: Tensor, groups: ChannelGroups, how: Normalization) -> Tensor:
    if how == "none" or not groups.groups:
        return scores
    parts = scores.split_with_sizes([group.num_channels for group in groups.groups])
    divisors = [part.mean() if how == "mean" else part.amax() for part in parts]
    return torch.cat([_ratio(part, by) for part, by in zip(parts, divisors, strict=True)])


# --- Refusals -------------------------------------------------------------------------------------


def _check_measured(kind: str, measured: Tensor | None, groups: ChannelGroups) -> None:
    source = "measure_taylor" if kind == "taylor" else "measure_activations"
    needed = kind == "taylor" or kind in ACTIVATION_STATISTICS
    if needed and measured is None:
        raise ValueError(
            f"importance {kind!r} needs calibration batches; pass measured={source}(model, "
            "groups, batches, ...)."
        )
    if not needed and measured is not None:
        raise ValueError(f"importance {kind!r} needs no calibration batches; leave measured out.")
    if measured is not None and measured.shape != (groups.num_channels,):
        raise ValueError(
            f"measured has shape {tuple(measured.shape)}, expected one number for each of the "
            f"{groups.num_channels} channels; measure with the same groups."
        )


def _checked(scores: Tensor, what: str, groups: ChannelGroups) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != (groups.num_channels,):
        came = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"{what} {came}, expected a tensor with one score for each of the "
            f"{groups.num_channels} channels."
        )
    scores = scores.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"{what} scores that hold NaN or infinity; every channel needs a number.")
    return scores
