"""Quantization judged: accuracy after training and without it, size in files, batch norms' eps.

Bars:

- training (means over three seeds, see ``quantization_training.py``): ResNet-20 in 8 bits at most
  0.2 points below float fine-tuning with the same budget, with 4-bit weights within 1.5 of the
  float network; MobileNet-v1 (0.5) in 8 bits within 0.3 of the float network;
- after training, in 8 bits: ResNet-20 within 0.3 points of the float network, MobileNet-v1 within
  1.0, in torch and in the file that ONNX Runtime runs; networks that were trained quantized lose
  at most 0.2 in such a file;
- sizes: ResNet-20 in 8 bits is 4 times smaller, and 9 times with 80 % zeros, in files that load
  and compute the same bit by bit;
- eps: with eps = 1e-3 beside small variances, a prepared network computes what it did (1e-5), and
  batch norms folded into integers change nothing (1e-5) but what rounding does.

    python benchmarks/quantization_accuracy.py [--assets DIR] [--parts post_training ...]
    python benchmarks/quantization_accuracy.py --parts checkpoints --checkpoints DIR
    python benchmarks/quantization_accuracy.py --quick --check

The full run adds to ``docs/results/quantization_accuracy.json`` point by point, and goes on where
it was stopped. ``--quick`` reads
what training gave and measures the rest anew, on 1,000 test images.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import quantization_training as training
import torch
from interleaved import machine
from torch import Tensor, nn

from lit_compress import load_compressed
from lit_compress.compress.clustered_weights import ClusteredWeights
from lit_compress.compress.layers import select_weights
from lit_compress.compress.packed_checkpoint import write_packed_checkpoint
from lit_compress.compress.quantization.integers import integer_network
from lit_compress.compress.quantization.network import calibrate, prepare
from lit_compress.compress.quantization.post_training import (
    PostTrainingScheme,
    quantize_after_training,
)
from lit_compress.compress.quantization.ranges import RangeKind
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.compress.sparsity import allocate_zeros, magnitude_masks
from lit_compress.deploy import export, load_file
from lit_compress.measure.size import compressed_length
from lit_compress.tasks import CIFAR10JPEGDataModule, build_model, weights_path
from lit_compress.tasks.models import ConvClassifier, mobilenet_v1

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "quantization_accuracy.json"
PARTS = ("training", "post_training", "checkpoints", "sizes", "eps")
LABELS = {"resnet20": "ResNet-20", "mobilenet_v1": "MobileNet-v1 (0.5)"}
NUM_TEST_IMAGES = 10_000

# In points.
CONTROL_BAR, FOUR_BIT_BAR, MOBILENET_BAR = 0.2, 1.5, 0.3
POST_TRAINING_BARS = {"resnet20": 0.3, "mobilenet_v1": 1.0}
FILE_BAR = 0.2
# How many times smaller than the float32 file.
SIZE_BARS = {"int8": 4.0, "80 % zeros, int8": 9.0}
# Relative errors, and the error of integers / that of the rounding that they stand for.
EPS_BAR, CONVERTED_BAR = 1e-5, 1.05

Batch = tuple[Tensor, Tensor]
Results = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Of quantization after training."""

    ranges: tuple[RangeKind, ...] = ("mse", "minmax")
    seeds: tuple[int, ...] = (1, 2, 3)
    num_calibration_batches: int = 16
    batch_size: int = 128
    test_stride: int = 1  # every so many test images


QUICK = Settings(ranges=("mse",), seeds=(1,), test_stride=10)


# --- Accuracy -------------------------------------------------------------------------------------


@cache
def batches(settings: Settings, seed: int) -> tuple[list[Batch], list[Batch]]:
    """Of the training split, for calibration, and of the test split."""
    needed = settings.num_calibration_batches * settings.batch_size
    data = CIFAR10JPEGDataModule(
        batch_size=settings.batch_size, seed=seed, max_train_per_class=needed // 10 + 1
    )
    data.prepare_data()
    data.setup()
    drawn = zip(range(settings.num_calibration_batches), data.train_dataloader(), strict=False)
    images, labels = data.splits["test"]
    data.splits["test"] = images[:: settings.test_stride], labels[:: settings.test_stride]
    return [batch for _, batch in drawn], list(data.test_dataloader())


@cache
def float_network(model: str) -> nn.Module:
    """A trained network of the study, in evaluation mode."""
    return training.trained_module(model).model.eval()


def quantized(network: nn.Module, calibration: list[Batch], ranges: RangeKind) -> nn.Module:
    """A copy in 8 bits, as ``PostTrainingQuantization(ranges=ranges)`` makes it."""
    network = copy.deepcopy(network)
    scheme = PostTrainingScheme(ranges=ranges)
    quantize_after_training(network, scheme, calibration, lambda net, batch: net(batch[0]))
    return network


@torch.no_grad()
def hits(run: Callable[[Tensor], Tensor], test: list[Batch]) -> Tensor:
    """Which images are classified rightly; bool, ``[num_images]``."""
    return torch.cat([run(images).argmax(1) == labels for images, labels in test])


def top1(right: Tensor) -> float:
    """In percent."""
    return round(100 * right.double().mean().item(), 2)


@cache
def float_hits(model: str, settings: Settings) -> Tensor:
    """Of a network of the study, before quantization."""
    return hits(float_network(model), batches(settings, settings.seeds[0])[1])


def hits_in_file(network: nn.Module, test: list[Batch]) -> Tensor:
    """Of the int8 file of a quantized network in ONNX Runtime, which checks its parity first."""
    images = test[0][0]
    with tempfile.TemporaryDirectory() as folder:
        path = export(network, "ort-int8", Path(folder) / "int8.onnx", images).path
        with load_file(path) as file:
            return hits(lambda images: file((images,))[0], test)


def post_training(
    settings: Settings, points: list[Results], write: Callable[[list[Results]], None]
) -> None:
    """Quantize and score what is not among the points yet; ``write`` takes all of them so far."""
    finished = {(p["ranges"], p["seed"], p["model"]) for p in points}
    for ranges, seed, model in product(settings.ranges, settings.seeds, LABELS):
        if (ranges, seed, model) in finished:
            continue
        calibration, test = batches(settings, seed)
        before = float_hits(model, settings)
        network = quantized(float_network(model), calibration, ranges)
        after = hits(network, test)
        point = {"model": model, "ranges": ranges, "seed": seed, "num_images": len(after)}
        point |= {"float_top1": top1(before), "top1": top1(after)}
        point["num_changed"] = int((before != after).sum())
        if seed == settings.seeds[0]:
            point["file_top1"] = top1(hits_in_file(network, test))
        points.append(point)
        write(points)


def quantized_runs() -> list[tuple[str, str]]:
    """Network and method of the training runs that quantize."""
    return [(m, how) for m, hows in training.METHODS.items() for how in hows if "qat" in how]


def checkpoint_rows(folder: Path, settings: Settings) -> list[Results]:
    """Networks that were trained quantized (seed 1), in torch and in their int8 files."""
    _, test = batches(settings, settings.seeds[0])
    rows = []
    for model, method in quantized_runs():
        path = folder / f"{model}-{method}-1.ckpt"
        if not path.exists():
            continue
        network = load_compressed(path, training.trained_module(model).model).eval()
        in_torch, in_file = hits(network, test), hits_in_file(network, test)
        row = {"model": model, "method": method, "seed": 1, "num_images": len(in_torch)}
        rows.append(row | {"top1": top1(in_torch), "file_top1": top1(in_file)})
    return rows


# --- Sizes ----------------------------------------------------------------------------------------


def sizes(settings: Settings) -> list[Results]:
    """Bytes of ResNet-20 in files of several kinds, and whether they compute the same.

    Weights are made sparse and clustered without any training: sizes hardly depend on it, and
    accuracy is for other studies to say.
    """
    calibration, test = batches(settings, settings.seeds[0])
    images = test[0][0]
    dense = float_network("resnet20")
    sparse, clustered = with_zeros(dense, 0.8), with_clusters(dense, 16)
    networks = {
        "int8": quantized(dense, calibration[:2], "mse"),
        "80 % zeros": sparse,
        "80 % zeros, int8": quantized(sparse, calibration[:2], "mse"),
        "16 clusters": clustered,
        "80 % zeros, 16 clusters": with_clusters(sparse, 16),
    }
    raw = weights_path("resnet20-cifar10-jpeg").read_bytes()
    rows: list[Results] = [
        {"what": "float32", "file": "torch.save", "size_bytes": len(raw)},
        {
            "what": "float32",
            "file": "torch.save, deflate",
            "size_bytes": compressed_length(raw),
        },
    ]
    with tempfile.TemporaryDirectory() as folder:
        for what, network in networks.items():
            rows.append({"what": what} | packed(network, images, Path(folder) / "packed.pt"))
        file = export(networks["int8"], "ort-int8", Path(folder) / "int8.onnx", images)
    for kind, size in (("", file.size_bytes), (", deflate", file.compressed_size_bytes)):
        rows.append({"what": "int8", "file": f"ONNX{kind}", "size_bytes": size})
    return rows


@torch.no_grad()
def packed(network: nn.Module, images: Tensor, path: Path) -> Results:
    """Write a packed file, load it into a fresh network, and compare what the two compute."""
    size = write_packed_checkpoint(path, network)
    fresh = load_compressed(path, build_model("resnet20", num_classes=10)).eval()
    same = torch.equal(network(images), fresh(images))
    return {"file": "packed", "size_bytes": size, "same_outputs": same}


@torch.no_grad()
def with_zeros(network: nn.Module, sparsity: float) -> nn.Module:
    """A copy whose least weights are zero, the same share in each layer."""
    network = copy.deepcopy(network)
    weights = {name: network.get_parameter(name) for name in select_weights(network).names}
    zeros = allocate_zeros({n: w.numel() for n, w in weights.items()}, sparsity, "uniform")
    for name, mask in magnitude_masks(weights, zeros).items():
        weights[name].mul_(mask)
    return network


def with_clusters(network: nn.Module, num_clusters: int) -> nn.Module:
    """A copy with so many values in each weight; zeros stay zero."""
    network = copy.deepcopy(network)
    weights = {name: network.get_parameter(name) for name in select_weights(network).names}
    ClusteredWeights(weights, dict.fromkeys(weights, num_clusters)).cluster()
    return network


# --- eps ------------------------------------------------------------------------------------------


@torch.no_grad()
def eps_errors(eps: float = 1e-3) -> Results:
    """Relative errors of a MobileNet whose batch norms' eps matters.

    ``prepared``: with quantizers that do not round yet, in evaluation and in training mode.
    ``folded_weights``: integers against the rounding that they stand for; weights only, where
    nothing but folding can differ. ``rounded`` and ``converted``: the same two against the float
    network, in 8 bits. ``..._eps_1e-5``: with eps as torchao's PT2E rewrites it.
    """
    network, images = mobilenet_of_small_variances(eps)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    variances = torch.cat([cast("Tensor", norm.running_var) for norm in norms])
    exact = network(images)
    prepared = copy.deepcopy(network)
    prepare(prepared, QuantizationScheme(), lambda net: net(images))
    weights_only = calibrated(network, images, activation_bits=None)
    in_8_bits = calibrated(network, images, activation_bits=8)
    return {
        "eps": eps,
        "running_var": [variances.min().item(), variances.max().item()],
        "prepared": relative_error(prepared(images), exact),
        "prepared_in_training": relative_error(
            copy.deepcopy(prepared).train()(images), copy.deepcopy(network).train()(images)
        ),
        "folded_weights": relative_error(
            integer_network(weights_only)(images), weights_only(images)
        ),
        "rounded": relative_error(in_8_bits(images), exact),
        "converted": relative_error(integer_network(in_8_bits)(images), exact),
        "float_eps_1e-5": relative_error(with_eps(network, 1e-5)(images), exact),
        "converted_eps_1e-5": relative_error(
            integer_network(with_eps(in_8_bits, 1e-5))(images), exact
        ),
    }


def mobilenet_of_small_variances(eps: float) -> tuple[nn.Module, Tensor]:
    """A small MobileNet and images on which the inputs of its norms vary by 1e-4 to 1e-2.

    It is the stem and the first four blocks of MobileNet-v1 (0.25): with random weights, each
    layer more makes the network chaotic, and rounding then drowns what is to be seen.
    """
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    whole = mobilenet_v1(width=0.25).features
    features = list(whole.children())[: 3 * (1 + 2 * 4)]  # convolution, norm, ReLU
    width = cast("nn.BatchNorm2d", features[-2]).num_features
    network = ConvClassifier(nn.Sequential(*features), width, num_classes=10).eval()
    images = x = torch.randn(32, 3, 32, 32, generator=generator)
    for layer, following in zip(features, [*features[1:], None], strict=True):
        if isinstance(following, nn.BatchNorm2d):
            variance, mean_ = torch.var_mean(layer(x), dim=(0, 2, 3))
            wanted = 10 ** (-4 + 2 * torch.rand(len(variance), generator=generator))
            factor = (wanted / variance.clamp_min(1e-12)).sqrt()
            cast("nn.Conv2d", layer).weight.mul_(factor.reshape(-1, 1, 1, 1))
            following.eps = eps
            cast("Tensor", following.running_var).copy_(wanted)
            cast("Tensor", following.running_mean).copy_(mean_ * factor)
            following.weight.uniform_(0.5, 1.5)
            following.bias.normal_(0, 0.2)
        x = layer(x)
    return network, images


def calibrated(network: nn.Module, images: Tensor, activation_bits: int | None) -> nn.Module:
    """A copy with 8-bit weights, calibrated on the images."""
    network = copy.deepcopy(network)
    scheme = QuantizationScheme(activation_bits=activation_bits)
    prepare(network, scheme, lambda net: net(images))
    calibrate(network, lambda net, batch: net(batch), [images])
    return network


def with_eps(network: nn.Module, eps: float) -> nn.Module:
    """A copy with another eps."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
    return network


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference / norm."""
    return float((found - exact).double().norm() / exact.double().norm())


# --- What came out --------------------------------------------------------------------------------


def training_results() -> Results:
    """What the training runs gave so far."""
    return training.read_results() if training.RESULTS.exists() else {"points": []}


def training_table(results: Results, trained: Results) -> str:
    """QAT beside its control, as Markdown."""
    bars = {
        ("resnet20", "qat-w8a8"): f"the control − {CONTROL_BAR}",
        ("resnet20", "qat-w4a8"): f"float − {FOUR_BIT_BAR}",
        ("mobilenet_v1", "qat-w8a8"): f"float − {MOBILENET_BAR}",
    }
    lines = ["| network | | top-1 | seeds | at least |", "| --- | --- | --- | --- | --- |"]
    for model, methods in training.METHODS.items():
        lines.append(f"| {LABELS[model]} | float, not tuned | {_float(results, model)} | | |")
        for method in ("control", *(m for m in methods if m != "control")):
            values = training.scores(trained, model, method)
            bar = bars.get((model, method), "")
            lines.append(f"| | `{method}` | {spread(values)} | {len(values)} | {bar} |")
    return "\n".join(lines)


def post_training_table(results: Results) -> str:
    """Quantization after training, as Markdown."""
    lines = [
        "| network | float | ranges | in torch | ONNX Runtime, seed 1 | at least |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model, label in LABELS.items():
        for ranges in Settings().ranges:
            points = post_training_points(results, model, ranges)
            if points:
                values = spread([p["top1"] for p in points])
                files = spread([p["file_top1"] for p in points if "file_top1" in p])
                least = f"float − {POST_TRAINING_BARS[model]}" if ranges == "mse" else ""
                first = f"{label} | {points[0]['float_top1']:.2f} | `{ranges}`"
                lines.append(f"| {first} | {values} | {files} | {least} |")
    return "\n".join(lines)


def checkpoint_table(results: Results) -> str:
    """Networks that were trained quantized, in torch and in files, as Markdown."""
    lines = ["| network | trained as | in torch | ONNX Runtime |", "| --- | --- | --- | --- |"]
    for row in results.get("checkpoints", []):
        scores = f"{row['top1']:.2f} | {row['file_top1']:.2f}"
        lines.append(f"| {LABELS[row['model']]} | `{row['method']}` | {scores} |")
    return "\n".join(lines)


def sizes_table(results: Results) -> str:
    """Files of ResNet-20, as Markdown."""
    lines = [
        "| ResNet-20 | file | bytes | times smaller | at least | same outputs, loaded again |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = results["sizes"]
    for row in rows:
        ratio = rows[0]["size_bytes"] / row["size_bytes"]
        bar = SIZE_BARS.get(row["what"], "") if row["file"] == "packed" else ""
        same = {True: "bit for bit", False: "no", None: ""}[row.get("same_outputs")]
        size = f"{row['size_bytes']:,} | {ratio:.2f}"
        lines.append(f"| {row['what']} | {row['file']} | {size} | {bar} | {same} |")
    return "\n".join(lines)


def eps_table(results: Results) -> str:
    """Relative errors, as Markdown."""
    errors = results["eps"]
    rows = [
        ("prepared, not rounding, evaluation mode", "prepared", EPS_BAR),
        ("prepared, not rounding, training mode", "prepared_in_training", EPS_BAR),
        ("integer weights against the rounding they stand for", "folded_weights", EPS_BAR),
        ("8 bits, rounded in floating point", "rounded", None),
        ("8 bits, integers", "converted", CONVERTED_BAR * errors["rounded"]),
        ("float, eps rewritten to 1e-5", "float_eps_1e-5", None),
        ("8 bits, integers, eps rewritten to 1e-5", "converted_eps_1e-5", None),
    ]
    lines = ["| | relative error | at most |", "| --- | --- | --- |"]
    lines += [f"| {a} | {errors[b]:.2g} | {f'{c:.2g}' if c else ''} |" for a, b, c in rows]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return "–"
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _float(results: Results, model: str) -> str:
    return f"{results['float'][model]:.2f}" if model in results["float"] else "–"


def post_training_points(results: Results, model: str, ranges: str) -> list[Results]:
    """The points of one network and one way to find ranges."""
    found = results.get("post_training", [])
    return [p for p in found if p["model"] == model and p["ranges"] == ranges]


def section() -> str:
    """The part of the results page."""
    results, trained = read_results(), training_results()
    settings, errors = results["settings"], results["eps"]
    low, high = errors["running_var"]
    of_training = training.Settings()
    return f"""## Quantization: CIFAR-10 (JPEG)

Top-1 in percent on the 10,000 test images; mean ± standard deviation over the seeds.

### Quantization-aware training

All runs start from the same float network and train for {of_training.epochs} epochs on 45,000
images (SGD, learning rate {of_training.lr} with a cosine, batch {of_training.batch_size},
{of_training.precision}). The control is float fine-tuning with the same budget. `w4a8`: 4-bit
weights, learned scales.

{training_table(results, trained)}

Networks of seed 1 in the int8 file that is shipped:

{checkpoint_table(results)}

### After training, without any

`PostTrainingQuantization` in 8 bits, {settings["num_calibration_batches"]} batches of
{settings["batch_size"]} training images, anew for each seed.

{post_training_table(results)}

### Size

Zeros and clusters without any training; sizes hardly depend on it. Packed files are compressed in
themselves.

{sizes_table(results)}

### eps

The first four blocks of MobileNet-v1 (0.25), random, with eps = {errors["eps"]:g} and running
variances from {low:.1g} to {high:.1g}. The last two rows are what rewriting eps to 1e-5, as
torchao's PT2E does, would do to it.

{eps_table(results)}

JSON: [`results/quantization_accuracy.json`](results/quantization_accuracy.json) and
[`results/quantization_training.json`](results/quantization_training.json); made by
`python benchmarks/quantization_accuracy.py`."""


# --- The bars -------------------------------------------------------------------------------------


def check(results: Results, trained: Results) -> list[str]:
    """What does not hold."""
    missed = [f"{part} was not measured" for part in PARTS[1:] if not results.get(part)]
    seen = {(row["model"], row["method"]) for row in results.get("checkpoints", [])}
    missed += [f"{' '.join(one)} has no file" for one in quantized_runs() if one not in seen]
    missed += [f"{m} was not scored in float" for m in LABELS if m not in results["float"]]
    missed += missed_in_training(results["float"], trained)
    missed += missed_after_training(results)
    missed += [
        f"{row['model']} {row['method']} scores {row['file_top1']:.2f} in its file and "
        f"{row['top1']:.2f} in torch"
        for row in results.get("checkpoints", [])
        if abs(row["file_top1"] - row["top1"]) > FILE_BAR + 1e-9
    ]
    if results.get("sizes"):
        missed += missed_in_sizes(results["sizes"])
    if results.get("eps"):
        missed += missed_by_eps(results["eps"])
    return missed


def missed_in_training(floating: Results, trained: Results) -> list[str]:
    """Of QAT."""
    missed, means = [], {}
    for model, methods in training.METHODS.items():
        for method in methods:
            values = training.scores(trained, model, method)
            if len(values) != len(training.SEEDS):
                missed.append(f"{model} {method} has {len(values)} runs of {len(training.SEEDS)}")
            means[model, method] = mean(values) if values else math.nan
    bars = [
        ("resnet20", "qat-w8a8", means["resnet20", "control"], CONTROL_BAR),
        ("resnet20", "qat-w4a8", floating.get("resnet20", math.nan), FOUR_BIT_BAR),
        ("mobilenet_v1", "qat-w8a8", floating.get("mobilenet_v1", math.nan), MOBILENET_BAR),
    ]
    for model, method, reference, bar in bars:
        if means[model, method] < reference - bar - 1e-9:  # not where one of the two is missing
            missed.append(
                f"{model} {method} scores {means[model, method]:.2f}, below {reference:.2f} - {bar}"
            )
    return missed


def missed_after_training(results: Results) -> list[str]:
    """Of quantization after training; fewer images than all may miss by two standard errors."""
    missed = []
    for model, bar in POST_TRAINING_BARS.items():
        points = post_training_points(results, model, "mse")
        num_seeds = len(results["settings"]["seeds"])
        if len(points) != num_seeds:
            missed.append(f"{model} has {len(points)} points after training of {num_seeds}")
        if not points:
            continue
        slack = mean(_slack(p) for p in points)
        in_torch = mean(p["float_top1"] - p["top1"] for p in points)
        in_files = [p["float_top1"] - p["file_top1"] for p in points if "file_top1" in p]
        in_file = mean(in_files) if in_files else math.nan
        for where, lost in (("torch", in_torch), ("its file", in_file)):
            if not lost <= bar + slack + 1e-9:
                missed.append(f"{model} after training loses {lost:.2f} points in {where}")
    return missed


def _slack(point: Results) -> float:
    if point["num_images"] >= NUM_TEST_IMAGES:
        return 0.0
    # Of a difference of shares on the same images: McNemar 1947.
    return 200 * math.sqrt(point["num_changed"]) / float(point["num_images"])


def missed_in_sizes(rows: list[Results]) -> list[str]:
    """Of files."""
    by_name = {row["what"]: row for row in rows if row["file"] == "packed"}
    missed = [f"{n} computes something else" for n, r in by_name.items() if not r["same_outputs"]]
    for name, bar in SIZE_BARS.items():
        ratio = rows[0]["size_bytes"] / by_name[name]["size_bytes"]
        if ratio < bar:
            missed.append(f"{name} is {ratio:.2f} times smaller, not {bar}")
    return missed


def missed_by_eps(errors: Results) -> list[str]:
    """Of batch norms."""
    bars = dict.fromkeys(("prepared", "prepared_in_training", "folded_weights"), EPS_BAR)
    bars["converted"] = CONVERTED_BAR * errors["rounded"]
    return [
        f"the relative error {name} is {errors[name]:.2g}, above {bar:.2g}"
        for name, bar in bars.items()
        if not errors[name] <= bar
    ]


# --- The study ------------------------------------------------------------------------------------


def read_results() -> Results:
    """The committed results."""
    results: Results = json.loads(RESULTS.read_text())
    return results


def write(results: Results, path: Path) -> None:
    """Save as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


def run_parts(
    settings: Settings, parts: Sequence[str], path: Path, checkpoints: Path | None = None
) -> Results:
    """Measure the parts asked for and keep the others as they are in the results."""
    plain = json.loads(json.dumps(asdict(settings)))
    results: Results = read_results() if RESULTS.exists() else {"float": {}}
    if results.setdefault("settings", plain) != plain and path == RESULTS:
        raise SystemExit(f"{RESULTS} was made with other settings; move it away first.")
    results |= {"settings": plain, "machine": machine()}

    def keep(part: str, value: Any) -> None:
        results[part] = value
        write(results, path)

    if "eps" in parts:
        keep("eps", eps_errors())
    if "sizes" in parts:
        keep("sizes", sizes(settings))
    if "post_training" in parts:
        if settings.test_stride == 1:
            keep("float", {model: top1(float_hits(model, settings)) for model in LABELS})
        points = results.get("post_training", []) if path == RESULTS else []
        post_training(settings, points, lambda points: keep("post_training", points))
    if "checkpoints" in parts and checkpoints is not None:
        rows = checkpoint_rows(checkpoints, settings)
        if rows:  # without checkpoints, those of an earlier run stay
            keep("checkpoints", rows)
    return results


def main() -> int:
    """Run, print, and return the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1,000 test images, no training")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar does not hold")
    parser.add_argument("--assets", help="the folder that LIT_COMPRESS_ASSETS would name")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    parser.add_argument("--checkpoints", type=Path, help="folder of checkpoints that training kept")
    parser.add_argument("--output", type=Path, help="where --quick writes JSON")
    parser.add_argument("--workers", type=int, default=1, help="training runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    arguments = parser.parse_args()
    if arguments.assets:
        os.environ["LIT_COMPRESS_ASSETS"] = arguments.assets
    training.be_quiet(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.quick:
            path = arguments.output or Path(folder) / "quick.json"
            results = run_parts(QUICK, ("eps", "sizes", "post_training"), path)
        else:
            keep = arguments.checkpoints or Path(folder)
            if "training" in arguments.parts:
                training.run_all(training.Settings(), arguments.workers, arguments.threads, keep)
            results = run_parts(Settings(), arguments.parts, RESULTS, keep)
    trained = training_results()
    missed = check(results, trained)
    print(training_table(results, trained))
    tables = {"checkpoints": checkpoint_table, "post_training": post_training_table}
    tables |= {"sizes": sizes_table, "eps": eps_table}
    for part, table in tables.items():
        if results.get(part):
            print(f"\n{table(results)}")
    for line in missed:
        print(line)
    print(f"missed_bars={len(missed)}")
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
