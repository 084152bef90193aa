"""Our int8 files beside those of NNCF + OpenVINO and of ONNX Runtime's own quantization.

For each network one float model is quantized three times, by this library (after training, and by
quantization-aware training), by ``onnxruntime.quantization.quantize_static`` and by NNCF. All files
run in one process on one thread, one image at a time, in turns. Bars: ours takes at most 1.05 times
as long as each peer, and its logits are as close to those of the float network.

    python benchmarks/runtime_latency.py [--check] [--output FILE]
    python benchmarks/runtime_latency.py --quick --check     # post-training only, fewer rounds
    python benchmarks/runtime_latency.py --support           # every network on every runtime
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import runtime_support
import torch
from quantization_training import trained_module
from runtime_networks import KINDS, NETWORKS, NOTE, Network, batches, build, images
from runtime_peers import (
    Run,
    quantize_by_nncf,
    quantize_by_onnxruntime,
    run_file,
    run_openvino,
)
from runtime_timing import machine, time_in_turns
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_compress import QuantizationAwareTraining
from lit_compress.compress.quantization.post_training import (
    PostTrainingScheme,
    quantize_after_training,
)
from lit_compress.deploy import ParityTolerance, Target, export
from lit_compress.tasks import CIFAR10JPEGDataModule

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "runtime_latency.json"
SUBJECTS = ("resnet18", "mobilenet_v2")
PEERS = {"ort": "ONNX Runtime `quantize_static`", "openvino": "NNCF + OpenVINO"}
OURS = {"ptq": "ours, after training", "qat": "ours, QAT"}
BAR = 1.05
LOSS_BAR = 0.002  # of the cosine: less than that is equal
OWN_BAR = 0.99  # cosine of a file and the quantized network that it is of
ROUNDS, QUICK_ROUNDS = 150, 40
# Random weights: rounding decides between classes that are nearly tied, so only the cosine counts.
TOLERANCE = ParityTolerance(cosine=0.9, argmax_agreement=0.0)


class Classifier(pl.LightningModule):
    """Any network, trained on kinds of images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A rate that moves the weights without spoiling them."""
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


def quantized_after_training(model: nn.Module, seen: list[Tensor]) -> nn.Module:
    """A calibrated copy; biases are corrected, which NNCF does too."""
    network = copy.deepcopy(model)
    quantize_after_training(network, PostTrainingScheme(corrections=["bias_correction"]), seen)
    return network


def trained_with_quantizers(model: nn.Module, pixels: int, folder: Path) -> nn.Module:
    """A copy after a few steps with the callback, on images of ``pixels`` height and width."""
    x, kinds = images(4 * KINDS, pixels, seed=500)
    module = Classifier(copy.deepcopy(model).train())
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[QuantizationAwareTraining()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, kinds), batch_size=KINDS))
    return module.network.eval()


@dataclass(frozen=True)
class Subject:
    """A float network and its images.

    Attributes:
        model: In evaluation mode.
        seen: Batches for calibration.
        unseen: Batches on which outputs are compared.
    """

    model: nn.Module
    seen: list[Tensor]
    unseen: list[Tensor]

    @classmethod
    def of(cls, network: Network) -> Subject:
        """With random weights and synthetic images."""
        return cls(build(network), batches(network, 3, seed=100), batches(network, 2, seed=1000))

    @property
    def pixels(self) -> int:
        """Height and width of an image."""
        return self.unseen[0].shape[-1]


def trained_subjects() -> dict[str, Subject]:
    """The trained networks of the assets folder, on CIFAR-10; none without that folder."""
    if "LIT_COMPRESS_ASSETS" not in os.environ:
        return {}
    data = CIFAR10JPEGDataModule(batch_size=100, augmentation=None)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    seen = [batch[0] for batch in islice(data.train_dataloader(), 3)]
    unseen = [batch[0] for batch in islice(data.test_dataloader(), 0, 100, 10)]
    return {
        name: Subject(trained_module(name).model.eval(), seen, unseen)
        for name in ("resnet20", "mobilenet_v1")
    }


def measure(subject: Subject, *, rounds: int, with_training: bool) -> dict[str, Any]:
    """Quantize a network in each way and time the files in turns."""
    with tempfile.TemporaryDirectory() as name:
        files = _files(subject, Path(name), with_training)
        runs: dict[str, Run] = {
            kind: run_openvino(path) if path.suffix == ".xml" else run_file(path)
            for kind, (path, _) in files.items()
        }
        rows = {
            kind: {
                "size_bytes": sum(p.stat().st_size for p in path.parent.glob(f"{path.stem}.*")),
                **_closeness(subject, runs[kind]),
                **more,
            }
            for kind, (path, more) in files.items()
        }
        image = subject.unseen[0][:1].clone()
        times = time_in_turns({kind: _bound(run, image) for kind, run in runs.items()}, rounds)
    return {
        "pixels": subject.pixels,
        "files": {kind: rows[kind] | times[kind] for kind in files},
        "ratios": _ratios(times, "median_ms"),
        "wall_ratios": _ratios(times, "wall_median_ms"),
    }


def _ratios(times: Mapping[str, Mapping[str, float]], key: str) -> dict[str, float]:
    """How many times as long as each peer ours take."""
    return {
        f"{ours}_vs_{peer}": round(times[ours][key] / times[peer][key], 4)
        for ours in OURS
        for peer in PEERS
        if ours in times
    }


def _files(
    subject: Subject, folder: Path, with_training: bool
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """All files, and what is known of them; the peers start from the float one."""
    files: dict[str, tuple[Path, dict[str, Any]]] = {}
    unseen = subject.unseen

    def write(kind: str, network: nn.Module, target: Target) -> None:
        done = export(
            network, target, folder / kind, unseen[0], check_inputs=unseen, tolerance=TOLERANCE
        )
        files[kind] = done.path, {"cosine_with_own_torch": round(done.parity.cosine, 6)}

    write("float", subject.model, "onnx")
    write("ptq", quantized_after_training(subject.model, subject.seen), "ort-int8")
    if with_training:
        # Half of the resolution takes a quarter of the time.
        qat = trained_with_quantizers(subject.model, subject.pixels // 2, folder)
        write("qat", qat, "ort-int8")
    for kind, quantize, suffix in (
        ("ort", quantize_by_onnxruntime, ".onnx"),
        ("openvino", quantize_by_nncf, ".xml"),
    ):
        path = folder / f"{kind}{suffix}"
        quantize(files["float"][0], subject.seen, path)
        files[kind] = path, {}
    return files


def _bound(run: Run, image: Tensor) -> Callable[[], object]:
    return lambda: run(image)


@torch.no_grad()
def _closeness(subject: Subject, run: Run) -> dict[str, float]:
    """Of the logits of all unseen images to those of the float network."""
    expected = torch.cat([subject.model(batch) for batch in subject.unseen])
    found = torch.cat([run(batch) for batch in subject.unseen])
    cosine = torch.cosine_similarity(expected.flatten(), found.flatten(), dim=0)
    agreement = (expected.argmax(1) == found.argmax(1)).float().mean()
    return {
        "cosine_with_float": round(float(cosine), 6),
        "argmax_agreement": round(float(agreement), 4),
    }


def measure_all(*, quick: bool) -> dict[str, Any]:
    """All subjects."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    return {
        "machine": machine(),
        "load_average": round(os.getloadavg()[0], 2),
        "weights": NOTE,
        "rounds": rounds,
        "networks": {
            name: measure(Subject.of(NETWORKS[name]), rounds=rounds, with_training=not quick)
            for name in SUBJECTS
        },
        "trained": {
            name: measure(subject, rounds=rounds, with_training=False)
            for name, subject in ({} if quick else trained_subjects()).items()
        },
    }


def check(results: Mapping[str, Any]) -> list[str]:
    """What does not hold; for trained networks, which are small, only closeness is judged."""
    missed = []
    for name, network in results["networks"].items():
        for which, value in network["ratios"].items():
            if not value <= BAR:
                missed.append(f"{name}, {which}: takes {value:.3f} times as long, bar {BAR}")
    for name, network in [*results["networks"].items(), *results["trained"].items()]:
        files = network["files"]
        for peer in PEERS:
            ours, theirs = (files[kind]["cosine_with_float"] for kind in ("ptq", peer))
            if not ours >= theirs - LOSS_BAR:
                missed.append(f"{name}: cosine {ours:.4f} with the float network, {peer} {theirs}")
        for kind in OURS:
            own = files.get(kind, {}).get("cosine_with_own_torch", 1.0)
            if not own >= OWN_BAR:
                missed.append(f"{name}, {kind}: cosine {own:.4f} with torch, bar {OWN_BAR}")
    return missed


def table(results: Mapping[str, Any]) -> str:
    """The files of both networks as Markdown."""
    lines = [
        "| network | file | ms (quartiles) | ratio to ORT's | ratio to OpenVINO | MB | cosine with "
        "the float network | argmax agreement | cosine with its own network in torch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    labels = {"float": "fp32, ONNX Runtime", **OURS, **PEERS}
    titled = [*results["networks"].items()]
    titled += [(f"{name}, trained", network) for name, network in results["trained"].items()]
    for name, network in titled:
        for kind, label in labels.items():
            row = network["files"].get(kind)
            if row is None:
                continue
            ratios = [network["ratios"].get(f"{kind}_vs_{peer}") for peer in PEERS]
            own = row.get("cosine_with_own_torch")
            cells = [
                f"{name}, {network['pixels']} px",
                label,
                f"{row['median_ms']:.2f} ({row['p25_ms']:.2f}–{row['p75_ms']:.2f})",
                *("" if value is None else f"{value:.3f}" for value in ratios),
                f"{row['size_bytes'] / 1e6:.1f}",
                # What training did to the weights is no error of the file.
                "" if kind == "qat" else f"{row['cosine_with_float']:.4f}",
                "" if kind == "qat" else f"{100 * row['argmax_agreement']:.1f} %",
                "" if own is None else f"{own:.4f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_results() -> dict[str, Any]:
    """The committed results."""
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    return results


def _report(results: Mapping[str, Any]) -> list[str]:
    print(table(results))
    missed = check(results)
    for line in missed:
        print(line)
    for name, network in results["networks"].items():
        for which, value in network["ratios"].items():
            ours, _, peer = which.partition("_vs_")
            prefix = "" if ours == "ptq" else f"{ours}_"
            print(f"{prefix}ratio_vs_{peer}_{name}={value:.3f}", end=" ")
    print(f"missed={len(missed)}")
    return missed


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no training; not saved")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar does not hold")
    parser.add_argument("--support", action="store_true", help="all networks on all runtimes")
    parser.add_argument("--output", type=Path, help="where to write the JSON of a run")
    arguments = parser.parse_args()
    if arguments.support:
        return runtime_support.main(arguments.output)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results = measure_all(quick=arguments.quick)
    output = arguments.output
    if output is None and not arguments.quick:
        output = RESULTS
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    missed = _report(results)
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
