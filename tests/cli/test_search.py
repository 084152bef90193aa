"""``lit-compress search``: what a run's checkpoint may lose, at once and in stages."""

import json
import sys
from pathlib import Path

import pytest
import torch

from lit_compress import ChannelPlan, SearchResult, load_compressed
from lit_compress.callbacks.search import report as _search_report
from lit_compress.callbacks.search.report import SearchProgress
from lit_compress.cli import main, search
from lit_compress.tasks import ImageClassifier, build_model

CPU = [
    "--accelerator=cpu",
    "--num-calibration-batches=2",
    "--num-examples=100",
    "--precision=trainer",
]
HALF = [*CPU, "--target-macs-ratio=0.5", "--num-episodes=4"]


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["search", *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def found_in(folder):
    """What a folder holds, without the times that it took."""
    plain = json.loads(Path(folder, "search.json").read_text())
    return plain | {"episodes": [{**e, "seconds": None} for e in plain["episodes"]]}


def test_search_of_a_run(capsys, checkpoint):
    assert main(["search", str(checkpoint), *HALF]) == 0
    printed = capsys.readouterr().out
    result = SearchResult.load("ratio_search/search.json")
    assert [d.name for d in result.decisions] == ["0", "3", "6"]
    assert len(result.episodes) == 4
    assert (result.metric, result.mode) == ("val_top1", "max")
    assert result.best_episode.costs["macs"] <= 0.5 * result.dense_costs["macs"]
    assert ChannelPlan.load("ratio_search/plan.json") == result.plan
    assert Path("ratio_search/search.png").read_bytes()[:4] == b"\x89PNG"
    assert str(result) in printed
    assert (
        "Written: ratio_search/search.json, ratio_search/plan.json, ratio_search/search.png"
        in printed
    )
    # A fit of no epochs leaves nothing else behind.
    assert {path.name for path in Path().iterdir()} == {"ratio_search"}


def test_an_interrupted_search_goes_on(checkpoint, monkeypatch):
    assert main(["search", str(checkpoint), *HALF, "--output=whole"]) == 0
    shown = SearchProgress.__call__
    seen = []

    def killed(self, result):
        seen.append(len(result.episodes))
        if len(seen) == 2:
            raise RuntimeError("killed")
        shown(self, result)

    monkeypatch.setattr(SearchProgress, "__call__", killed)
    with pytest.raises(RuntimeError, match="killed"):
        main(["search", str(checkpoint), *HALF, "--output=parts"])
    assert not Path("parts/search.json").exists()
    assert main(["search", str(checkpoint), *HALF, "--output=parts"]) == 0
    assert seen == [1, 2, 3, 4]
    assert found_in("parts") == found_in("whole")


def test_stages_lead_to_the_target_and_are_not_tuned_twice(capsys, checkpoint, monkeypatch):
    arguments = ["search", str(checkpoint), *HALF, "--stages=0.7", "--tuning-steps=3"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "stage 1 of 2, target_macs_ratio 0.7" in printed
    assert "stage 2 of 2, target_macs_ratio 0.5" in printed
    first, second = (SearchResult.load(f"ratio_search/stage-{n}/search.json") for n in (1, 2))
    dense = first.dense_costs["macs"]
    assert 0.5 * dense < first.best_episode.costs["macs"] <= 0.7 * dense
    assert second.dense_costs["macs"] == first.best_episode.costs["macs"]
    assert second.best_episode.costs["macs"] <= 0.5 * dense
    # The plan is one for the model as it was, and the checkpoint is what it leaves.
    plan = ChannelPlan.load("ratio_search/stage-2/plan.json")
    assert plan.channels == first.plan.channels
    assert plan.kept == second.plan.kept
    checkpoint_of_stage = "ratio_search/stage-2/tuned.ckpt"
    slim = load_compressed(checkpoint_of_stage, ImageClassifier).model
    assert slim[0].out_channels == plan.kept["0"]

    before = found_in("ratio_search/stage-2")
    monkeypatch.setattr(search, "tune", None)  # would fail if it were called
    assert main(arguments) == 0
    assert found_in("ratio_search/stage-2") == before
    assert ChannelPlan.load("ratio_search/stage-2/plan.json") == plan


def test_stages_of_zeros(checkpoint):
    space = ["--space=sparsity", "--final-sparsity=0.8", "--num-episodes=3"]
    stages = ["--stages=0.6", "--tuning-steps=3"]
    assert main(["search", str(checkpoint), *CPU, *space, *stages]) == 0
    for stage, target in ((1, 0.6), (2, 0.8)):
        folder = Path(f"ratio_search/stage-{stage}")
        assert (folder / "sparsities.json").is_file()
        state = torch.load(folder / "tuned.ckpt", weights_only=True)["state_dict"]
        weights = [w for name, w in state.items() if name.endswith("weight") and w.dim() > 1]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        assert zeros == round(target * sum(weight.numel() for weight in weights))


def test_a_plan_feeds_the_run_of_another_seed(checkpoint, task):
    assert main(["search", str(checkpoint), *HALF]) == 0
    pruning = ["--pruning.plan=ratio_search/plan.json", "--seed_everything=5"]
    assert main(["fit", *task, *pruning]) == 0
    (written,) = Path("runs").rglob("*.ckpt")
    slim = load_compressed(written, ImageClassifier).model
    plan = ChannelPlan.load("ratio_search/plan.json")
    assert slim[0].out_channels == plan.kept["0"]
    assert slim[0].out_channels < build_model("digits_cnn", width=4)[0].out_channels or (
        plan.kept["3"] < plan.channels["3"] or plan.kept["6"] < plan.channels["6"]
    )


def test_other_names_of_the_command_line(capsys, task):
    named = ["--search.target_macs_ratio=0.5", "--search.agent.hidden_size=8"]
    named += ["--search.scoring.split=val", "--pruning.plan=searched"]
    assert main(["fit", *task, *named, "--print_config"]) == 0
    assert "hidden_size: 8" in capsys.readouterr().out
    assert main(["search", "--help"]) == 0
    listed = capsys.readouterr().out
    for option in ("--target_latency_ms", "--agent.hidden_size", "--split", "--round_to"):
        assert option in listed


def test_results_are_written_without_matplotlib(capsys, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["search", str(checkpoint), *HALF, "--searcher=rules", "--num-episodes=1"]) == 0
    assert "lit-compress search: warning: " in capsys.readouterr().err
    assert Path("ratio_search/plan.json").exists()


def test_wandb_gets_episodes_table_plot_and_files(checkpoint, monkeypatch):
    pytest.importorskip("wandb")
    sent, tables, rows, finished = {}, [], [], []
    monkeypatch.setattr(
        _search_report.tracking, "log_table", lambda trainer, key, *_: tables.append(key)
    )
    for name in ("log_images", "log_artifact"):
        monkeypatch.setattr(
            _search_report.tracking,
            name,
            lambda trainer, *rest, name=name: sent.update({name: rest}),
        )
    run = type("Run", (), {"finish": lambda _: finished.append(1)})()
    monkeypatch.setattr(search.WandbLogger, "experiment", property(lambda self: run))
    monkeypatch.setattr(
        search.WandbLogger, "log_metrics", lambda self, metrics, step=None: rows.append(metrics)
    )
    monkeypatch.setattr(search.WandbLogger, "log_hyperparams", lambda *_, **__: None)
    assert main(["search", str(checkpoint), *HALF, "--num-episodes=2", "--wandb=project"]) == 0
    assert [row["search/episode"] for row in rows] == [0, 1]
    assert tables == ["search/layers", "search/episodes"]
    assert {path.name for path in sent["log_artifact"][2]} == {"search.json", "plan.json"}
    assert finished == [1]


@pytest.mark.parametrize("name", ["3", "model.3", "model.[3]"])
def test_layers_are_named_as_in_the_module_or_in_the_network(checkpoint, name):
    arguments = [*CPU, "--target-macs-ratio=0.7", "--num-episodes=1", f"--ignored-layers={name}"]
    assert main(["search", str(checkpoint), *arguments]) == 0
    result = SearchResult.load("ratio_search/search.json")
    assert [decision.name for decision in result.decisions] == ["0", "6"]


def test_what_cannot_be_searched_is_said(capsys, checkpoint):
    assert "nothing says which model to search" in refused(capsys, *HALF)
    assert "There is no file 'gone.ckpt'" in refused(capsys, "gone.ckpt", *HALF)
    for options, said in {
        "": "needs a target",
        "--target-macs-ratio=1.5": "target_macs_ratio is 1.5, expected a number in (0, 1)",
        "--target-macs-ratio=0.5 --final-sparsity=0.9": "a search has one budget",
        "--target-macs-ratio=0.5 --num-episodes=0": "num_episodes is 0",
        "--target-macs-ratio=0.5 --num-examples=0": "num_examples is 0",
        "--target-macs-ratio=0.5 --agent.tau=2": "tau is 2",
        "--target-macs-ratio=0.5 --stages=0.7": "--tuning-steps is None; expected at least 1",
        "--target-macs-ratio=0.5 --tuning-steps=5": "--tuning-steps is given and --stages is not",
        "--target-macs-ratio=0.5 --tuning-steps=5 --stages=x": "--stages is 'x'",
        "--target-macs-ratio=0.5 --tuning-steps=5 --stages=0.4": "expected falling numbers",
        "--target-macs-ratio=0.5 --targt=3": "unknown key 'targt'",
    }.items():
        assert said in refused(capsys, "gone.ckpt", *options.split()), options
    for options, said in {
        "--target-macs-ratio=0.001": "lowest",
        "--target-macs-ratio=0.5 --metric=val_top2": "'val_top2' is not logged by the validation",
        "--target-macs-ratio=0.5 --ignored-layers=nowhere": "'nowhere', which matches none of the",
        "--target-macs-ratio=0.5 --ignored-layers=model.3x": "the nearest names are 'model.3'",
    }.items():
        assert said in refused(capsys, checkpoint, *CPU, *options.split()), options
    assert not Path("ratio_search").exists()


def test_a_folder_of_another_search_is_refused(capsys, checkpoint):
    assert main(["search", str(checkpoint), *HALF, "--num-episodes=1"]) == 0
    said = refused(capsys, checkpoint, *HALF, "--target-macs-ratio=0.6", "--num-episodes=1")
    assert "holds another search" in said
    assert "Give another folder" in said
