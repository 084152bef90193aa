from pathlib import Path

import pytest
from lightning.pytorch import LightningModule

from lit_compress.cli import main
from lit_compress.cli.errors import as_complaint, explain, nearest
from tests.processes import run_script

PARTS = ["--model=ImageClassifier", "--data=DigitsDataModule"]


class Failing(LightningModule):
    """A user's module with a bug."""

    def __init__(self) -> None:
        super().__init__()
        raise ValueError("a bug of the user's own")


def refused(capsys, *arguments):
    """The line that refuses the arguments, which is the first on stderr."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "Seed set" not in line]
    assert all("Traceback" not in line for line in lines)
    complaint = next(line for line in lines if "error: " in line)
    assert len([line for line in lines if "error: " in line]) == 1
    return complaint


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--sparsity.final_sparsty=0.9", "in 'sparsity': unknown key 'final_sparsty'; did you mean "
         "'final_sparsity'?"),
        ("--sparsity.schedule.knd=cubic", "unknown key 'schedule.knd'; did you mean "
         "'schedule.kind'?"),
        ("--distillation.temprature=2", "in 'distillation': unknown key 'temprature'; did you mean "
         "'temperature'?"),
        ("--sparsty.final_sparsity=0.9", "unknown key 'sparsty'; did you mean 'sparsity'?"),
        ("--trainer.max_epoch=3", "unknown key 'trainer.max_epoch'; did you mean "
         "'trainer.max_epochs'?"),
        ("--model.num_clases=3", "in 'model': unknown key 'num_clases'; did you mean "
         "'num_classes'?"),
        ("--data.batchsize=3", "in 'data': unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("--sparsity.final_sparsity=much", "'final_sparsity' is 'much'; expected float or dict"),
        ("--sparsity.allocation=globl", "'allocation' is 'globl'; expected one of 'uniform', "
         "'global', 'heuristic'."),
        ("--sparsity.initial_sparsity=0.1", "in 'sparsity': missing 'final_sparsity'"),
        ("--trainer.max_epochs=many", "'trainer.max_epochs' is 'many'; expected int or null."),
        ("--model.lr=fast", "in 'model': 'lr' is 'fast'; expected float."),
        ("--model=ImageClasifier", "'model': there is no class 'ImageClasifier'; did you mean "
         "'ImageClassifier'?"),
        ("--model=lit_compress.tasks.ImageClasifier", "did you mean 'ImageClassifier'?"),
        ("--model=no_such_package.Zyx", "there is no class 'no_such_package.Zyx'; give its full"),
        ("--model=lit_compress.tasks.DigitsDataModule", "expected a subclass of LightningModule"),
        ("--trainer.callbacks=ModelChekpoint", "'trainer.callbacks': there is no class "
         "'ModelChekpoint'; did you mean 'ModelCheckpoint'?"),
        ("--config=nowhere.yaml", "File does not exist"),
        ("--sparsity.final_sparsity=1.5", "final_sparsity is 1.5, expected a share of zeros"),
        ("--distillation.temperature=-1", "temperature"),
        ("--trainer.accelerator=gpuu", "gpuu"),
        ("--ckpt_path=nowhere.ckpt", "nowhere.ckpt"),
    ],
)  # fmt: skip
def test_wrong_argument_is_named_with_its_mend(capsys, argument, said):
    assert said in refused(capsys, "fit", *PARTS, argument, "--trainer.logger=false")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer: {max_epoch: 3}", "unknown key 'trainer.max_epoch'; did you mean"),
        ("sparsity: {final_sparsity: 0.5, schedule: {ennd: 1}}", "unknown key 'schedule.ennd'; did "
         "you mean 'schedule.end'?"),
        ("sparsty: {final_sparsity: 0.5}", "unknown key 'sparsty'; did you mean 'sparsity'?"),
        ("model: {class_path: ImageClassifier, init_args: {learning_rate: 1}}",
         "in 'model': unknown key 'learning_rate'"),
        ("trainer: {max_epochs: many}", "'trainer.max_epochs' is 'many'; expected int or null."),
        ("trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {dirpth: x}}]}",
         "in 'trainer.callbacks': unknown key 'dirpth'; did you mean 'dirpath'?"),
        ("trainer: [", "Problems parsing config"),
        ("sparsity: {final_sparsity: [0.5]}", "'final_sparsity' is '[0.5]'; expected float"),
    ],
)  # fmt: skip
def test_wrong_yaml_is_named_with_its_mend(capsys, text, said):
    Path("wrong.yaml").write_text(text)
    assert said in refused(capsys, "fit", *PARTS, "--config=wrong.yaml")


def test_missing_model_and_unknown_command(capsys):
    assert "missing 'model'" in refused(capsys, "fit")
    assert "unknown command 'fitt'; did you mean 'fit'?" in refused(capsys, "fitt")
    assert "give one of fit, validate" in refused(capsys, "--config=x.yaml")


def test_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug of the user's own"):
        main(["fit", f"--model={__name__}.Failing", "--data=DigitsDataModule"])


def test_errors_of_other_packages_are_no_complaints():
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("x")
    assert as_complaint(caught.value) is None
    assert as_complaint(FileNotFoundError("no\n file")) == "no file"


def test_help_is_short_and_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert len(overview.splitlines()) < 20
    for command in ("fit", "validate", "test", "predict", "report", "benchmark"):
        assert f"\n  {command} " in overview


@pytest.mark.parametrize("command", ["fit", "test", "report", "benchmark"])
def test_help_of_a_command_begins_with_what_it_is_for(capsys, command):
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: lit-compress {command} ")
    assert len(lines[0]) < 80
    assert any("--assets" in line for line in lines[:40])


def test_help_of_a_named_callback(capsys):
    assert main(["fit", "--sparsity.help"]) == 0
    assert "--sparsity.final_sparsity" in capsys.readouterr().out


def test_nearest_looks_at_the_level_that_is_wrong():
    known = ["trainer.max_epochs", "trainer.max_steps", "data", "sparsity"]
    assert nearest("trainer.max_epoch", known).endswith("did you mean 'trainer.max_epochs'?")
    assert nearest("trainr.max_epochs", known).endswith("did you mean 'trainer'?")
    assert nearest("zzz", known).endswith("the keys here are data, sparsity, trainer.")
    assert nearest("zzz", [f"key_{i}" for i in range(50)]).endswith("--help lists the valid ones.")


def test_unheard_of_message_is_passed_on_in_one_line():
    assert explain("something\n  quite new") == "something quite new"


def test_installed_command_exits_with_2(tmp_path):
    script = tmp_path / "command.py"
    script.write_text("import sys; from lit_compress.cli import main; sys.exit(main())")
    arguments = ["fit", "--model=ImageClassifier", "--sparsity.final_sparsty=1"]
    ((code, output),) = run_script(script, *arguments, environments=[{}], folder=tmp_path)
    assert code == 2
    assert "did you mean 'final_sparsity'?" in output.splitlines()[0]
