import os
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from lit_compress import ChannelPruning, CompressionSummary, Distillation, MagnitudeSparsity
from lit_compress.cli import main
from lit_compress.cli.training import CompressionCLI


class Noted(Callback):
    """A user's callback that notes its Trainer's callbacks, and the folder of assets."""

    callbacks: list[Callback] = []
    assets: str | None = None

    def on_fit_start(self, trainer, pl_module):
        Noted.callbacks = list(trainer.callbacks)
        Noted.assets = os.environ.get("LIT_COMPRESS_ASSETS")


@pytest.fixture
def config_of(task, capsys):
    """The configuration that arguments of ``fit`` lead to."""

    def parsed(*arguments):
        assert main(["fit", *task, *arguments, "--print_config"]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    return parsed


@pytest.fixture
def write():
    """Write YAML files and give the arguments that name them."""

    def written(*texts):
        arguments = []
        for number, text in enumerate(texts):
            Path(f"{number}.yaml").write_text(text)
            arguments += ["--config", f"{number}.yaml"]
        return arguments

    return written


def test_named_callback_is_absent_unless_given(config_of):
    config = config_of()
    names = ("distillation", "pruning", "sparsity", "summary")
    assert [config[name] for name in names] == [None] * 4


def test_named_callback_from_the_command_line(config_of):
    config = config_of("--sparsity.final_sparsity=0.9", "--sparsity.schedule.kind=linear")
    assert config["sparsity"]["final_sparsity"] == 0.9
    assert config["sparsity"]["schedule"]["kind"] == "linear"
    assert config["sparsity"]["schedule"]["end"] == 0.5


def test_named_callback_from_yaml_with_a_single_key_changed(config_of, write):
    files = write("sparsity: {final_sparsity: 0.9, schedule: {end: 0.7}}")
    config = config_of(*files, "--sparsity.schedule.begin=0.2")
    assert config["sparsity"]["schedule"]["end"] == 0.7
    assert config["sparsity"]["schedule"]["begin"] == 0.2


def test_pruning_with_schedule_and_penalty(config_of, write):
    files = write("pruning: {target_macs_ratio: 0.5, schedule: {kind: linear, end: 0.5}}")
    arguments = ["--pruning.schedule.update_every=0.1", "--pruning.penalty.strength=0.01"]
    pruning = config_of(*files, *arguments)["pruning"]
    assert pruning["target_macs_ratio"] == 0.5
    assert pruning["schedule"]["kind"] == "linear"
    assert (pruning["schedule"]["end"], pruning["schedule"]["update_every"]) == (0.5, 0.1)
    assert pruning["penalty"] == {"strength": 0.01, "kind": "l2", "begin": 0}


def test_pruning_by_name_pattern_list_and_plan(config_of, write):
    by_name = config_of(*write("pruning: {pruning_ratio: {'0': 0.5, '*': 0.25}}"))["pruning"]
    assert by_name["pruning_ratio"] == {"0": 0.5, "*": 0.25}
    by_list = config_of("--pruning.pruning_ratio=[0.5,0.25]")["pruning"]
    assert by_list["pruning_ratio"] == [0.5, 0.25]
    assert config_of("--pruning.plan=plan.json")["pruning"]["plan"] == "plan.json"


def test_plan_that_is_not_there_is_refused_in_one_line(task, capsys):
    assert main(["fit", *task, "--pruning.plan=plan.json"]) == 2
    assert "plan is 'plan.json', and there is no such file" in capsys.readouterr().err


def test_pruned_run_writes_slim_checkpoints_and_resumes(task):
    pruning = ["--pruning.pruning_ratio=0.5", "--pruning.round_to=2"]
    assert main(["fit", *task, *pruning]) == 0
    (checkpoint,) = Path.cwd().rglob("*.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert weights["model.0.weight"].shape[0] == 2
    assert weights["model.3.weight"].shape[:2] == (4, 2)
    again = ["--trainer.max_epochs=2", f"--ckpt_path={checkpoint}"]
    assert main(["fit", *task, *pruning, *again]) == 0
    assert main(["validate", *task, *pruning, f"--ckpt_path={checkpoint}"]) == 0


def test_later_file_changes_single_keys(config_of, write):
    files = write(
        "sparsity: {final_sparsity: 0.9, schedule: {end: 0.7}}",
        "sparsity: {allocation: global, schedule: {kind: linear}}",
    )
    sparsity = config_of(*files)["sparsity"]
    assert (sparsity["final_sparsity"], sparsity["allocation"]) == (0.9, "global")
    assert (sparsity["schedule"]["end"], sparsity["schedule"]["kind"]) == (0.7, "linear")


def test_files_may_complete_each_other_in_either_order(config_of, write):
    files = write("sparsity: {allocation: global}", "sparsity: {final_sparsity: 0.9}")
    sparsity = config_of(*files)["sparsity"]
    assert (sparsity["final_sparsity"], sparsity["allocation"]) == (0.9, "global")


def test_null_takes_a_named_callback_out(config_of, write):
    assert (
        config_of(*write("sparsity: {final_sparsity: 0.9}"), "--sparsity=null")["sparsity"] is None
    )


def test_empty_mapping_takes_all_defaults(config_of, write):
    assert config_of(*write("summary: {}"))["summary"]["latency"] is True


def test_sparsity_by_layer_pattern(config_of, write):
    sparsity = config_of(*write("sparsity: {final_sparsity: {model.3: 0.5, model.6: 0.8}}"))
    assert sparsity["sparsity"]["final_sparsity"] == {"model.3": 0.5, "model.6": 0.8}


def test_unquoted_pattern_is_no_number_to_base_60(config_of, write):
    assert config_of(*write("sparsity: {final_sparsity: 0.5, pattern: 2:4}"))["sparsity"][
        "pattern"
    ] == ("2:4")
    arguments = ["--sparsity.final_sparsity=0.5", "--sparsity.pattern=2:4"]
    assert config_of(*arguments)["sparsity"]["pattern"] == "2:4"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1.0e-3", 0.001), ("0.05", 0.05), (".5", 0.5), ("3", 3.0), ("+1E2", 100.0)],
)
def test_numbers_in_yaml(config_of, write, text, value):
    files = write(f"model: {{class_path: ImageClassifier, init_args: {{lr: {text}}}}}")
    assert config_of(*files)["model"]["init_args"]["lr"] == value


def test_callbacks_stand_in_their_legal_order(task, tmp_path):
    arguments = [
        "--summary.latency=false",
        "--summary.plots=false",
        "--sparsity.final_sparsity=0.5",
        f"--trainer.callbacks={__name__}.Noted",
        "--distillation.temperature=2",
        "--pruning.pruning_ratio=0.5",
        "--pruning.round_to=2",
    ]
    Noted.callbacks = []
    cli = CompressionCLI(["fit", *task, *arguments])
    ours = (Distillation, ChannelPruning, MagnitudeSparsity, Noted, CompressionSummary)
    order = [type(callback) for callback in cli.trainer.callbacks if isinstance(callback, ours)]
    assert [cls.__name__ for cls in order] == [cls.__name__ for cls in ours]
    assert cli.trainer.callbacks[0].objective.temperature == 2


def test_callbacks_by_class_path_work_too(task, write):
    files = write(
        "trainer: {callbacks: [{class_path: lit_compress.MagnitudeSparsity, "
        "init_args: {final_sparsity: 0.75}}]}"
    )
    cli = CompressionCLI(["fit", *task, *files])
    (sparsity,) = [c for c in cli.trainer.callbacks if isinstance(c, MagnitudeSparsity)]
    assert sparsity.sparsity == pytest.approx(0.75, abs=1e-3)


def test_run_is_repeated_without_complaint(run_folder, task):
    config = run_folder / "config.yaml"
    again = ["fit", "--config", str(config), "--trainer.logger.init_args.version=0"]
    assert main([*again, "--trainer.logger.save_dir=."]) == 0
    assert main([*again, "--trainer.logger.save_dir=."]) == 0


def test_saved_configuration_holds_flat_keys(run_folder):
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert config["sparsity"]["final_sparsity"] == 0.5
    assert config["seed_everything"] == 0


def test_resumed_run_goes_on(run_folder, checkpoint):
    arguments = ["--trainer.max_epochs=2", "--trainer.logger.save_dir=."]
    config = ["--config", str(run_folder / "config.yaml")]
    assert main(["fit", *config, *arguments, f"--ckpt_path={checkpoint}"]) == 0
    (resumed,) = Path.cwd().rglob("*.ckpt")
    weights = torch.load(resumed, weights_only=True)
    assert weights["epoch"] == 1
    zeros = (weights["state_dict"]["model.3.weight"] == 0).float().mean().item()
    assert zeros == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_commands_run(run_folder, checkpoint, command):
    config = ["--config", str(run_folder / "config.yaml"), "--trainer.logger=false"]
    assert main([command, *_known_to(command, config), f"--ckpt_path={checkpoint}"]) == 0


def _known_to(command, config):
    """fit's own file, without the keys that only fit has."""
    saved = yaml.safe_load(Path(config[1]).read_text())
    for key in ("ckpt_path", "weights_only", "optimizer", "lr_scheduler"):
        saved.pop(key, None)
    Path(f"{command}.yaml").write_text(yaml.safe_dump(saved))
    return ["--config", f"{command}.yaml", *config[2:]]


def test_assets_hold_for_the_run_only(task, monkeypatch, tmp_path):
    monkeypatch.setenv("LIT_COMPRESS_ASSETS", "before")
    arguments = [f"--trainer.callbacks={__name__}.Noted", f"--assets={tmp_path}"]
    Noted.assets = None
    assert main(["fit", *task, *arguments]) == 0
    assert Noted.assets == str(tmp_path)
    assert os.environ["LIT_COMPRESS_ASSETS"] == "before"
