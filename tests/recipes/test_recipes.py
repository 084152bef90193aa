"""Every recipe is found, and run by its own command, made small."""

import os
import re
import shlex
from fnmatch import fnmatchcase
from itertools import cycle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

from lit_compress import CompressionReport, CompressionSummary, load_compressed
from lit_compress.cli import main
from lit_compress.compress.channels.tracing import find_channel_groups
from lit_compress.compress.quantization.network import is_quantized, quantized_network
from lit_compress.search.latency_table import LatencyTable
from lit_compress.search.search_result import SearchResult
from lit_compress.tasks import ImageClassifier, build_model

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
ROUND_TO = 8
NETWORKS = (
    "resnet20", "resnet18", "resnet50", "mobilenet", "mobilenet-v2", "vgg16", "vgg16-bn",
    "efficientnet-b0",
)  # fmt: skip
NUMBERS = ("quantization", "ptq")
METHODS = {
    "ptq-static": "ptq", "ptq-dynamic": "ptq", "ptq-float16": "ptq", "qat": "quantization",
    "qat-late": "quantization", "qat-w4": "quantization", "clustering-16": "clustering",
    "sparse-int8": "sparsity", "cluster-int8": "clustering", "prune-int8": "pruning",
    "search-channels": "search", "search-sparsity": "search",
}  # fmt: skip
COMMAND = re.compile(r"# (lit-compress .+)")
# Large networks, and methods that another recipe runs already: the quick suite only builds these.
SLOW_NETWORKS = {"resnet18", "resnet50", "efficientnet-b0", "vgg16", "vgg16-bn"}
SLOW = {
    "mobilenet+sparsity-75", "mobilenet+sparsity-95", "resnet20+sparsity-90",
    "resnet20+sparsity-90+distillation", "mobilenet+search-channels",
    "mobilenet+search-channels+search-group-tuning", "mobilenet+search-latency",
    "mobilenet+search-smallest",
}  # fmt: skip


def command_of(recipe: Path) -> list[str]:
    """The arguments in the recipe's first line, its files as absolute paths."""
    found = COMMAND.fullmatch(recipe.read_text().splitlines()[0])
    assert found, f"{recipe} does not begin with a comment that holds its command"
    words = shlex.split(found[1])[1:]
    return [str(ROOT / word) if word.startswith("recipes/") else word for word in words]


def needs_assets(command: list[str]) -> bool:
    texts = [Path(word).read_text() for word in command if word.endswith(".yaml")]
    return any("CIFAR10JPEG" in text or "weights:" in text for text in texts)


def made_small(command: tuple[str, ...]) -> list[str]:
    last = max(index for index, word in enumerate(command) if word.endswith(".yaml"))
    small = Path(command[last]).parent / "small.yaml"
    if not small.is_file():
        fast = ["--trainer.max_epochs=2", "--summary.latency=false", "--summary.plots=false"]
        return [*command, *fast, "--model.model_args.width=4"]
    if str(small) in command:
        return [*command]
    files = ["--config", str(small)]
    if any(word.endswith(".yaml") and "\nsearch:" in Path(word).read_text() for word in command):
        files += ["--config", str(small.with_name("small-search.yaml"))]
    # After the last file, before what the command sets itself; as many steps with fewer images.
    images = ["--data.batch_size=4", "--data.max_train_per_class=2", "--data.val_per_class=5"]
    return [*command[: last + 1], *files, *images, *command[last + 1 :]]


def test_recipes_are_found():
    assert {"quickstart.yaml", "resnet20.yaml", "small.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_command_names_the_recipe(recipe):
    assert str(recipe) in command_of(recipe)


# Recipes are layers of each other; what several of them name is run once.
COMMANDS = sorted({tuple(command_of(recipe)) for recipe in RECIPES})


def layers_of(command):
    return "+".join(Path(word).stem for word in command if word.endswith(".yaml"))


def is_slow(command):
    name = layers_of(command)
    return name in SLOW or name.partition("+")[0] in SLOW_NETWORKS


TO_RUN = [
    pytest.param(command, id=layers_of(command), marks=[pytest.mark.slow] * is_slow(command))
    for command in COMMANDS
]


def skip_without_assets(command):
    if needs_assets(command) and not os.environ.get("LIT_COMPRESS_ASSETS"):
        pytest.skip("LIT_COMPRESS_ASSETS names no folder of assets")


def test_every_method_runs_quickly():
    """A recipe that no quick run takes is one of a large network, or named above."""
    quick = {word for command in COMMANDS if not is_slow(command) for word in command}
    assert set(METHODS) <= {Path(word).stem for word in quick}
    assert {layers_of(command) for command in COMMANDS} >= SLOW


@pytest.mark.parametrize("command", [*filter(is_slow, COMMANDS)], ids=layers_of)
def test_what_is_too_slow_to_run_is_built(command, monkeypatch):
    skip_without_assets(command)
    built = []
    monkeypatch.setattr(
        pl.Trainer, "fit", lambda trainer, model, **_: built.append((trainer, model))
    )
    assert main(made_small(command)) == 0
    ((trainer, module),) = built
    assert isinstance(module, ImageClassifier)
    assert any(isinstance(callback, CompressionSummary) for callback in trainer.callbacks)
    assert len(trainer.callbacks) > 2


@pytest.fixture
def latency_by_size(monkeypatch):
    """Latency tables that do not depend on what else the machine does."""
    measure = LatencyTable.measure

    def by_size(groups, network, run, *, cache=None):
        running = []

        def time_call(call, x):
            call(x)
            timed = call if isinstance(call, torch.nn.Module) else running[-1]
            return sum(parameter.numel() for parameter in timed.parameters()) / 2e5

        def recorded(candidate):
            running.append(candidate)
            return run(candidate)

        return measure(groups, network, recorded, cache=cache, time_call=time_call)

    monkeypatch.setattr(LatencyTable, "measure", by_size)


@pytest.mark.parametrize("command", TO_RUN)
def test_recipe_runs(command, latency_by_size):
    skip_without_assets(command)
    command = made_small(command)
    assert main(command) == 0
    (file,) = Path.cwd().rglob("config.yaml")
    config = yaml.safe_load(file.read_text())
    report = CompressionReport.load(next(Path.cwd().rglob("compression_report.json")))
    assert report.dense.sparsity < 0.01
    assert any(config[name] for name in ("sparsity", "pruning", "clustering", *NUMBERS))
    found = check_search(config["search"]) if config["search"] else None
    if config["sparsity"]:
        declared = config["search"] if found else config["sparsity"]
        target = declared["final_sparsity"]
        # The report counts depthwise weights too, which are left dense.
        assert target - 0.03 < report.compressed.sparsity <= target + 1e-4
    if config["pruning"]:
        # Three episodes without a budget need not find anything better than the whole network.
        if not found or found.budget:
            assert report.compressed.num_params < report.dense.num_params
        check_channels(config, report, last_checkpoint(), found)
    if config["clustering"]:
        check_clusters(config)
    if any(config[name] for name in NUMBERS):
        check_numbers(config, found)


def last_checkpoint():
    # The packed file, for its size, lies beside the report.
    found = [path for path in Path.cwd().rglob("*.ckpt") if path.name != "packed.ckpt"]
    return max(found, key=lambda path: path.stat().st_mtime)


def check_search(declared):
    """The search has met its budget in every episode, and wrote what later runs take."""
    (file,) = Path.cwd().rglob("search.json")
    found = SearchResult.load(file)
    assert len(found.episodes) == declared["num_episodes"] == 3
    assert found.num_failed == 0
    if found.budget is None:
        assert declared["reward"] == "error_log_macs"
        return found
    cost, limit = found.budget
    assert all(episode.costs[cost] <= limit for episode in found.episodes)
    solutions = {"channels": "plan", "sparsity": "sparsities", "bits": "layer_bits"}
    assert (file.parent / f"{solutions[found.space]}.json").is_file()
    return found


def check_clusters(config):
    """No layer has more distinct values than the recipe declares."""
    most = config["clustering"]["num_clusters"]
    weights = torch.load(last_checkpoint(), weights_only=True)["state_dict"]
    layers = [w for name, w in weights.items() if name.endswith("weight") and w.dim() > 1]
    assert layers
    assert all(len(weight.unique()) <= most for weight in layers)


def check_numbers(config, found):
    """The model that comes back has weights of the bits that were declared, or found."""
    declared = config["quantization"] or config["ptq"]
    model = load_compressed(last_checkpoint(), ImageClassifier).model
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    if declared.get("method") == "float16":
        assert {layer.weight.dtype for layer in layers} == {torch.float16}
        return
    assert is_quantized(model)
    quantizers = quantized_network(model).weights
    bits = dict.fromkeys(quantizers, declared["weight_bits"])
    if found:
        bits = {f"{name.replace('.', '/')}/weight": n for name, n in found.layer_bits.items()}
    assert {name: quantizer.grid.bits for name, quantizer in quantizers.items()} == bits
    assert len(quantizers) == len(layers)


def check_channels(config, report, checkpoint, found):
    """The slim model costs, or has as many channels as, what was declared, or found."""
    pruning = config["pruning"]
    slim = load_compressed(checkpoint, ImageClassifier).model
    assert sum(parameter.numel() for parameter in slim.parameters()) == report.compressed.num_params
    target, ratios = pruning["target_macs_ratio"], pruning["pruning_ratio"]
    if target is not None:
        assert 0.99 * target <= report.compressed.macs / report.dense.macs <= target
        return
    if found:
        images = torch.zeros(2, 3, 32, 32)
        groups = find_channel_groups(slim, lambda m: m(images)).groups
        assert {group.name: group.num_channels for group in groups} == found.plan.kept
        assert report.compressed.macs == found.best_episode.costs["macs"]
        return
    dense = build_model(config["model"]["init_args"]["model"])
    images = torch.zeros(2, 3, 32, 32)
    now = [find_channel_groups(model, lambda m: m(images)).groups for model in (dense, slim)]
    if isinstance(ratios, dict):
        names = [group.name for group in now[0]]
        ratios = [next(r for glob, r in ratios.items() if fnmatchcase(n, glob)) for n in names]
    for before, after, ratio in zip(*now, ratios, strict=True):
        exact = (1 - ratio) * before.num_channels
        assert after.num_channels == max(ROUND_TO, ROUND_TO * round(exact / ROUND_TO)), before.name


@pytest.mark.parametrize(
    ("network", "percent"),
    [("resnet20", 50), ("mobilenet", 75), ("resnet20", 90), ("mobilenet", 95)],
)
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


@pytest.mark.parametrize(
    ("network", "r"),
    [
        ("vgg16", [0.4, 0.2, 0.1, 0.05, 0.1, 0.5, 0.5, *[0.6] * 6]),
        (
            "vgg16-bn",
            [0.6, 0.1, 0.15, 0.1, 0.1, 0.15, 0.15, 0.2, 0.8, 0.8, 0.8, 0.4, 0.4],
        ),
        ("resnet18", [0.1, 0.1, 0.2, 0.2, 0.3]),
    ],
)
def test_rounds_declare_what_five_of_them_leave(network, r):
    text = (ROOT / "recipes" / "cifar10" / f"{network}-rounds.yaml").read_text()
    ratios = yaml.safe_load(text)["pruning"]["pruning_ratio"]
    declared = list(ratios.values()) if isinstance(ratios, dict) else ratios
    assert declared == pytest.approx([1 - (1 - ratio) ** 5 for ratio in r], abs=1e-5)


def test_pruning_is_layered_with_distillation_and_sparsity(capsys):
    files = ["resnet20", "pruning-progressive", "distillation", "sparsity-50", "small"]
    paths = [str(ROOT / "recipes" / "cifar10" / f"{name}.yaml") for name in files]
    arguments = [word for path in paths for word in ("--config", path)]
    assert main(["fit", *arguments, "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["pruning"]["schedule"]["kind"] == "cubic"
    assert config["pruning"]["penalty"] == {"strength": 0.01, "kind": "l2", "begin": 0}
    assert config["sparsity"]["final_sparsity"] == 0.5
    assert config["distillation"]["temperature"] == 4.0


def parsed(network, method, capsys):
    folder = ROOT / "recipes" / "cifar10"
    files = [f"--config={folder / layer}.yaml" for layer in (network, method)]
    assert main(["fit", *files, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def check_layers(network, method, capsys):
    config = parsed(network, method, capsys)
    assert config[METHODS[method]], method
    assert config["data"]["class_path"].endswith("CIFAR10JPEGDataModule")


@pytest.mark.parametrize(("method", "network"), [*zip(METHODS, cycle(NETWORKS), strict=False)])
def test_every_network_and_every_method_are_layered(network, method, capsys):
    check_layers(network, method, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_any_network_is_layered_with_any_method(network, capsys):
    for method in METHODS:
        check_layers(network, method, capsys)


@pytest.mark.slow
def test_quickstart_reaches_97_percent_at_90_percent_sparsity():
    assert main([*command_of(ROOT / "recipes" / "quickstart.yaml"), "--summary.plots=false"]) == 0
    report = CompressionReport.load(next(Path.cwd().rglob("compression_report.json")))
    assert report.compressed.metrics["val_top1"] >= 0.97
    assert report.dense.metrics["val_top1"] >= 0.97
    (checkpoint,) = Path.cwd().rglob("*.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"].values()
    for weight in weights:
        if weight.dim() >= 2:
            assert int((weight == 0).sum()) == round(0.9 * weight.numel())
