"""Every run of a sweep is accepted as W&B's agent would start it, and one of each runs, small."""

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from lit_compress import CompressionReport
from lit_compress.cli import main

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
SMALL = f"--config={ROOT / 'recipes' / 'cifar10' / 'small.yaml'}"
SCOPES = {"coms": (None,), "vmc": ("resnet18", "vgg16", "vgg16-bn")}
CASES = [(sweep, network) for sweep in SWEEPS for network in SCOPES[sweep.stem]]
LOOP = re.compile(r"#   (for .+; done)")


def runs_of(sweep, network, choose=itertools.product):
    """The arguments of every run of the grid, without the program's name."""
    content = yaml.safe_load(sweep.read_text())
    assert content["method"] == "grid"
    names, values = zip(*content["parameters"].items(), strict=True)
    for chosen in choose(*(each["values"] for each in values)):
        flags = [f"--{name}={value}" for name, value in zip(names, chosen, strict=True)]
        words = []
        for word in content["command"]:
            words += (
                flags if word == "${args}" else [word.replace("${envvar:NETWORK}", network or "")]
            )
        assert words[:2] == ["${env}", "${program}"]
        assert content["program"] == "lit-compress"
        yield with_paths(words[2:])


def each_value_once(*values):
    """The shortest grid in which every value of every parameter occurs."""
    longest = max(map(len, values))
    return zip(*(itertools.islice(itertools.cycle(v), longest) for v in values), strict=True)


def check_runs(runs, capsys):
    seen = set()
    for arguments in runs:
        assert main([*arguments, "--print_config"]) == 0, arguments
        seen.add(capsys.readouterr().out)
    assert len(seen) == len(runs)


def with_paths(words):
    return [word.replace("recipes/", f"{ROOT}/recipes/") for word in words]


def test_sweeps_are_found():
    assert {sweep.stem for sweep in SWEEPS} == set(SCOPES)


@pytest.mark.parametrize(
    ("sweep", "network"), CASES, ids=lambda value: getattr(value, "stem", value)
)
def test_every_value_is_accepted(sweep, network, capsys):
    check_runs([*runs_of(sweep, network, each_value_once)], capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sweep", "network"), CASES, ids=lambda value: getattr(value, "stem", value)
)
def test_every_run_is_accepted(sweep, network, capsys):
    check_runs([*runs_of(sweep, network)], capsys)


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_the_loops_without_wandb_are_accepted(sweep):
    loops = LOOP.findall(sweep.read_text())
    assert loops
    program = 'lit-compress() { echo "$@"; }\n'
    done = subprocess.run(["bash", "-c", program + loops[0]], capture_output=True, text=True)
    runs = done.stdout.splitlines()
    assert len(runs) >= 15
    for run in (runs[0], runs[-1]):
        assert main([*with_paths(run.split()), "--print_config"]) == 0, run


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_the_last_run_of_a_sweep_runs(sweep):
    *_, (*arguments,) = runs_of(sweep, SCOPES[sweep.stem][0])
    # W&B's service would outlive the test, and with it the folder that it was started in.
    assert main([*arguments, SMALL, "--trainer.logger=false"]) == 0
    report = CompressionReport.load(next(Path.cwd().rglob("compression_report.json")))
    assert "val_top1" in report.compressed.metrics
    assert os.path.getsize(next(Path.cwd().rglob("quantized.ckpt"))) > 0
