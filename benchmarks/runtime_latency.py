"""Our int8 files beside those of NNCF + OpenVINO and of ONNX Runtime's own quantization.

One float network is quantized by this library (after training, one file for each of our routes, and
by quantization-aware training), by ``onnxruntime.quantization.quantize_static`` and by NNCF, both
with their defaults and with their variant for processors without VNNI. All files run in one process
on one thread, one image at a time, in turns. Bars:

- the fastest of our files takes at most 1.05 times as long as the fastest peer whose logits are as
  close to those of the float network as ours; a peer that is further away is wrong here and does
  not count;
- each of our files is as close to the float network as every peer, and to its own quantized network
  in torch (cosine .998).

Small networks, trained ones where the assets are, are judged by closeness only.

    python benchmarks/runtime_latency.py [--check] [--output FILE]
    python benchmarks/runtime_latency.py --quick --check     # one timed network, fewer rounds
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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import runtime_support
import torch
from bars import Ratio, TimeBar, missed
from machine import machine, say_duration
from quantization_training import trained_module
from runtime_networks import KINDS, NETWORKS, NOTE, Network, batches, build, images
from runtime_peers import PEERS, Run, run_file
from runtime_timing import time_in_turns
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
RANDOM, TRAINED = "random", "trained"  # weights
SUBJECTS = ("resnet18", "mobilenet_v2")
SMALL_SUBJECTS = ("mobilenet_v1", "resnet20")  # judged by closeness only
OURS: dict[Target, str] = {
    "ort-int8": "ours, after training, `ort-int8`",
    "openvino": "ours, after training, `openvino`",
}
"""Our routes, which all start from the same quantized network; another one is a line here."""
QAT = "qat ort-int8"
LABELS = {
    "float": "fp32, ONNX Runtime",
    **OURS,
    QAT: "ours, QAT, `ort-int8`",
    **{kind: peer.label for kind, peer in PEERS.items()},
}
BAR = 1.05
LOSS_BAR = 0.002  # of the cosine: less than that is equal
OWN_BAR = 0.998  # cosine of a file and the quantized network that it is of
ROUNDS, QUICK_ROUNDS = 150, 30
QUICK_SUBJECTS = ("resnet18",)
QUICK_PIXELS = 128
QUICK_UNITS = 250.0  # of exports, see one_export
# Random weights: rounding decides between classes that are nearly tied, so only the cosine counts.
TOLERANCE = ParityTolerance(cosine=0.9, argmax_agreement=0.0, max_error=1.0)


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


def small_subjects(quick: bool) -> dict[str, tuple[str, Subject]]:
    """By name, weights and network: trained on CIFAR-10 where the assets are, else random."""
    if "LIT_COMPRESS_ASSETS" not in os.environ:
        return {name: (RANDOM, Subject.of(NETWORKS[name])) for name in SMALL_SUBJECTS}
    data = CIFAR10JPEGDataModule(batch_size=100, augmentation=None)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    seen = [batch[0] for batch in islice(data.train_dataloader(), 1 if quick else 3)]
    unseen = [batch[0] for batch in islice(data.test_dataloader(), 0, 100, 50 if quick else 10)]
    return {
        name: (TRAINED, Subject(trained_module(name).model.eval(), seen, unseen))
        for name in SMALL_SUBJECTS
    }


def measure(
    subject: Subject, *, rounds: int, with_training: bool, weights: str = RANDOM
) -> dict[str, Any]:
    """Quantize a network in each way and time the files in turns."""
    with tempfile.TemporaryDirectory() as name:
        files = _files(subject, Path(name), with_training)
        runs: dict[str, Run] = {
            kind: PEERS[kind].run(path) if kind in PEERS else run_file(path)
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
        "weights": weights,
        "files": {kind: rows[kind] | times[kind].summary() for kind in files},
        "ratios": {
            f"{ours} / {peer}": Ratio.of(times[ours].processor, times[peer].processor).as_json()
            for ours in (*OURS, QAT)
            for peer in PEERS
            if ours in times
        },
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
    quantized = quantized_after_training(subject.model, subject.seen)
    for target in OURS:
        write(target, quantized, target)
    if with_training:
        # Half of the resolution takes a quarter of the time.
        qat = trained_with_quantizers(subject.model, subject.pixels // 2, folder)
        write(QAT, qat, "ort-int8")
    for kind, peer in PEERS.items():
        path = folder / f"{kind}{peer.suffix}"
        peer.quantize(files["float"][0], subject.seen, path)
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


def one_export() -> Callable[[], object]:
    """The unit of which the duration is a multiple: what takes longest is tracing networks."""
    network, images = NETWORKS["resnet20"].build().eval(), torch.zeros(2, 3, 32, 32)
    return lambda: torch.export.export(network, (images,))


def measure_all(*, quick: bool) -> dict[str, Any]:
    """All subjects."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    measured = {}
    for name in QUICK_SUBJECTS if quick else SUBJECTS:
        network = replace(NETWORKS[name], pixels=QUICK_PIXELS) if quick else NETWORKS[name]
        measured[name] = measure(Subject.of(network), rounds=rounds, with_training=not quick)
    for name, (weights, subject) in small_subjects(quick).items():
        measured[name] = measure(subject, rounds=rounds, with_training=False, weights=weights)
    return {"machine": machine(), "weights": NOTE, "rounds": rounds, "networks": measured}


# --- What came out --------------------------------------------------------------------------------


def right_ours(network: Mapping[str, Any]) -> list[str]:
    """Our files, made after training, that compute what their own network does in torch."""
    files = network["files"]
    return [
        kind for kind in OURS if kind in files and files[kind]["cosine_with_own_torch"] >= OWN_BAR
    ]


def fastest(network: Mapping[str, Any], kinds: Iterable[str]) -> str | None:
    """The file with the smallest median; ``None`` of none."""
    files = network["files"]
    return min(kinds, key=lambda kind: float(files[kind]["median_ms"]), default=None)


def reference(network: Mapping[str, Any]) -> str:
    """Our fastest file that is right, or, where none is, our fastest file."""
    ours = fastest(network, right_ours(network) or [k for k in OURS if k in network["files"]])
    assert ours is not None, "there is no file of ours"
    return ours


def right_peers(network: Mapping[str, Any], ours: str) -> list[str]:
    """Peers that are as close to the float network as our file, or closer."""
    files = network["files"]
    least = files[ours]["cosine_with_float"] - LOSS_BAR
    return [kind for kind in PEERS if kind in files and files[kind]["cosine_with_float"] >= least]


def speed_bar(name: str, network: Mapping[str, Any]) -> TimeBar:
    """Our fastest file against the fastest peer that is right."""
    if not right_ours(network):
        return TimeBar(name, BAR, None, "none of our files is right")
    ours = reference(network)
    peer = fastest(network, right_peers(network, ours))
    if peer is None:
        return TimeBar(f"{name}, {ours}", BAR, None, "no peer is as close to the float network")
    ratio = Ratio.from_json(network["ratios"][f"{ours} / {peer}"])
    return TimeBar(f"{name}, {ours} / {peer}", BAR, ratio)


def time_bars(results: Mapping[str, Any]) -> list[TimeBar]:
    """Of the networks whose speed is judged."""
    networks = results["networks"]
    return [speed_bar(name, networks[name]) for name in SUBJECTS if name in networks]


def check(results: Mapping[str, Any]) -> list[str]:
    """What does not hold; for the small networks only closeness is judged."""
    found = missed(time_bars(results))
    for name, network in results["networks"].items():
        files = network["files"]
        cosines = {kind: row["cosine_with_float"] for kind, row in files.items()}
        for ours in (kind for kind in OURS if kind in files):
            found += [
                f"{name}, {ours}: cosine {cosines[ours]:.4f} with the float network, "
                f"{peer} {cosines[peer]:.4f}"
                for peer in PEERS
                if peer in files and not cosines[ours] >= cosines[peer] - LOSS_BAR
            ]
        for kind in (*OURS, QAT):
            own = files.get(kind, {}).get("cosine_with_own_torch", 1.0)
            if not own >= OWN_BAR:
                found.append(f"{name}, {kind}: cosine {own:.4f} with torch, bar {OWN_BAR}")
    return found


def table(results: Mapping[str, Any]) -> str:
    """The files of all networks as Markdown."""
    lines = [
        "| network | file | ms (quartiles) | ours ÷ this | MB | cosine with the float network | "
        "argmax agreement | cosine with its own network in torch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, network in results["networks"].items():
        trained = ", trained" if network["weights"] == TRAINED else ""
        ours = reference(network)
        right = {*right_ours(network), *right_peers(network, ours)}
        for kind, label in LABELS.items():
            row = network["files"].get(kind)
            if row is None:
                continue
            wrong = kind in (*OURS, *PEERS) and kind not in right
            ratio = network["ratios"].get(f"{ours} / {kind}")
            own = row.get("cosine_with_own_torch")
            cells = [
                f"{name}{trained}, {network['pixels']} px",
                f"{label}: wrong here" if wrong else label,
                f"{row['median_ms']:.2f} ({row['p25_ms']:.2f}–{row['p75_ms']:.2f})",
                "" if ratio is None else str(Ratio.from_json(ratio)),
                f"{row['size_bytes'] / 1e6:.1f}",
                # What training did to the weights is no error of the file.
                "" if kind == QAT else f"{row['cosine_with_float']:.4f}",
                "" if kind == QAT else f"{100 * row['argmax_agreement']:.1f} %",
                "" if own is None else f"{own:.4f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def not_in(results: Mapping[str, Any]) -> list[str]:
    """What a file of an earlier run does not hold."""
    files = {kind for network in results["networks"].values() for kind in network["files"]}
    intervals = any(
        Ratio.from_json(ratio).rounds
        for network in results["networks"].values()
        for ratio in network["ratios"].values()
    )
    lacking = [f"`{kind}`" for kind in PEERS if kind not in files]
    return lacking + ([] if intervals else ["intervals of the ratios"])


def read_results() -> dict[str, Any]:
    """The committed results."""
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    return current(results)


def current(results: dict[str, Any]) -> dict[str, Any]:
    """Results as they are written now, of a file that may be from an earlier run."""
    if "trained" not in results:
        return results
    names = {"ptq": "ort-int8", "qat": QAT, "openvino": "nncf"}

    def converted(network: Mapping[str, Any], weights: str) -> dict[str, Any]:
        ratios = {}
        for pair, value in network["ratios"].items():
            ours, _, peer = pair.partition("_vs_")
            ratios[f"{names[ours]} / {names.get(peer, peer)}"] = value
        files = {names.get(kind, kind): row for kind, row in network["files"].items()}
        return {
            "pixels": network["pixels"],
            "weights": weights,
            "files": files,
            "ratios": ratios,
        }

    networks = {name: converted(one, RANDOM) for name, one in results["networks"].items()}
    networks |= {name: converted(one, TRAINED) for name, one in results["trained"].items()}
    kept = {name: results[name] for name in ("machine", "weights", "rounds")}
    return kept | {"networks": networks}


def _report(results: Mapping[str, Any]) -> list[str]:
    print(table(results))
    for bar in time_bars(results):
        print(bar)
    found = check(results)
    for line in found:
        print(line)
    print(f"missed={len(found)}")
    return found


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one timed network, fewer rounds, no training; not saved",
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar does not hold")
    parser.add_argument("--support", action="store_true", help="all networks on all runtimes")
    parser.add_argument("--output", type=Path, help="where to write the JSON of a run")
    arguments = parser.parse_args()
    if arguments.support:
        return runtime_support.main(arguments.output)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if arguments.quick:
        say_duration(QUICK_UNITS, one_export())
    results = measure_all(quick=arguments.quick)
    output = arguments.output
    if output is None and not arguments.quick:
        output = RESULTS
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    found = _report(results)
    return 1 if arguments.check and found else 0


if __name__ == "__main__":
    sys.exit(main())
