"""Which network runs where: each of six networks on each of four runtimes, float and int8.

Every case is a process of its own, so that a crash is a row of the table and not its end.

    python benchmarks/runtime_latency.py --support
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from machine import machine
from runtime_networks import NETWORKS, NOTE, batches, build
from runtime_timing import time_in_turns
from torch import Tensor, nn

from lit_compress.compress.quantization.network import calibrate, prepare
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.deploy import (
    LoadedFile,
    ParityTolerance,
    Target,
    export,
    export_fastest,
    load_file,
)

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "runtime_support.json"
# What a runtime's files of float and of quantized networks are called.
RUNTIMES: dict[str, tuple[Target, Target]] = {
    "onnxruntime": ("onnx", "ort-int8"),
    "openvino": ("openvino", "openvino"),
    "executorch": ("executorch", "executorch"),
    "litert": ("litert", "litert"),
    "inductor": ("inductor", "inductor"),
}
ROUNDS = 30
TIME_LIMIT = 1200
BAR = 1.02  # int8 may take this times as long as float, before --fastest is asked
# Random weights magnify single roundings: the row records how far a file is off, and refuses none
# that computes the network at all.
TOLERANCE = ParityTolerance(cosine=0.95, argmax_agreement=0.5, max_error=1.0)


def run_case(name: str, runtime: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Export one network to one runtime, float and quantized; what fails says so in its row."""
    network = NETWORKS[name]
    model = build(network)
    seen, unseen = batches(network, 1, seed=100), batches(network, 2, seed=1000)
    quantized = copy.deepcopy(model)
    prepare(quantized, QuantizationScheme(), lambda net: net(seen[0]))
    calibrate(quantized, lambda net, batch: net(batch), seen)
    float_target, integer_target = RUNTIMES[runtime]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        loaded: dict[str, LoadedFile] = {}
        for kind, subject, target in (
            ("float", model, float_target),
            ("int8", quantized, integer_target),
        ):
            try:
                done = export(
                    subject,
                    target,
                    Path(folder, kind),
                    unseen[0][:1],
                    check_inputs=unseen,
                    tolerance=TOLERANCE,
                )
                loaded[kind] = load_file(done.path)
            except Exception as error:  # whatever a runtime raises is what the row tells
                rows[kind] = {"error": first_line(error)}
                continue
            rows[kind] = {
                "cosine": round(done.parity.cosine, 6),
                "argmax_agreement": done.parity.argmax_agreement,
                "max_relative_error": round(done.parity.max_relative_error, 6),
                "size_bytes": done.size_bytes,
            }
        image = unseen[0][:1].clone()
        calls = {kind: _bound(file, image) for kind, file in loaded.items()}
        for kind, times in time_in_turns(calls, rounds).items():
            rows[kind] |= times.summary()
        for file in loaded.values():
            file.close()
        if is_slower(rows):
            rows["fastest"] = _fastest(quantized, integer_target, Path(folder), unseen, rounds)
    return rows


def is_slower(rows: Mapping[str, Any]) -> bool:
    """Whether both files run and the one of integers is slower than the bar allows."""
    times = [rows[kind].get("median_ms") for kind in ("float", "int8")]
    return None not in times and times[1] > BAR * times[0]


def _fastest(
    quantized: nn.Module, target: Target, folder: Path, unseen: list[Tensor], rounds: int
) -> dict[str, Any]:
    """What ``export --fastest`` keeps; its default tolerance refuses integers of random weights."""
    try:
        done = export_fastest(
            quantized, target, folder / "fastest", unseen[0][:1],
            check_inputs=unseen, tolerance=TOLERANCE, rounds=rounds,
        )  # fmt: skip
    except Exception as error:  # as above
        return {"error": first_line(error)}
    return {
        "form": done.form,
        "median_ms": {form: round(time, 4) for form, time in done.median_ms.items()},
        "refused": sorted(done.refused),
    }


def first_line(error: Exception) -> str:
    """Kind and first line of an error, at most 300 characters."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def _bound(file: LoadedFile, image: Tensor) -> Callable[[], object]:
    return lambda: file((image,))


def run_apart(name: str, runtime: str) -> dict[str, Any]:
    """:func:`run_case` in a process of its own."""
    command = [sys.executable, __file__, "--case", name, runtime]
    # Inductor compiles with all cores otherwise, and times are of one thread.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIME_LIMIT, env=environment
        )
    except subprocess.TimeoutExpired:
        return _both(f"took more than {TIME_LIMIT} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        rows: dict[str, Any] = json.loads(lines[-1])
        return rows
    said = done.stderr.strip().splitlines()
    last = said[-1] if said else "nothing was said"
    return _both(f"the process ended with {done.returncode}: {last}"[:300])


def _both(error: str) -> dict[str, Any]:
    return {kind: {"error": error} for kind in ("float", "int8")}


def table(results: Mapping[str, Any]) -> str:
    """All cases as Markdown; a case that fails tells its error."""
    lines = [
        "| network | runtime | fp32 ms | int8 ms | speed-up | fp32 MB | int8 MB | cosine, fp32 | "
        "cosine, int8 | argmax agreement, int8 | `--fastest` keeps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    failures = []
    for case, rows in results["cases"].items():
        name, _, runtime = case.partition(" ")
        single, integer = rows["float"], rows["int8"]
        failures += [
            f"- {name}, {runtime}, {label}: {row['error']}"
            for label, row in (("fp32", single), ("int8", integer))
            if "error" in row
        ]
        both = "error" not in single and "error" not in integer
        faster = single["median_ms"] / integer["median_ms"] if both else None
        agreement = integer.get("argmax_agreement")
        cells = [
            f"{name}, {NETWORKS[name].pixels} px",
            runtime,
            _shown(single, "median_ms", "{:.2f}"),
            _shown(integer, "median_ms", "{:.2f}"),
            "" if faster is None else f"{faster:.2f}",
            _shown(single, "size_bytes", "{:.2f}", 1e-6),
            _shown(integer, "size_bytes", "{:.2f}", 1e-6),
            _shown(single, "cosine", "{:.5f}"),
            _shown(integer, "cosine", "{:.5f}"),
            "" if agreement is None else f"{100 * agreement:.0f} %",
            _kept(rows),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(["", *failures] if failures else [])])


def _kept(rows: Mapping[str, Any]) -> str:
    """The form that is kept where integers are slower, and its speed-up over float."""
    kept = rows.get("fastest")
    if kept is None:
        return "" if is_slower(rows) or "error" in rows["int8"] else "integers"
    if "error" in kept:
        return "fails"
    times = kept["median_ms"]
    faster = f", {times['float'] / times[kept['form']]:.2f}" if "float" in times else ""
    return f"{kept['form']}{faster}"


def _shown(row: Mapping[str, Any], key: str, form: str, factor: float = 1.0) -> str:
    return "fails" if "error" in row else form.format(row[key] * factor)


def read_results() -> dict[str, Any]:
    """The committed results."""
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    return results


def main(output: Path | None = None) -> int:
    """Run all cases that the file does not hold yet; write after each."""
    output = output or RESULTS
    results: dict[str, Any] = {"machine": machine(), "weights": NOTE, "rounds": ROUNDS}
    before = json.loads(output.read_text()) if output.exists() else {}
    same = all(_lasting(before.get(key)) == _lasting(value) for key, value in results.items())
    results["cases"] = before.get("cases", {}) if same else {}
    for name in NETWORKS:
        for runtime in RUNTIMES:
            case = f"{name} {runtime}"
            if case not in results["cases"]:
                results["cases"][case] = run_apart(name, runtime)
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(results, indent=1) + "\n")
                print(case, json.dumps(results["cases"][case]), flush=True)
    print(table(results))
    failed = sum("error" in row for rows in results["cases"].values() for row in rows.values())
    print(f"cases={len(results['cases'])} failed={failed}")
    return 0


def _lasting(found: Any) -> Any:
    """What stays the same from run to run on one machine: all but its load."""
    if not isinstance(found, Mapping):
        return found
    return {name: value for name, value in found.items() if name != "load_average"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", nargs=2, metavar=("NETWORK", "RUNTIME"), required=True)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(json.dumps(run_case(*parser.parse_args().case)))
