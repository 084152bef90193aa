import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lit_compress import CompressionReport
from lit_compress.cli import main


class Inline(LightningModule):
    """A module whose layers are its own, with an example of its input."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Linear(64, 8)
        self.second = nn.Linear(8, classes)
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, images):
        return self.second(self.first(images.flatten(1)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def alone(checkpoint):
    """The checkpoint without the configuration of its run."""
    return shutil.copy(checkpoint, "alone.ckpt")


@pytest.fixture
def bare(checkpoint):
    """Only the network's weights, as any other program would have saved them."""
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save({name.removeprefix("model."): w for name, w in weights.items()}, "bare.pt")
    return "bare.pt"


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_report_of_a_run(capsys, checkpoint):
    assert main(["report", str(checkpoint), "--json=out.json", "--markdown=deep/out.md"]) == 0
    printed = capsys.readouterr().out
    assert "MACs" in printed
    figures = json.loads(Path("out.json").read_text())
    layers = {layer["name"]: layer for layer in figures["layers"]}
    # 3x3 convolutions at 8 x 8 pixels, then half of that: each example costs pixels x weights.
    assert layers["0"]["macs"] == 8 * 8 * layers["0"]["num_weights"]
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]["model.3.weight"]
    assert layers["3"]["num_nonzero_weights"] == int((weights != 0).sum())
    assert layers["3"]["num_nonzero_weights"] == round(0.5 * weights.numel())
    assert "zeros in weights" in Path("deep/out.md").read_text()


def test_report_of_bare_weights_counts_what_is_there(capsys, bare):
    assert main(["report", bare, "--json=out.json"]) == 0
    figures = json.loads(Path("out.json").read_text())
    assert figures["macs"] is None
    weights = torch.load(bare, weights_only=True)
    learnt = [w for n, w in weights.items() if w.is_floating_point() and "running" not in n]
    assert figures["num_params"] == sum(w.numel() for w in learnt)
    assert figures["num_nonzero_params"] == sum(int((w != 0).sum()) for w in learnt)
    assert figures["compressed_size_bytes"]["deflate"] < figures["size_bytes"]


def test_report_rebuilds_the_class_that_the_checkpoint_names(alone):
    assert main(["report", str(alone), "--json=out.json", "--input-shape=1,8,8"]) == 0
    assert json.loads(Path("out.json").read_text())["macs"] > 0


def test_report_of_a_module_with_layers_of_its_own(task):
    task = [word for word in task if not word.startswith("--model")]
    assert main(["fit", f"--model={__name__}.Inline", "--model.classes=12", *task]) == 0
    (path,) = Path.cwd().rglob("*.ckpt")
    shutil.copy(path, "alone.ckpt")
    assert main(["report", "alone.ckpt", "--json=out.json"]) == 0
    assert json.loads(Path("out.json").read_text())["macs"] == 64 * 8 + 8 * 12


def test_report_against_a_baseline(checkpoint, bare):
    weights = {n: torch.ones_like(w) for n, w in torch.load(bare, weights_only=True).items()}
    torch.save({"state_dict": weights}, "dense.pt")
    arguments = ["--baseline=dense.pt", "--json=out.json", "--markdown=out.md", "--plots=plots"]
    assert main(["report", str(checkpoint), *arguments]) == 0
    report = CompressionReport.load("out.json")
    assert report.dense.sparsity == 0
    assert report.compressed.sparsity == pytest.approx(0.5, abs=1e-2)
    assert report.dense.macs == report.compressed.macs > 0
    assert any("Masks alone give no speed-up" in finding for finding in report.findings)
    assert "Compression report" in Path("out.md").read_text()
    assert {path.name for path in Path("plots").iterdir()} == {"layers.png", "summary.png"}


def test_report_validates_both(checkpoint, bare, run_folder):
    arguments = [f"--baseline={bare}", "--validate", "--json=out.json"]
    assert main(["report", str(checkpoint), *arguments]) == 0
    report = CompressionReport.load("out.json")
    assert report.dense.metrics == report.compressed.metrics
    logged = CompressionReport.load(run_folder / "compression_report.json")
    measured = report.compressed.metrics["val_top1"]
    assert measured == pytest.approx(logged.compressed.metrics["val_top1"])


def test_benchmark_times_both_in_turns(capsys, checkpoint):
    arguments = ["--threads=1", "--batch-sizes=1,4", "--repeats=3", "--json=out.json"]
    assert main(["benchmark", str(checkpoint), *arguments]) == 0
    results = json.loads(Path("out.json").read_text())
    assert [result["a"]["batch_size"] for result in results] == [1, 4]
    assert all(result["b"]["median_ms"] > 0 and result["b"]["repeats"] == 3 for result in results)
    assert "8 pairs in 10" in capsys.readouterr().out


def test_benchmark_with_configuration_and_baseline(capsys, bare, run_folder):
    arguments = [f"--baseline={bare}", f"--config={run_folder / 'config.yaml'}", "--repeats=2"]
    assert main(["benchmark", bare, *arguments]) == 0
    header, _, row = capsys.readouterr().out.strip().splitlines()[-3:]
    assert header.split()[:4] == ["threads", "batch", "dense", "compressed"]
    assert row.split()[:2] == ["1", "1"]


@pytest.mark.parametrize("command", ["report", "benchmark"])
def test_damaged_checkpoint_is_refused_and_left_alone(capsys, checkpoint, command):
    content = checkpoint.read_bytes()
    for name, part in {"cut": content[: len(content) // 2], "text": b"hello", "none": b""}.items():
        Path(name).write_bytes(part)
        assert f"'{name}' cannot be read as a checkpoint" in refused(capsys, command, name)
        assert Path(name).read_bytes() == part


def test_damaged_checkpoint_is_refused_by_fit(capsys, checkpoint, task):
    part = checkpoint.read_bytes()[:5000]
    Path("cut.ckpt").write_bytes(part)
    said = refused(capsys, "fit", *task, "--ckpt_path=cut.ckpt")
    assert "'cut.ckpt' cannot be read as a checkpoint" in said
    assert Path("cut.ckpt").read_bytes() == part


def test_pickled_objects_are_never_loaded(capsys):
    torch.save({"state_dict": torch.nn.Linear(2, 2)}, "module.pt")
    assert "never loaded" in refused(capsys, "report", "module.pt")


def test_foreign_files_are_refused(capsys):
    torch.save({"numbers": [1, 2]}, "numbers.pt")
    assert "holds no weights but the keys ['numbers']" in refused(capsys, "report", "numbers.pt")
    assert "There is no file 'gone.pt'" in refused(capsys, "report", "gone.pt")


def test_weights_of_another_model_are_refused(capsys, checkpoint, bare):
    weights = torch.load(bare, weights_only=True)
    torch.save({**weights, "0.weight": torch.zeros(1, 1, 3, 3)}, "shape.pt")
    torch.save({n: w for n, w in weights.items() if n != "0.weight"}, "missing.pt")
    torch.save({**weights, "extra.weight": torch.zeros(2)}, "extra.pt")
    for file, said in {
        "shape.pt": "'0.weight' has shape (1, 1, 3, 3), expected",
        "missing.pt": "'0.weight' is missing",
        "extra.pt": "'extra.weight' is unknown",
    }.items():
        assert said in refused(capsys, "report", checkpoint, f"--baseline={file}")


def test_what_cannot_be_had_is_said(capsys, checkpoint, alone, bare):
    assert "give the dense one too" in refused(capsys, "report", checkpoint, "--plots=x")
    assert "needs the model and its data" in refused(capsys, "report", alone, "--validate")
    assert "nothing says which model" in refused(capsys, "benchmark", bare)
    assert "nothing says what input" in refused(capsys, "benchmark", alone)
    assert "--threads is '0'" in refused(capsys, "benchmark", checkpoint, "--threads=0")
    assert "--batch-sizes is 'a,2'" in refused(capsys, "benchmark", checkpoint, "--batch-sizes=a,2")
    assert "did you mean 'baseline'?" in refused(capsys, "report", checkpoint, "--basline=x")
    assert "repeats" in refused(capsys, "benchmark", checkpoint, "--repeats=0")
