"""Search in stages: each starts from the network of the stage before, trained again.

A network that loses nearly everything at once says little about which layers matter. So far-off
targets are approached in steps, as He et al. 2018 ("AMC") prune ResNet-50 in four: search, bring
the network to what was found, train it, search again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from lit_compress.compress.channels.plan import ChannelPlan
from lit_compress.search.search_result import SearchResult
from lit_compress.search.settings import SearchTarget

__all__ = ["plan_of_stages", "search_in_stages", "stage_targets"]


def search_in_stages(
    targets: Sequence[SearchTarget],
    search: Callable[[SearchTarget], SearchResult],
    tune: Callable[[Sequence[SearchResult]], object],
) -> tuple[SearchResult, ...]:
    """Search under one target after the other, and train in between and at the end.

    Args:
        targets: Of the stages, in relation to the network before the first one; see
            :func:`stage_targets`.
        search: Searches from the network as it is now, under a target in relation to that.
        tune: Brings the network to the last of the results so far, and trains it.

    Returns:
        The results, one for each stage. Those of later stages speak of a network that is smaller
        already; :func:`plan_of_stages` puts them together.

    Raises:
        ValueError: If a stage left less already than the next one's target, or found nothing.
    """
    results: list[SearchResult] = []
    for target in targets:
        results.append(search(_target_now(target, results)))
        tune(tuple(results))
    return tuple(results)


def stage_targets(last: SearchTarget, on_the_way: Sequence[float]) -> tuple[SearchTarget, ...]:
    """The targets of all stages.

    Args:
        last: What is to be met in the end: a share of zeros, or what is left of another cost.
        on_the_way: The same of the stages before, each one stricter than the one before it.

    Returns:
        One for each stage, ``last`` included.

    Raises:
        ValueError: If there is no last target or it is one of bits, a number is out of range, or
            they do not become stricter.

    Examples:
        >>> targets = stage_targets(SearchTarget(final_sparsity=0.9), [0.5, 0.75])
        >>> [target.final_sparsity for target in targets]
        [0.5, 0.75, 0.9]
    """
    if not last.given or last.given[0] == "mean_weight_bits":
        came = "mean_weight_bits is the target" if last.given else "no target is given"
        raise ValueError(
            f"{came}, and stages lead to one of sparsity or of channels; give final_sparsity, "
            "target_macs_ratio or the like."
        )
    (name,) = last.given
    values = [*on_the_way, getattr(last, name)]
    rising = name == "final_sparsity"
    for before, after in itertools.pairwise(values):
        if not (after > before if rising else after < before):
            raise ValueError(
                f"the stages' {name} are {', '.join(f'{value:g}' for value in values)}, the last "
                f"one being the target; expected {'rising' if rising else 'falling'} numbers."
            )
    return tuple(replace(last, **{name: value}) for value in values)


def plan_of_stages(results: Sequence[SearchResult]) -> ChannelPlan:
    """The plan that takes the network before the first stage to what the last one found.

    Args:
        results: Of searches over channels, each from the network that the one before it left; at
            least one.

    Raises:
        ValueError: If there is none, or one searched other things than channels or found nothing.
    """
    if not results:
        raise ValueError("there are no stages to put together; give at least one result.")
    plans = [result.plan for result in results]
    kept: dict[str, int] = {}
    for plan in plans:
        kept |= plan.kept  # a group that has nothing left to lose is in no later plan
    return ChannelPlan(kept, plans[0].channels)


def _target_now(target: SearchTarget, results: Sequence[SearchResult]) -> SearchTarget:
    """A target in relation to the first network as one in relation to the present network."""
    (name,) = target.given
    if not results or not name.endswith("_ratio"):
        return target
    first, last = results[0], results[-1]
    assert first.budget is not None, "a target makes a budget"
    cost = first.budget[0]
    ratio = last.best_episode.costs[cost] / first.dense_costs[cost]
    value: float = getattr(target, name)
    if value >= ratio:
        raise ValueError(
            f"the stage of {name} {value:g} has nothing to remove: the one before it left "
            f"{ratio:.4f} already; give targets that are further apart."
        )
    return replace(target, **{name: value / ratio})  # type: ignore[arg-type]
