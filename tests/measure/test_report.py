import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_compress.measure.latency import LatencyResult
from lit_compress.measure.measures import ModelMeasures, measure_model
from lit_compress.measure.report import CompressionReport
from lit_compress.measure.table import TIMES, UNKNOWN

X = torch.zeros(1, 64)


def model(hidden: int = 64, zeros: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.view(-1)[: round(zeros * layer.weight.numel())] = 0
    return net


def times(median: float) -> list[LatencyResult]:
    return [LatencyResult(median, 0.1, median - 0.2, median + 0.2, 9, 1, 1, "cpu")]


def masked(**options) -> CompressionReport:
    return CompressionReport(
        measure_model(model(), X, name="dense", metrics={"top1": 0.885}, **options),
        measure_model(model(zeros=0.9), X, name="sparse", metrics={"top1": 0.874}, **options),
        notes=("Three seeds.",),
    )


def test_masks_alone_are_said_to_give_no_speed_up() -> None:
    (finding,) = masked().findings
    assert finding.startswith("Masks alone give no speed-up: 89.99 % of the weights are zero")
    assert "stored and multiplied like any other number" in finding
    assert "the same (4,736 before and after) and the dense runtimes gain nothing" in finding
    assert "deflate" in finding
    assert "zstd" in finding
    assert "speed needs a sparse runtime or channel pruning" in finding


def test_masks_are_seen_without_inputs_too() -> None:
    report = CompressionReport(measure_model(model()), measure_model(model(zeros=0.5)))
    (finding,) = report.findings
    assert "50.00 % of the weights" in finding
    assert "The MACs are the same and the dense" in finding


@pytest.mark.parametrize(
    "compressed",
    [
        lambda: measure_model(model(), X),  # nothing
        lambda: measure_model(model(hidden=32, zeros=0.9), X),  # channels were cut as well
        lambda: measure_model(model(hidden=128, zeros=0.9)),  # another architecture
        lambda: measure_model(model(zeros=0.9).half(), X.half()),  # stored differently as well
        lambda: dataclasses.replace(measure_model(model(zeros=0.9), X), macs=17),
        lambda: measure_model(model(zeros=1 / 4096), X),  # a zero by chance
    ],
)
def test_nothing_is_said_where_more_or_less_than_masks_changed(compressed) -> None:
    assert CompressionReport(measure_model(model(), X), compressed()).findings == ()


def test_overlapping_times_are_no_evidence() -> None:
    dense = measure_model(model(), latency=times(5.0))
    (finding,) = CompressionReport(dense, measure_model(model(), latency=times(4.7))).findings
    assert finding == (
        "No difference shown in latency, 1 thread, batch 1, cpu: the ranges of 10 to 90 % "
        "overlap (4.800 to 5.200 ms and 4.500 to 4.900 ms)."
    )
    assert CompressionReport(dense, measure_model(model(), latency=times(4.5))).findings == ()


def test_the_printed_table() -> None:
    lines = str(masked()).splitlines()
    cells = {line[:20].strip(): line[20:].split() for line in lines[2:]}
    assert lines[0].split() == ["dense", "sparse", "change"]
    assert cells["zeros in weights"] == ["0.00", "%", "89.99", "%"]
    assert cells["parameters"] == ["4,810", "4,810", f"{TIMES}1"]
    assert cells["non-zero parameters"] == ["4,810", "548", f"{TIMES}0.114"]
    assert cells["MACs"] == ["4,736", "4,736", f"{TIMES}1"]
    assert cells["latency"] == cells["peak memory"] == [UNKNOWN] * 3
    assert cells["top1"] == ["0.8850", "0.8740", "-0.0110"]
    assert lines[-1] == "* Three seeds."
    assert any(line.startswith("* Masks alone give no speed-up") for line in lines)
    assert max(len(line) for line in lines) <= 88


def test_kept_holds_what_is_known_of_both() -> None:
    kept = masked(latency=times(2.0)).kept()
    assert kept["parameters"] == kept["MACs"] == kept["size"] == 1.0
    assert kept["non-zero parameters"] == pytest.approx(548 / 4810)
    assert kept["latency, 1 thread, batch 1, cpu"] == 1.0
    assert "peak memory" not in kept


def test_markdown_has_both_tables_and_the_findings() -> None:
    text = masked().to_markdown()
    assert "|  | dense | sparse | change |\n|---|---:|---:|---:|\n" in text
    assert f"| parameters | 4,810 | 4,810 | {TIMES}1 |" in text
    assert "> Masks alone give no speed-up" in text
    assert "| 0 | Linear | 4,096 | 4,160 | 474 | 89.99 % |" in text
    assert text.endswith("|\n")


@pytest.mark.parametrize("options", [{}, {"latency": times(3.0)}, {"peak_memory": True}])
def test_json_round_trip_is_equal(options, tmp_path: Path) -> None:
    report = masked(**options)
    assert CompressionReport.from_json(report.to_json()) == report
    path = report.save(tmp_path / "new" / "report.json")
    assert CompressionReport.load(path) == report
    assert json.loads(path.read_text())["findings"] == list(report.findings)
    assert os.listdir(path.parent) == ["report.json"]


def test_a_truncated_file_is_refused_with_its_name(tmp_path: Path) -> None:
    path = masked().save(tmp_path / "report.json")
    path.write_text(path.read_text()[:-50])
    with pytest.raises(
        ValueError,
        match=r"report\.json' cannot be read as a compression report: .* no JSON .* cut off",
    ):
        CompressionReport.load(path)


@pytest.mark.parametrize("text", ["[]", "3", '{"format": "other"}', '{"dense": {}}'])
def test_foreign_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"has format .*; expected 'lit-compress report 1'"):
        CompressionReport.from_json(text)


def test_a_damaged_field_is_named() -> None:
    data = json.loads(masked().to_json())
    data["dense"]["layers"][1]["num_params"] = "many"
    with pytest.raises(
        ValueError, match=r"CompressionReport\.dense\.layers\[1\]\.num_params is 'many'"
    ):
        CompressionReport.from_json(json.dumps(data))
    del data["dense"]
    with pytest.raises(ValueError, match=r"CompressionReport lacks \['dense'\]"):
        CompressionReport.from_json(json.dumps(data))


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.md"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        masked().save_markdown(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.md"]


def test_measures_cannot_be_changed() -> None:
    report = masked()
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.dense = report.compressed  # type: ignore[misc]
    assert isinstance(report.dense, ModelMeasures)
