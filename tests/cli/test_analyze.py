"""``lit-compress analyze``: curves, plan and picture of a run's checkpoint."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_compress.callbacks.lightning.resident_validation import ResidentValidation
from lit_compress.cli import analyze, main
from lit_compress.compress.channels.cut import cut_channels
from lit_compress.compress.channels.plan import ChannelPlan
from lit_compress.compress.channels.tracing import find_channel_groups
from lit_compress.compress.structure import describe, difference
from lit_compress.compress.structure_record import STRUCTURE_KEY, StructureRecord
from lit_compress.search.sensitivity_result import SensitivityResult
from lit_compress.tasks import ImageClassifier


class Regression(LightningModule):
    """Data, layers and an error of its own."""

    def __init__(self, examples: int = 32, channels: int = 6, changes_batches: bool = False):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.first = nn.Linear(8, channels)
        self.second = nn.Linear(channels, 1)

    def forward(self, x):
        return self.second(self.first(x))

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_error", nn.functional.l1_loss(self(x), y))
        self.log("val_scale", y.abs().mean())
        if self.hparams["changes_batches"]:
            y.add_(1.0)

    def training_step(self, batch, batch_idx):
        return nn.functional.l1_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        torch.manual_seed(1)
        x = torch.randn(self.hparams["examples"], 8)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)

    val_dataloader = train_dataloader


class Silent(Regression):
    """Logs nothing."""

    def validation_step(self, batch, batch_idx):
        self(batch[0])


class Uncuttable(Regression):
    """One layer, whose channels are the model's output."""

    def forward(self, x):
        return self.first(x)


def config(name, **arguments):
    """A configuration of one of the modules above."""
    model = {"class_path": f"{__name__}.{name}", "init_args": arguments}
    Path("config.yaml").write_text(json.dumps({"model": model}))
    return "--config=config.yaml"


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["analyze", *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


@pytest.fixture
def evaluations(monkeypatch):
    """The networks that were evaluated; at the number in ``kill`` the process is interrupted."""
    seen = []
    validate = ResidentValidation.__call__

    def counted(self, network):
        if len(seen) == kill[0]:
            raise KeyboardInterrupt
        seen.append(network)
        return validate(self, network)

    kill = [-1]
    monkeypatch.setattr(ResidentValidation, "__call__", counted)
    return seen, kill


def test_analysis_of_a_run(capsys, checkpoint, run_folder):
    assert main(["analyze", str(checkpoint), "--steps=3", "--tolerance=0.05"]) == 0
    printed = capsys.readouterr().out
    result = SensitivityResult.load("sensitivity/sensitivity.json")
    # All groups of the digits' CNN, at 30, 60 and 90 %.
    assert [g.name for g in result.groups] == ["0", "3", "6"]
    assert result.ratios == pytest.approx((0.3, 0.6, 0.9))
    assert set(result.metrics) == {"val_loss", "val_top1", "val_top5"}
    report = json.loads((run_folder / "compression_report.json").read_text())
    logged = report["compressed"]["metrics"]["val_top1"]
    assert result.baseline.metrics["val_top1"] == pytest.approx(logged)
    plan = ChannelPlan.load("sensitivity/plan.json")
    assert plan == result.derive_plan(0.05, "val_top1")
    assert result.table("val_top1") in printed
    assert str(plan) in printed
    assert Path("sensitivity/sensitivity.png").read_bytes()[:4] == b"\x89PNG"


def test_an_interrupted_analysis_goes_on(checkpoint, evaluations):
    seen, kill = evaluations
    arguments = ["analyze", str(checkpoint), "--steps=2", "--tuning-steps=3"]
    assert main([*arguments, "--output=whole"]) == 0
    everything = len(seen)
    assert everything == 2 * (1 + 3 * 2)  # before and after tuning; baseline, groups x steps
    seen.clear()
    kill[0] = 7
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--output=parts"])
    assert len(SensitivityResult.load("parts/sensitivity.json").points) == 2
    kill[0] = -1
    seen.clear()
    assert main([*arguments, "--output=parts"]) == 0
    assert len(seen) == everything - 6
    whole, parts = (Path(f, "sensitivity.json").read_text() for f in ("whole", "parts"))
    assert whole == parts
    seen.clear()
    assert main([*arguments, "--output=parts"]) == 0
    assert seen == []


def test_tuning_trains_slim_copies(capsys, checkpoint):
    arguments = ["--steps=1", "--max-ratio=0.5", "--tuning-steps=20"]
    assert main(["analyze", str(checkpoint), *arguments]) == 0
    result = SensitivityResult.load("sensitivity/sensitivity.json")
    for point in (result.baseline, *result.points):
        assert point.tuned_metrics["val_loss"] < point.metrics["val_loss"]
    assert "val_top1 after tuning" in capsys.readouterr().out


def tuned_at(monkeypatch, lr):
    """Arguments of an analysis that tunes at a learning rate."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=lr)

    monkeypatch.setattr(Regression, "configure_optimizers", configure_optimizers)
    arguments = ["--metric=val_error", "--tuning-steps=30", "--input-shape=8", "--steps=2"]
    return [config("Regression"), *arguments]


def test_a_tuning_that_does_harm_is_said_and_gives_no_cut(capsys, monkeypatch):
    assert main(["analyze", *tuned_at(monkeypatch, lr=1.0)]) == 0
    assert "the tuning alone takes 'val_error' of the whole model from" in capsys.readouterr().err
    assert ChannelPlan.load("sensitivity/plan.json").kept == {"first": 6}


def test_a_tuning_that_ends_in_nan_is_refused_at_once(capsys, monkeypatch, evaluations):
    assert "not a number after tuning" in refused(capsys, *tuned_at(monkeypatch, lr=30.0))
    assert len(evaluations[0]) == 2  # the baseline alone
    assert not Path("sensitivity").exists()


def test_a_module_with_data_of_its_own_and_no_checkpoint(capsys):
    arguments = [config("Regression"), "--input-shape=8", "--metric=val_error", "--round-to=1"]
    assert main(["analyze", *arguments, "--tolerance=100", "--steps=2"]) == 0
    # Less of an error is better, and a tolerance of 100 allows everything.
    assert ChannelPlan.load("sensitivity/plan.json").kept == {"first": 1}
    assert "warning" not in capsys.readouterr().err


def test_validation_that_gives_other_numbers_a_second_time_is_said(capsys):
    arguments = [
        config("Regression", changes_batches=True),
        "--metric=val_error",
        "--input-shape=8",
    ]
    assert main(["analyze", *arguments]) == 0
    said = capsys.readouterr().err
    assert "'val_error' is" in said
    assert "change its batches in place" in said


def test_a_slim_checkpoint_is_analyzed_as_it_is(run_folder):
    module = ImageClassifier("digits_cnn", model_args={"width": 4})
    before = describe(module)
    groups = find_channel_groups(module.model, lambda m: m(torch.zeros(2, 1, 8, 8)))
    keep = torch.ones(groups.num_channels, dtype=torch.bool)
    keep[0] = False
    cut_channels(module.model, groups, keep)
    record = StructureRecord((difference(before, describe(module)),))
    content = {"state_dict": module.state_dict()}
    content[STRUCTURE_KEY] = record.to_plain()
    torch.save(content, "slim.ckpt")
    shutil.copy(run_folder / "config.yaml", "config.yaml")
    assert main(["analyze", "slim.ckpt", "--steps=1"]) == 0
    sizes = [g.num_channels for g in SensitivityResult.load("sensitivity/sensitivity.json").groups]
    assert sizes == [g.num_channels - (i == 0) for i, g in enumerate(groups.groups)]


def test_layers_can_be_left_whole(checkpoint):
    assert main(["analyze", str(checkpoint), "--steps=1", "--ignored-layers=0, 0"]) == 0
    names = [g.name for g in SensitivityResult.load("sensitivity/sensitivity.json").groups]
    assert names == ["3", "6"]


def test_results_are_written_without_matplotlib(capsys, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["analyze", str(checkpoint), "--steps=1"]) == 0
    assert "warning: Plots need the package matplotlib" in capsys.readouterr().err
    assert Path("sensitivity/plan.json").exists()


def test_wandb_gets_table_plot_and_files(checkpoint, monkeypatch):
    pytest.importorskip("wandb")
    sent = {}
    for name in ("log_table", "log_images", "log_artifact"):
        monkeypatch.setattr(
            analyze.tracking, name, lambda trainer, *rest, name=name: sent.update({name: rest})
        )
    finished = []
    monkeypatch.setattr(
        analyze.WandbLogger,
        "experiment",
        property(lambda self: type("Run", (), {"finish": lambda _: finished.append(1)})()),
    )
    assert main(["analyze", str(checkpoint), "--steps=2", "--wandb=project"]) == 0
    key, header, rows = sent["log_table"]
    assert (key, header) == ("sensitivity/curves", ["group", "channels", "-45%", "-90%"])
    assert [row[0] for row in rows] == ["0", "3", "6"]
    assert [path.name for path in sent["log_images"][1]] == ["sensitivity.png"]
    assert {path.name for path in sent["log_artifact"][2]} == {
        "sensitivity.json", "plan.json", "sensitivity.png",
    }  # fmt: skip
    assert finished == [1]


def test_analyses_of_something_else_are_not_continued(capsys, checkpoint, run_folder):
    base = [checkpoint, "--steps=1"]
    assert main(["analyze", *map(str, base)]) == 0
    file = Path("sensitivity/sensitivity.json")
    before = file.read_text()
    assert "'importance' was 'l2' and is 'l1'" in refused(capsys, *base, "--importance=l1")
    assert "'tuning_steps' was '0' and is '2'" in refused(capsys, *base, "--tuning-steps=2")
    other = torch.load(checkpoint, weights_only=True)
    other["state_dict"]["model.0.weight"] += 1.0
    torch.save(other, "other.ckpt")
    shutil.copy(run_folder / "config.yaml", "config.yaml")
    said = refused(capsys, "other.ckpt", "--steps=1")
    assert "'weights' was" in said
    assert "Give another folder as --output" in said
    data = json.loads(before)
    data["baseline"]["metrics"]["val_top1"] = 0.999
    file.write_text(json.dumps(data))
    assert "an analysis on other data: 'val_top1' of the whole" in refused(capsys, *base)
    file.write_text(before[:100])
    assert "is no JSON" in refused(capsys, *base)
    assert file.read_text() == before[:100]


@pytest.mark.parametrize("name", ["3", "model.3", "model.[3]"])
def test_layers_are_named_as_in_the_module_or_in_the_network(checkpoint, name):
    assert main(["analyze", str(checkpoint), "--steps=1", f"--ignored-layers={name}"]) == 0
    result = SensitivityResult.load("sensitivity/sensitivity.json")
    assert [group.name for group in result.groups] == ["0", "6"]


def test_what_cannot_be_analyzed_is_said(capsys, checkpoint):
    error = refused
    assert "nothing says which model to analyze" in error(capsys)
    assert "There is no file 'gone.ckpt'" in error(capsys, "gone.ckpt")
    assert "did you mean 'tolerance'?" in error(capsys, checkpoint, "--tolerence=1")
    for option, said in {
        "--steps=0": "--steps is 0; expected at least 1",
        "--max-ratio=1": "--max-ratio is 1.0; expected a number in (0, 1)",
        "--tuning-steps=-1": "--tuning-steps is -1",
        "--round-to=0": "--round-to is 0",
        "--tolerance=-1": "--tolerance is -1.0",
        "--input-shape=1,x": "--input-shape is '1,x'",
        "--limit-val-batches=0": "the validation data are empty",
        "--metric=val_top2": "'val_top2' is not logged by the validation; what is: 'val_loss'",
        "--ignored-layers=nowhere": "'nowhere', which matches none of the",
        "--ignored-layers=model.3x": "the nearest names are 'model.3'",
    }.items():
        assert said in error(capsys, checkpoint, option), option
    assert "--metric is needed" in error(capsys, config("Regression"), "--input-shape=8")
    assert "validation_step logs nothing" in error(capsys, config("Silent"), "--input-shape=8")
    assert "the validation data are empty" in error(
        capsys, config("Regression", examples=0), "--input-shape=8"
    )
    said = error(capsys, config("Uncuttable"), "--input-shape=8")
    assert "no channels that can be cut" in said
    assert not Path("sensitivity").exists()
