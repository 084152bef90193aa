"""Sensitivity of each channel group: cut it alone, further and further, and evaluate.

The curves are those of Li et al. 2017 ("Pruning Filters for Efficient ConvNets", section 3.2),
there for single layers, here for groups of coupled layers, and on models that are physically slim,
so that a point costs what the slim model costs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from torch import Tensor, nn

from lit_compress.compress.channels.cut import cut_channels
from lit_compress.compress.channels.groups import ChannelGroup, ChannelGroups
from lit_compress.compress.channels.plan import ChannelPlan, choose_channels
from lit_compress.search.sensitivity_result import SensitivityPoint, SensitivityResult

__all__ = ["Evaluate", "Tune", "planned_points", "point_overhead", "sensitivity_curves"]

Evaluate: TypeAlias = Callable[[nn.Module], Mapping[str, float]]
"""Metrics of a model by name; leaves its weights as they are."""

Tune: TypeAlias = Callable[[nn.Module], object]
"""Trains a model in place for a short while."""


def sensitivity_curves(
    model: nn.Module,
    groups: ChannelGroups,
    scores: Tensor,
    evaluate: Evaluate,
    ratios: Sequence[float],
    tune: Tune | None = None,
    done: SensitivityResult | None = None,
    on_point: Callable[[SensitivityResult], object] | None = None,
    setting: Mapping[str, str] | None = None,
) -> SensitivityResult:
    """Cut each group alone, the channels of least score first, and evaluate what is left.

    The model itself is never run or changed: every point, the baseline too, is a copy.

    Args:
        model: The module that the groups were found in.
        groups: Its channels.
        scores: How much each channel matters, shape ``[groups.num_channels]``; see
            :func:`~lit_compress.compress.channels.importance.channel_importance`.
        evaluate: Gives the metrics of a copy.
        ratios: Channels removed ÷ original, each in (0, 1). Of each block of a group the nearest
            whole number of channels stays, at least one; ratios that leave the same number in a
            small group share a point.
        tune: Trains a copy; then each point is evaluated before and after it, and the baseline
            likewise. Without it nothing is tuned.
        done: What an interrupted run had, to go on from there.
        on_point: Called with the result so far after the baseline and after every new point; the
            place to save it.
        setting: What else the points depend on, in words (weights, data, tuning); ``done`` must
            have the same.

    Returns:
        The baseline and the points, in the order of the groups and of rising ratios.

    Raises:
        ValueError: If there are no groups, a ratio is out of range, ``scores`` do not fit,
            ``evaluate`` gives no metric, or ``done`` is of another model or setting.
    """
    planned = planned_points(groups, ratios)
    setting = dict(setting or {})
    if done is None:
        metrics, tuned_metrics = _measured(copy.deepcopy(model), evaluate, tune)
        baseline = SensitivityPoint("", groups.num_channels, metrics, tuned_metrics)
        result = SensitivityResult(groups.groups, tuple(ratios), baseline, (), setting)
        if on_point is not None:
            on_point(result)
    else:
        done.check(groups, setting)
        result = replace(done, ratios=tuple(ratios))
    known = {(point.group, point.kept) for point in result.points}
    for name, kept in planned:
        if (name, kept) in known:
            continue
        slim = _slim_copy(model, groups, scores, name, kept)
        point = SensitivityPoint(name, kept, *_measured(slim, evaluate, tune))
        result = replace(result, points=_in_order(groups, (*result.points, point)))
        if on_point is not None:
            on_point(result)
    return result


def planned_points(groups: ChannelGroups, ratios: Sequence[float]) -> list[tuple[str, int]]:
    """The points of :func:`sensitivity_curves`: group and channels kept, first to last.

    Args:
        groups: The channels of the model.
        ratios: Channels removed ÷ original, each in (0, 1).

    Raises:
        ValueError: If there are no groups, no ratios, or a ratio is out of range.
    """
    if not groups.groups:
        raise ValueError(
            f"the model has no channels that can be cut, so there is nothing to analyze: {groups}."
        )
    wrong = [ratio for ratio in ratios if not 0 < ratio < 1]
    if wrong or not ratios:
        came = f"hold {wrong[0]}" if wrong else "are empty"
        raise ValueError(
            f"the pruning ratios {came}, expected numbers between 0 and 1, both excluded, as in "
            "[0.25, 0.5, 0.75]; the baseline, 0, is always evaluated."
        )
    return [
        (group.name, kept)
        for group in groups.groups
        for kept in dict.fromkeys(_kept(group, ratio) for ratio in sorted(ratios))
        if kept < group.num_channels
    ]


def point_overhead(
    model: nn.Module,
    groups: ChannelGroups,
    scores: Tensor,
    evaluate: Evaluate,
    pruning_ratio: float = 0.5,
    repeats: int = 5,
) -> list[float]:
    """What a point costs beside the evaluation of the same slim model.

    Both are timed in turns, on the group in the middle of the model.

    Args:
        model: As for :func:`sensitivity_curves`.
        groups: Likewise.
        scores: Likewise.
        evaluate: Likewise.
        pruning_ratio: Of the group, in (0, 1).
        repeats: Pairs timed, at least 1, after one that is not.

    Returns:
        Time of a point ÷ time of the evaluation, for each pair; 1 where copying and cutting cost
        nothing.

    Raises:
        ValueError: As :func:`planned_points`, or if ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; expected at least 1 timed pair.")
    planned = planned_points(groups, [pruning_ratio])
    name, kept = planned[len(planned) // 2]
    slim = _slim_copy(model, groups, scores, name, kept)

    def whole_point() -> None:
        evaluate(_slim_copy(model, groups, scores, name, kept))

    ratios = []
    for _ in range(repeats + 1):
        alone = _seconds(lambda: evaluate(slim))
        ratios.append(_seconds(whole_point) / alone)
    return ratios[1:]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _kept(group: ChannelGroup, ratio: float) -> int:
    """Channels that stay at a ratio; a tie keeps more."""
    in_block = group.num_channels // group.num_blocks
    return group.num_blocks * max(1, math.floor(in_block * (1 - ratio) + 0.5))


def _slim_copy(
    model: nn.Module, groups: ChannelGroups, scores: Tensor, name: str, kept: int
) -> nn.Module:
    plan = ChannelPlan({name: kept}, {name: groups[name].num_channels})
    slim = copy.deepcopy(model)
    cut_channels(slim, groups, choose_channels(groups, plan, scores))
    return slim


def _measured(
    slim: nn.Module, evaluate: Evaluate, tune: Tune | None
) -> tuple[dict[str, float], dict[str, float] | None]:
    """Metrics of a copy, and those after tuning it."""
    metrics = dict(evaluate(slim))
    if not metrics:
        raise ValueError(
            "the evaluation gave no metrics; expected at least one number by name. Does "
            "validation_step log anything?"
        )
    if tune is None:
        return metrics, None
    tune(slim)
    return metrics, dict(evaluate(slim))


def _in_order(
    groups: ChannelGroups, points: Sequence[SensitivityPoint]
) -> tuple[SensitivityPoint, ...]:
    places = {group.name: place for place, group in enumerate(groups.groups)}
    return tuple(sorted(points, key=lambda point: (places[point.group], -point.kept)))
