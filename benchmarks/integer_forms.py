"""Forms of int8 weights: which are right on this processor, and what each costs.

x86 without VNNI adds the products of two neighbouring weights in int16, which saturates. Each
network is quantized after training in three ways (scales that leave room for two products, which is
the default; the full range of 8 bits; 7 bits), written for ONNX Runtime and OpenVINO in each form
that there is, and compared with its own quantized network in torch and with the float one. The
files run in turns, one thread, one image at a time.

    python benchmarks/integer_forms.py [--check] [--output FILE]

Bars: every form that claims to be right on any processor has a cosine of .998 with its own network.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bars import Ratio
from machine import machine
from runtime_latency import OWN_BAR, Subject, small_subjects
from runtime_networks import NETWORKS, NOTE
from runtime_timing import time_in_turns
from torch import Tensor, nn

from lit_compress.compress.quantization.network import calibrate, prepare
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.deploy import LoadedFile, ParityTolerance, Target, export, load_file

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "integer_forms.json"
ROUNDS = 30
ANYTHING = ParityTolerance(cosine=0.0, argmax_agreement=0.0, max_error=1.0)
# By name: bits of the weights, whether scales leave room, whether the file assumes VNNI.
FORMS: dict[str, tuple[int, bool, bool]] = {
    "scales leave room for pairs (default)": (8, True, False),
    "full range, `--assume-vnni`": (8, False, True),
    "full range, written so that nothing saturates": (8, False, False),
    "7 bits": (7, False, False),
}
TARGETS: tuple[Target, ...] = ("ort-int8", "openvino")


def measure(subject: Subject, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """One row a form and runtime; the float file of the same runtime is what they are timed by."""
    x = torch.cat(subject.unseen)
    image = x[:1].clone()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        exact = subject.model(x)
        files: dict[str, LoadedFile] = {}
        for target in TARGETS:
            kind: Target = "onnx" if target == "ort-int8" else target
            path = Path(folder, f"float-{target}")
            done = export(subject.model, kind, path, image, tolerance=ANYTHING)
            files[f"float {target}"] = load_file(done.path)
        for form, (bits, leaves_room, assume_vnni) in FORMS.items():
            network = _quantized(subject, bits, leaves_room)
            own = network(x)
            for target in TARGETS:
                done = export(
                    network,
                    target,
                    Path(folder, f"{len(files)}"),
                    image,
                    check_inputs=[x],
                    tolerance=ANYTHING,
                    assume_vnni=assume_vnni,
                )
                files[f"{form} {target}"] = load_file(done.path)
                rows.append({
                    "form": form,
                    "target": target,
                    "right_anywhere": not done.needs_vnni,
                    "slow_layers": len(done.slow_layers),
                    "size_bytes": done.size_bytes,
                    "cosine_with_own_torch": round(done.parity.cosine, 6),
                    "max_relative_error": round(done.parity.max_relative_error, 5),
                    "cosine_with_float": round(_cosine(exact, own), 6),
                })  # fmt: skip
        times = time_in_turns({name: _bound(f, image) for name, f in files.items()}, rounds)
        for row in rows:
            mine, whole = (
                times[f"{name} {row['target']}"].processor for name in (row["form"], "float")
            )
            row |= times[f"{row['form']} {row['target']}"].summary()
            row["ratio_to_float"] = Ratio.of(mine, whole).as_json()
        for file in files.values():
            file.close()
    return rows


def _quantized(subject: Subject, bits: int, leaves_room: bool) -> nn.Module:
    network = copy.deepcopy(subject.model)
    scheme = QuantizationScheme(weight_bits=bits, avoid_saturation=leaves_room)
    prepare(network, scheme, lambda model: model(subject.seen[0]))
    calibrate(network, lambda model, batch: model(batch), subject.seen)
    return network


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def _bound(file: LoadedFile, image: Tensor) -> Callable[[], object]:
    return lambda: file((image,))


def check(results: dict[str, Any]) -> list[str]:
    """What does not hold."""
    return [
        f"{name}, {row['target']}, {row['form']}: cosine {row['cosine_with_own_torch']} with its "
        f"own network, bar {OWN_BAR}"
        for name, network in results["networks"].items()
        for row in network["rows"]
        if row["right_anywhere"] and row["cosine_with_own_torch"] < OWN_BAR
    ]


def table(results: dict[str, Any]) -> str:
    """All rows as Markdown."""
    lines = [
        "| network | weights | runtime | cosine with its own network | largest error | cosine with "
        "the float network | ms | of the float file's time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, network in results["networks"].items():
        lines += [
            f"| {name}, {network['weights']}, {network['pixels']} px | {row['form']} "
            f"| {row['target']} | {row['cosine_with_own_torch']:.5f} "
            f"| {100 * row['max_relative_error']:.2f} % | {row['cosine_with_float']:.4f} "
            f"| {row['median_ms']:.2f} | {Ratio.from_json(row['ratio_to_float'])} |"
            for row in network["rows"]
        ]
    return "\n".join(lines)


def section() -> str:
    """The part of the results page."""
    results = read_results()
    found = results["machine"]
    vnni = "with VNNI" if found["vnni"] else "without VNNI"
    return f"""## Forms of int8 weights

Without VNNI, x86 adds two products at a time in 16 bits. Scales that leave room for two neighbours
are as fast as the full range, right on every processor, and closer to the float network than 7
bits. Quantized after training, nothing else; those that are not trained have
{NOTE}. Measured on {found["processor"]}, {vnni}, one thread, {results["rounds"]} rounds in turns.

{table(results)}

JSON: [`results/integer_forms.json`](results/integer_forms.json); made by
`python benchmarks/integer_forms.py`."""


def read_results() -> dict[str, Any]:
    """The committed results."""
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    return results


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar does not hold")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write the JSON")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    subjects = {
        name: ("random", Subject.of(NETWORKS[name])) for name in ("resnet18", "mobilenet_v2")
    }
    subjects |= small_subjects(quick=False)
    results: dict[str, Any] = {"machine": machine(), "rounds": ROUNDS, "networks": {}}
    for name, (weights, subject) in subjects.items():
        results["networks"][name] = {
            "weights": weights,
            "pixels": subject.pixels,
            "rows": measure(subject),
        }
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    missed = check(results)
    print("\n".join(missed))
    print(f"missed={len(missed)}")
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
