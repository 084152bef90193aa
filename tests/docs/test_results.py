"""The results page is what the committed JSON says, and the bars hold in it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT / "benchmarks", capture_output=True, text=True
    )


def test_the_page_is_up_to_date():
    done = run("results_page.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_distillation_gains_at_every_level_in_the_committed_results():
    code = "import sparsity_distillation as s, json;print(json.dumps(s.check(s.read_results())))"
    done = run("-c", code)
    gain, missed = json.loads(done.stdout)
    assert missed == []
    assert gain >= 0


def test_the_committed_cost_is_within_its_bars():
    done = run("-c", "import callback_overhead as c; print(c.check(c.read_results()))")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("name", ["channel_pruning", "kill_and_resume"])
def test_the_bars_of_channel_pruning_hold_in_the_committed_results(name):
    path = ROOT / "docs" / "results" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not there; benchmarks/{name}.py writes it")
    code = f"import {name} as b, json; print(json.dumps(b.check(json.load(open({str(path)!r})))))"
    done = run("-c", code)
    assert json.loads(done.stdout) == [], done.stdout + done.stderr
