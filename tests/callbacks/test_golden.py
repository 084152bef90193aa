"""Files that commit d3625d0 wrote go on loading; see tests/golden/make.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_compress import (
    ChannelPlan,
    ChannelPruning,
    CompressionReport,
    CompressionSummary,
    MagnitudeSparsity,
    QuantizationAwareTraining,
    RatioSearch,
    SearchResult,
    load_compressed,
)
from lit_compress.cli import main
from tests.golden import runs

EXPECTED: dict[str, Any] = json.loads((runs.FOLDER / "expected.json").read_text())
CHECKPOINTS = [name for name in EXPECTED if name.endswith(".ckpt")]


@pytest.fixture(autouse=True)
def _copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files, where they may be written to."""
    shutil.copytree(runs.FOLDER, tmp_path / "golden", ignore=shutil.ignore_patterns("*.py"))
    monkeypatch.chdir(tmp_path / "golden")


def same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_loads(name: str) -> None:
    expected, tolerance = EXPECTED[name], 5e-3 if "float16" in name else 1e-5
    modules = [load_compressed(name, runs.GoldenNet()), around := runs.GoldenNet()]
    load_compressed(name, around.model)
    if "packed" not in name:  # those do not say how to build a module
        modules.append(load_compressed(name, runs.GoldenNet))
    for module in modules:
        assert runs.digest(module) == expected["digest"]
        same(runs.outputs(module), expected["outputs"], tolerance)


@pytest.mark.filterwarnings("error:.*other arguments")
@pytest.mark.parametrize("name", list(runs.RUNS))
def test_a_run_goes_on_to_its_end(name: str) -> None:
    callbacks = runs.RUNS[name]()
    module = runs.fit(callbacks, f"{name}.ckpt", runs.LONGER)
    expected = EXPECTED[f"{name}.ckpt"]["end"]
    assert runs.kept(module) == expected["kept"]
    same(runs.outputs(module), expected["outputs"])
    for one in callbacks:
        if isinstance(one, RatioSearch):  # it has not searched again
            assert one.result == SearchResult.load(runs.FOLDER / one.space / "search.json")
        if isinstance(one, CompressionSummary):  # it knows what was dense
            assert one.report is not None
            earlier = CompressionReport.load(f"{name}_compression_report.json")
            assert one.report.dense == earlier.dense


@pytest.mark.parametrize("name", list(runs.METHODS))
def test_what_was_quantized_after_training_is_validated(name: str) -> None:
    trainer = runs.trainer([runs.after(**runs.METHODS[name])])
    (logged,) = trainer.validate(
        runs.GoldenNet(), ckpt_path=f"{name}.ckpt", weights_only=True, verbose=False
    )
    assert logged == pytest.approx(EXPECTED[f"{name}.ckpt"]["validated"], abs=1e-3)


def test_a_search_goes_on() -> None:
    search = runs.search("channels", 6, target_macs_ratio=0.5)
    runs.fit([search], max_epochs=0)
    assert runs.episodes(search) == EXPECTED["channels/state.pt"]


def test_an_analysis_goes_on() -> None:
    done, plan = Path("sensitivity/sensitivity.json"), ChannelPlan.load("sensitivity/plan.json")
    text = done.read_text()
    assert main(runs.analysis()) == 0  # refuses a file of another analysis
    assert ChannelPlan.load("sensitivity/plan.json") == plan
    assert done.read_text() == text


def holds(new: Any, old: Any) -> bool:
    """Whether JSON has all that an older one has."""
    if isinstance(old, dict):
        return all(key in new and holds(new[key], value) for key, value in old.items())
    return bool(new == old)


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        (SearchResult, ["channels/search.json", "sparsity/search.json", "bits/search.json"]),
        (ChannelPlan, ["channels/plan.json", "sensitivity/plan.json"]),
        (
            CompressionReport,
            [f"{n}_compression_report.json" for n in ("prune_quantize", "sparsify_cluster")],
        ),
    ],
)
def test_results_are_read(kind: Any, files: list[str]) -> None:
    for file in files:
        saved = json.loads(Path(file).read_text())
        for name in getattr(kind, "json_computed", ()):  # words, of which the version is free
            saved.pop(name)
        assert holds(json.loads(kind.load(file).to_json()), saved)


def test_solutions_of_searches_are_taken() -> None:
    kept = runs.kept(runs.fit([ChannelPruning(plan="channels/plan.json")], max_epochs=1))
    plan = ChannelPlan.load("channels/plan.json")
    assert [kept["model.0.weight"][0], kept["model.3.weight"][0]] == list(plan.kept.values())
    sparsities = json.loads(Path("sparsity/sparsities.json").read_text())
    kept = runs.kept(runs.fit([MagnitudeSparsity(sparsities)], max_epochs=1))
    assert sum(zeros for *_, zeros, _ in kept.values()) == 132
    bits = json.loads(Path("bits/layer_bits.json").read_text())
    runs.fit([QuantizationAwareTraining(layer_bits=bits)], max_epochs=1)
