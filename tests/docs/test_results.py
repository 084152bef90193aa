"""The results page is what the committed JSON says, and the bars hold in it.

The benchmarks' own functions say so, here in the test process: in a process of its own each of them
would import torch and Lightning once more, which takes longer than all that is checked.
"""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture
def benchmark(monkeypatch):
    """Import a benchmark, whose neighbours are found by their names as in a run of the script."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_the_page_is_up_to_date(benchmark):
    page = benchmark("results_page")
    assert page.page() == page.PAGE.read_text(encoding="utf-8")


def test_distillation_gains_at_every_level_in_the_committed_results(benchmark):
    results = benchmark("sparsity_distillation")
    gain, missed = results.check(results.read_results())
    assert missed == []
    assert gain >= 0


def test_the_committed_cost_is_within_its_bars(benchmark):
    overhead = benchmark("callback_overhead")
    assert overhead.check(overhead.read_results()) == []


@pytest.mark.parametrize("name", ["channel_pruning", "integer_forms", "kill_and_resume"])
def test_bars_hold_in_the_committed_results(name, benchmark):
    path = RESULTS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not there; benchmarks/{name}.py writes it")
    assert benchmark(name).check(json.loads(path.read_text())) == []
