"""Every recipe is found, and run by its own command, made small."""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from lit_compress import CompressionReport
from lit_compress.cli import main

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
COMMAND = re.compile(r"# (lit-compress .+)")


def command_of(recipe: Path) -> list[str]:
    """The arguments in the recipe's first line, its files as absolute paths."""
    found = COMMAND.fullmatch(recipe.read_text().splitlines()[0])
    assert found, f"{recipe} does not begin with a comment that holds its command"
    words = shlex.split(found[1])[1:]
    return [str(ROOT / word) if word.startswith("recipes/") else word for word in words]


def needs_assets(command: list[str]) -> bool:
    texts = [Path(word).read_text() for word in command if word.endswith(".yaml")]
    return any("CIFAR10JPEG" in text or "weights:" in text for text in texts)


def made_small(recipe: Path) -> list[str]:
    small = recipe.parent / "small.yaml"
    given = command_of(recipe)
    if not small.is_file():
        return [*given, "--trainer.max_epochs=2", "--summary.latency=false"]
    return given if recipe == small else [*given, "--config", str(small)]


def test_recipes_are_found():
    assert {"quickstart.yaml", "resnet20.yaml", "small.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_command_names_the_recipe(recipe):
    assert str(recipe) in command_of(recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_runs(recipe):
    command = made_small(recipe)
    if needs_assets(command) and not os.environ.get("LIT_COMPRESS_ASSETS"):
        pytest.skip("LIT_COMPRESS_ASSETS names no folder of assets")
    assert main(command) == 0
    (config,) = Path.cwd().rglob("config.yaml")
    report = CompressionReport.load_json(next(Path.cwd().rglob("compression_report.json")))
    target = yaml.safe_load(config.read_text())["sparsity"]["final_sparsity"]
    # The report counts depthwise weights too, which are left dense.
    assert target - 0.03 < report.compressed.sparsity <= target + 1e-4
    assert report.dense.sparsity < 0.01


@pytest.mark.parametrize("network", ["resnet20", "mobilenet"])
@pytest.mark.parametrize("percent", [50, 75, 90, 95])
def test_layers_of_configuration_add_up(network, percent, capsys):
    files = [network, f"sparsity-{percent}", "distillation", "small"]
    paths = [str(ROOT / "recipes" / "cifar10" / f"{name}.yaml") for name in files]
    arguments = [word for path in paths for word in ("--config", path)]
    assert main(["fit", *arguments, "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["sparsity"]["final_sparsity"] == percent / 100
    assert config["distillation"]["temperature"] == 4.0
    assert config["trainer"]["max_epochs"] == 2
    assert config["data"]["init_args"]["max_train_per_class"] == 8
    assert config["model"]["init_args"]["weights"].startswith(network)


def test_quickstart_reaches_97_percent_at_90_percent_sparsity():
    assert main([*command_of(ROOT / "recipes" / "quickstart.yaml"), "--summary.plots=false"]) == 0
    report = CompressionReport.load_json(next(Path.cwd().rglob("compression_report.json")))
    assert report.compressed.metrics["val_top1"] >= 0.97
    assert report.dense.metrics["val_top1"] >= 0.97
    (checkpoint,) = Path.cwd().rglob("*.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"].values()
    for weight in weights:
        if weight.dim() >= 2:
            assert int((weight == 0).sum()) == round(0.9 * weight.numel())
