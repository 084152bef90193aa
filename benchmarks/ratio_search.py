"""Ratio search: what it finds, what it costs, and what it is worth after training.

Parts, each of which adds to ``docs/results/ratio_search.json`` run by run and goes on where it was
stopped (several may run at the same time):

- ``search``: channels of MobileNet-v1 and Plain-20 under budgets of MACs;
- ``tuning``: the plans that were found, tuned beside uniform ones;
- ``sparsity``: densities of the weights of ResNet-20, searched and trained;
- ``rules``: the same with densities by heuristics.

``ratio_search_bars.py`` holds the bars.

    python benchmarks/ratio_search.py --part search [--assets DIR] [--workers 2]
    python benchmarks/ratio_search.py --quick
    python benchmarks/ratio_search.py --check     # the bars over the committed results

``--quick`` searches for a minute and looks at what must hold for every search. With neither it nor
``--part``, all parts run, unless ``--check`` alone is given, which runs nothing.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import ratio_search_quick
import ratio_search_runs
import ratio_search_training
import torch
from machine import machine, say_duration
from ratio_search_bars import bars, search_of
from ratio_search_runs import Search
from ratio_search_runs import Settings as SearchSettings
from ratio_search_training import Settings as TrainingSettings
from ratio_search_training import Sparse, Tuning

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "ratio_search.json"
PARTS = ("search", "tuning", "sparsity", "rules")

Point: TypeAlias = Search | Tuning | Sparse


@dataclass(frozen=True)
class Settings:
    """Of the whole study."""

    search: SearchSettings = field(default_factory=SearchSettings)
    tuning: TrainingSettings = field(default_factory=TrainingSettings)


# --- The file -------------------------------------------------------------------------------------

KINDS: dict[type[Point], str] = {Search: "searches", Tuning: "tuned", Sparse: "sparse"}


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    """The committed results."""
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def empty(settings: Settings) -> dict[str, Any]:
    """Results of a study that has not begun."""
    return {"settings": asdict(settings), **{kind: [] for kind in KINDS.values()}}


def add(point: Point, result: dict[str, Any], settings: Settings, path: Path = RESULTS) -> None:
    """Add one result to the file, in the place of an older one of the same point."""
    with _locked(path):
        results = read_results(path) if path.exists() else empty(settings)
        others = [old for old in results[KINDS[type(point)]] if not is_of(old, point)]
        others.append(result | {"machine": machine()})
        others.sort(key=lambda one: [str(one[name]) for name in vars(point)])
        results[KINDS[type(point)]] = others
        part = path.with_suffix(".part")
        part.write_text(as_json(results))
        os.replace(part, path)


def is_of(result: dict[str, Any], point: Point) -> bool:
    """Whether a result is of a point."""
    return asdict(point).items() <= result.items()


def as_json(results: dict[str, Any]) -> str:
    """Indented JSON with each list of numbers on one line."""
    text = json.dumps(results, indent=1, allow_nan=False)
    one_line = re.compile(r"\[[^\[\]{}]*\]")
    return one_line.sub(lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


# --- The study ------------------------------------------------------------------------------------


def points(part: str) -> list[Point]:
    """What belongs to a part, in the order in which it runs."""
    if part == "search":
        return [*ratio_search_runs.channel_searches()]
    if part == "tuning":
        return [*ratio_search_training.tunings()]
    if part == "rules":
        return [p for p in ratio_search_training.sparse_runs() if "searched" not in p.method]
    trained = [p for p in ratio_search_training.sparse_runs() if "searched" in p.method]
    return [*ratio_search_runs.sparsity_searches(), *trained]


def missing(part: str, settings: Settings, path: Path = RESULTS) -> list[Point]:
    """What of a part is not in the file yet.

    Raises:
        SystemExit: If the file was made with other settings.
    """
    results = read_results(path) if path.exists() else empty(settings)
    if results["settings"] != asdict(settings):
        raise SystemExit(f"{path} was made with other settings; move it away first.")
    return [
        point
        for point in points(part)
        if not any(is_of(old, point) for old in results[KINDS[type(point)]])
    ]


def run_part(part: str, settings: Settings, workers: int, path: Path = RESULTS) -> None:
    """Run what is missing; save after each. Searches come before what is trained with them."""
    todo = missing(part, settings, path)
    searches = [point for point in todo if isinstance(point, Search)]
    trained = [point for point in todo if not isinstance(point, Search)]
    context = multiprocessing.get_context("spawn")
    for batch in (searches, trained):
        jobs = [(point, settings, path) for point in batch]
        with context.Pool(workers, initializer=be_quiet, maxtasksperchild=1) as pool:
            for line in pool.imap_unordered(_run_and_add, jobs, chunksize=1):
                print(line, flush=True)


def _run_and_add(job: tuple[Point, Settings, Path]) -> str:
    point, settings, path = job
    try:
        result = run(point, settings, path)
    except LookupError as error:
        return f"left out {point}: {error}"
    add(point, result, settings, path)
    shown = {name: value for name, value in result.items() if not isinstance(value, (list, dict))}
    return json.dumps(shown)


def run(point: Point, settings: Settings, path: Path = RESULTS) -> dict[str, Any]:
    """Run one point.

    Raises:
        LookupError: If a search that it wants is not in the file yet.
    """
    if isinstance(point, Search):
        return ratio_search_runs.run(point, settings.search)
    search = search_wanted(point, path)
    if isinstance(point, Tuning):
        return ratio_search_training.tune(point, settings.tuning, search)
    return ratio_search_training.train_sparse(point, search)


def search_wanted(point: Tuning | Sparse, path: Path = RESULTS) -> dict[str, Any] | None:
    """The search whose find a run is trained with; ``None`` for a heuristic.

    Raises:
        LookupError: If it is not in the file yet.
    """
    if "searched" not in point.method:
        return None
    if isinstance(point, Tuning):
        wanted = Search(point.model, "channels", point.target, "ddpg", point.seed)
    else:
        wanted = Search("resnet20", "sparsity", point.target, "ddpg", 1)
    found = search_of(read_results(path), **asdict(wanted)) if path.exists() else None
    if found is None:
        raise LookupError(f"{wanted} is not in {path.name} yet")
    return found


def be_quiet() -> None:
    """One thread, and nothing but results on the screen."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


# --- The command ----------------------------------------------------------------------------------


def check(results: dict[str, Any], say: Callable[[str], object] = print) -> int:
    """Print each bar with its value; return how many do not hold."""
    found = bars(results)
    for bar in found:
        say(str(bar))
    num_missed = sum(not bar.holds for bar in found)
    say(f"missed_bars={num_missed} of {len(found)}")
    return num_missed


def main() -> int:
    """Run, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short search and what must hold")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar does not hold")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=[], help="what to run")
    parser.add_argument("--assets", help="the folder that LIT_COMPRESS_ASSETS would name")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    arguments = parser.parse_args()
    if arguments.assets:
        os.environ["LIT_COMPRESS_ASSETS"] = arguments.assets
    be_quiet()
    broken = []
    if arguments.quick:
        say_duration(ratio_search_quick.QUICK_UNITS)
        broken = ratio_search_quick.report()
    for part in arguments.part or (() if arguments.quick or arguments.check else PARTS):
        run_part(part, Settings(), arguments.workers)
    num_missed = 0
    if RESULTS.exists():
        num_missed = check(read_results())
    elif arguments.check:
        print(f"{RESULTS.name} is not there yet; run the parts first")
        num_missed = 1
    return 1 if broken or (arguments.check and num_missed) else 0


if __name__ == "__main__":
    sys.exit(main())
