"""The section of the results page on ratio search, from its JSON alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from ratio_search_bars import (
    CASES,
    ORIGINAL,
    RULES,
    SEEDS,
    SPARSITIES,
    TUNED_CASES,
    Bar,
    bars,
    channel_search,
    rule_score,
    search_of,
    top1s,
)
from ratio_search_training import sparse_runs, tunings

FIRST_WIDTH = 16
LABELS = {
    "mobilenet_v1": "MobileNet-v1 (0.5)",
    "plain20": "Plain-20",
    "resnet20": "ResNet-20",
}
OTHERS = {
    "random": "random search",
    "sensitivity": "ratios derived from sensitivities",
    "agent alone": "DDPG without heuristics and without tries around the best",
    "tries alone": "heuristics and tries around the best without DDPG",
}


def section(results: dict[str, Any]) -> str:
    """The section, as Markdown.

    Args:
        results: Of the study.
    """
    search, tuning = results["settings"]["search"], results["settings"]["tuning"]
    num_tuned, num_sparse = len(results["tuned"]), len(results["sparse"])
    num_images = 10 * search["val_per_class"]
    return f"""## Ratio search

`RatioSearch` under a budget of MACs, {search["num_episodes"]} episodes, one thread. The
reward is top-1 without any tuning on {num_images:,} images held out of the training images (which
the networks were trained on, so that the scores are high); seeds {_listed(SEEDS)}. The rules of
thumb were each scored to the end on the same images. CPU seconds are of the whole fit, calibration
and agent included, divided by the episodes.

{search_table(results)}

The original AMC code, run on the same MobileNet-v1 at half of the MACs on one core (its
own {num_images:,} training images, seed 1): dense {ORIGINAL["dense_score"]:.4f}, best
{ORIGINAL["best_score"]:.4f} with {ORIGINAL["cost_ratio"]:.3f} of the MACs,
{ORIGINAL["cpu_seconds_per_episode"]:.1f} CPU seconds an episode; uniform
{ORIGINAL["uniform"]:.4f}, best of the shallow ones {ORIGINAL["shallow"]:.4f}, best of the deep ones
{ORIGINAL["deep"]:.4f}. Its uniform rounds up, which keeps all {FIRST_WIDTH} channels of the first
layer; here they are rounded to the nearest multiple of 8 that the budget allows, which is half of
them, so that uniform starts lower.

Where the best of each source came from, seed by seed:

{source_table(results)}

Channels kept of each group, in forward order:

{plan_table(results)}

### After tuning

Both arms start from the same network, are cut before the first step (importance
`{tuning["importance"]}`, {"" if tuning["reconstruct"] else "no "}least-squares reconstruction), and
are tuned for {tuning["epochs"]} epochs on the same images in the same order (SGD, learning rate
{tuning["lr"]} with a cosine, batch {tuning["batch_size"]}, {tuning["precision"]}). Top-1 in percent
on the 10,000 test images; mean ± standard deviation over {len(SEEDS)} seeds;
{num_tuned} of {len(tunings())} runs were made.

{tuning_table(results)}

### Densities of weights

ResNet-20, one search of {search["num_sparsity_episodes"]} episodes a level (seed 1; reward: the
images of above, weights by least squares and batch norm statistics of one batch, no training), then
trained as in the section on sparsity and distillation above, but for one epoch, so that these
numbers are lower than those there. `uniform` is the same density in all layers, `global` what one
threshold of magnitude for all layers leaves in each: as a heuristic, which the search begins
with, within the search's bounds; in training, without them and decided again as weights change.
What an earlier search had found was trained and scored on these test images, too; the search was
then changed for a higher reward, not for them. Top-1 in percent; {num_sparse} of
{len(sparse_runs())} runs were made.

{sparsity_table(results)}

### What won and what did not

{verdict_list(results)}
{agent_worth(results)}
### Bars

{bar_table(bars(results))}

JSON: [`results/ratio_search.json`](results/ratio_search.json); made by
`python benchmarks/ratio_search.py`."""


def search_table(results: dict[str, Any]) -> str:
    """What the searches found beside the heuristics."""
    lines = [
        "| network | budget | | best reward | MACs ratio | CPU s per episode |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model, target in CASES:
        case = f"| {LABELS[model]} | {target:g} |"
        found = searches_of(results, model, target)
        if found:
            lines.append(f"{case} dense | {found[0]['dense_score']:.4f} | 1 | |")
        rules = channel_search(results, model, target, "rules", 1)
        for rule in RULES if rules else ():
            best = rules["best_by_source"][rule] if rules else {}
            name = rule if rule == "uniform" else f"best {rule}"
            lines.append(f"{case} {name} | {best['score']:.4f} | {best['cost_ratio']:.3f} | |")
        for method, name in OTHERS.items():
            others = _whole(results, searches_of(results, model, target, method))
            if others:
                lines.append(f"{case} {name}, {_seeds(others)} {_cells(others)}")
        if found:
            lines.append(f"{case} **searched**, {len(found)} seeds {_cells(found)}")
    return "\n".join(lines)


def source_table(results: dict[str, Any]) -> str:
    """Who proposed the best of each search, and when."""
    lines = [
        "| network | budget | seed | best reward | by | in episode | best rule | given up early |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, target in CASES:
        best_rule = max(rule_score(results, model, target, rule) for rule in RULES)
        for search in searches_of(results, model, target):
            cells = [
                LABELS[model],
                f"{target:g}",
                search["seed"],
                f"{search['best_score']:.4f}",
                search["best_source"],
                search["best_episode"],
                "–" if math.isnan(best_rule) else f"{best_rule:.4f}",
                f"{search['num_given_up']} of {search['num_episodes']}",
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plan_table(results: dict[str, Any]) -> str:
    """The channels that each search keeps."""
    lines = ["| network | budget | | channels |", "| --- | --- | --- | --- |"]
    for model, target in CASES:
        found = searches_of(results, model, target)
        case = f"| {LABELS[model]} | {target:g} |"
        if found:
            lines.append(f"{case} dense | {_listed(found[0]['full'].values())} |")
        rules = channel_search(results, model, target, "rules", 1)
        if rules is not None:
            uniform = rules["best_by_source"]["uniform"]["found"]
            lines.append(f"{case} uniform | {_listed(uniform)} |")
        lines += [f"{case} seed {s['seed']} | {_listed(s['found'].values())} |" for s in found]
    return "\n".join(lines)


def tuning_table(results: dict[str, Any]) -> str:
    """Searched and uniform plans, right after the cut and after tuning."""
    lines = [
        "| network | budget | plan | MACs ratio | after the cut | after tuning |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model, target in TUNED_CASES:
        for method in ("uniform", "searched"):
            wanted = {"model": model, "target": target, "method": method}
            runs = [run for run in results["tuned"] if wanted.items() <= run.items()]
            if runs:
                ratio = mean(run["macs_ratio"] for run in runs)
                cells = [LABELS[model], f"{target:g}", method, f"{ratio:.3f}"]
                cells += [spread(top1s(runs, what)) for what in ("top1_after_cut", "test_top1")]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sparsity_table(results: dict[str, Any]) -> str:
    """Searched densities beside those of heuristics: rewards, and top-1 after training."""
    lines = [
        "| sparsity | densities | reward | trained alone | trained with distillation |",
        "| --- | --- | --- | --- | --- |",
    ]
    for level in SPARSITIES:
        search = search_of(results, "resnet20", "sparsity", level, "ddpg", 1)
        for densities in ("uniform", "global", "searched"):
            trained = [
                spread(top1s(results["sparse"], target=level, method=method))
                for method in (densities, f"{densities}+distillation")
            ]
            cells = [f"{100 * level:g} %", densities, _reward(search, densities), *trained]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict_list(results: dict[str, Any]) -> str:
    """Each comparison of the study in a sentence, won or lost."""
    found = [*_search_verdicts(results), *_training_verdicts(results)]
    return "\n".join(f"- {sentence}" for sentence in found)


def agent_worth(results: dict[str, Any]) -> str:
    """The search with and without its agent, seed by seed, after equally many episodes."""
    model, target = CASES[0]
    pairs = [
        (search, alone)
        for search in searches_of(results, model, target)
        for alone in searches_of(results, model, target, "tries alone")
        if search["seed"] == alone["seed"]
    ]
    if not pairs:
        return ""
    length = min(alone["num_episodes"] for _, alone in pairs)
    with_agent, without = (
        [max(r for r in one["rewards"][:length] if r is not None) for one in arm]
        for arm in zip(*pairs, strict=True)
    )
    by_seed = "; ".join(
        f"seed {search['seed']}: {ours:.4f} and {theirs:.4f}"
        for (search, _), ours, theirs in zip(pairs, with_agent, without, strict=True)
    )
    started = pairs[0][1].get("started_from", 0)
    return f"""
What the agent is worth beside tries around the best: {_case(model, target)}, the best reward of the
first {length} episodes is {spread(with_agent, 4)} with the agent and {spread(without, 4)} without
it, on the mean of {len(pairs)} seeds ({by_seed}). The first {started} episodes, heuristics and
random choices, are the same in both and were scored once, so that this compares {length - started}
episodes a seed, of {pairs[0][0]["num_episodes"] - started} that a whole search has. The search went
on to {spread([search["best_score"] for search, _ in pairs], 4)}, in episodes
{_listed([search["best_episode"] for search, _ in pairs])}. Without the agent the best were
{", ".join(f"{alone['best_score']:.4f}" for _, alone in pairs)} when the runs were cut, after
{_listed([alone["num_episodes"] for _, alone in pairs])} episodes; what they would have come to is
not measured. They were scored on another machine ({pairs[0][1]["machine"]["processor"]}).
"""


def _search_verdicts(results: dict[str, Any]) -> list[str]:
    sentences = []
    for model, target in CASES:
        scores = [search["best_score"] for search in searches_of(results, model, target)]
        known = {rule: rule_score(results, model, target, rule) for rule in RULES}
        rule, best = max(known.items(), key=lambda item: (item[1] == item[1], item[1]))
        if scores and not math.isnan(best):
            others = f"the best heuristic ({rule}, {best:.4f})"
            sentences.append(
                _verdict(_case(model, target), "the search", scores, others, [best], 4)
            )
    model, target = CASES[0]
    searched = [search["best_score"] for search in searches_of(results, model, target)]
    for method, name in OTHERS.items():
        found = _whole(results, searches_of(results, model, target, method))
        theirs = [one["best_score"] for one in found]
        if theirs and searched:
            name = f"{name} ({spread(theirs, 4)}{', one seed' if len(theirs) == 1 else ''})"
            sentences.append(
                _verdict(_case(model, target), "the search", searched, name, theirs, 4)
            )
    return sentences


def _training_verdicts(results: dict[str, Any]) -> list[str]:
    sentences = []
    for model, target in TUNED_CASES:
        searched, uniform = (
            top1s(results["tuned"], model=model, target=target, method=method)
            for method in ("searched", "uniform")
        )
        case = f"{_case(model, target)}, after tuning"
        if searched and uniform:
            name = f"uniform ({spread(uniform)})"
            sentences.append(_verdict(case, "the searched plan", searched, name, uniform, 2))
    for level in SPARSITIES:
        searched, uniform, ranked = (
            top1s(results["sparse"], target=level, method=f"{densities}+distillation")
            for densities in ("searched", "uniform", "global")
        )
        case = f"ResNet-20 at {100 * level:g} % zeros, trained with distillation"
        for name, others in (("uniform", uniform), ("global", ranked)):
            if searched and others:
                name = f"{name} ({spread(others)})"
                sentences.append(_verdict(case, "what was searched", searched, name, others, 2))
    return sentences


def _case(model: str, target: float) -> str:
    return f"{LABELS[model]} at {target:g} of the MACs"


def _verdict(
    case: str,
    ours: str,
    values: Sequence[float],
    theirs: str,
    others: Sequence[float],
    digits: int,
) -> str:
    """Ahead, behind, or no further apart than seeds are."""
    difference = mean(values) - mean(others)
    deviations = [stdev(v) if len(v) > 1 else 0.0 for v in (values, others)]
    what = f"{case}: {ours} ({spread(values, digits)})"
    if abs(difference) <= math.hypot(*deviations):
        return f"{what} is no further from {theirs} than seeds are from each other."
    word = "ahead of" if difference > 0 else "**behind**"
    return f"{what} is {word} {theirs} by {abs(difference):.{digits}f}."


def bar_table(found: Sequence[Bar]) -> str:
    """Each bar with its value and verdict."""
    lines = ["| bar | asked | measured | |", "| --- | --- | --- | --- |"]
    for bar in found:
        verdict = bar.verdict if bar.holds else f"**{bar.verdict}**"
        limit, value = (_shown(number, bar.digits) for number in (bar.limit, bar.value))
        lines.append(f"| {bar.what} | {bar.sense} {limit} | {value} | {verdict} |")
    return "\n".join(lines)


def searches_of(
    results: dict[str, Any], model: str, target: float, method: str = "ddpg"
) -> list[dict[str, Any]]:
    """The searches of a case, by seed; the study's own ones unless told otherwise."""
    found = (channel_search(results, model, target, method, seed) for seed in SEEDS)
    return [search for search in found if search is not None]


def _whole(results: dict[str, Any], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that were not cut short: others do not compare with whole searches."""
    whole = results["settings"]["search"]["num_episodes"]
    return [search for search in found if search["num_episodes"] == whole]


def _seeds(found: Sequence[dict[str, Any]]) -> str:
    return f"{len(found)} seeds" if len(found) > 1 else f"seed {found[0]['seed']}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    if not values:
        return "–"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def _cells(found: Sequence[dict[str, Any]]) -> str:
    scores, ratios, seconds = (
        [search[name] for search in found]
        for name in ("best_score", "cost_ratio", "cpu_seconds_per_episode")
    )
    return f"| {spread(scores, 4)} | {max(ratios):.3f} | {spread(seconds)} |"


def _reward(search: dict[str, Any] | None, densities: str) -> str:
    """Of a search, or of one of the rules that it began with."""
    if search is None:
        return "–"
    if densities == "searched":
        return f"{search['best_score']:.4f}"
    rule = search["best_by_source"].get(densities)
    return f"{rule['score']:.4f}" if rule else "–"


def _shown(number: float, digits: int) -> str:
    return "–" if math.isnan(number) else f"{number:.{digits}f}"


def _listed(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)
