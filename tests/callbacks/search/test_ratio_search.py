"""A search before training: what it finds, what it leaves as it was, and what is seen of it."""

import copy
import csv
import json
import random
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lit_compress import (
    ChannelPruning,
    MagnitudeSparsity,
    PostTrainingQuantization,
    QuantizationAwareTraining,
)
from lit_compress.callbacks.search import candidates as _search_candidates
from lit_compress.callbacks.search import report as search_report
from lit_compress.compress.channels.plan import ChannelPlan
from lit_compress.compress.quantization.sizes import stored_bytes
from lit_compress.measure import count_macs, count_params
from lit_compress.search.search_result import SearchResult
from lit_compress.search.settings import CandidateSettings, ScoringSettings
from tests.callbacks.nets import same_weights
from tests.callbacks.search_fits import (
    FEW,
    EndsAfter,
    Small,
    episodes,
    files,
    fit,
    images,
    loader,
    search,
)

ONE = (torch.zeros(1, 1, 6, 6),)
WEIGHTS = {"0": 108, "3": 1728, "9": 256}
DENSE = Small().model
PLOT = search_report.plot_search


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Drawing takes longer than all else; one test does it."""
    monkeypatch.setattr(search_report, "plot_search", lambda result, path: path)


# --- What is found --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "measured"),
    [
        ({"target_macs_ratio": 0.5}, lambda net: count_macs(net, ONE) / count_macs(DENSE, ONE)),
        ({"target_params_ratio": 0.4}, lambda net: count_params(net) / count_params(DENSE)),
        ({"target_size_bytes": 5000}, stored_bytes),
        ({"target_latency_ms": 15.0}, lambda net: net[0].out_channels + net[3].out_channels),
    ],
)
def test_channels_that_are_cut_meet_the_target(target, measured, monkeypatch):
    def in_place_of_timing(groups, network, run, cache):
        assert cache == Path("ratio_search/latency.json").resolve()
        return lambda kept: kept.sum(1)  # a channel takes a millisecond

    monkeypatch.setattr(_search_candidates.LatencyTable, "measure", in_place_of_timing)
    found = search(None, **target)
    module, _ = fit(found, ChannelPruning(plan="searched", round_to=1), max_steps=1)
    (limit,) = target.values()
    assert 0.6 * limit < measured(module.model) <= limit
    kept = {"0": module.model[0].out_channels, "3": module.model[3].out_channels}
    assert kept == found.result.plan.kept == found.result.values


def test_weights_that_are_removed_meet_the_target_to_the_weight():
    found = search(None, space="sparsity", final_sparsity=0.8)
    sparsity = MagnitudeSparsity("searched")
    module, _ = fit(found, sparsity)
    zeros = {n: int((module.model.get_parameter(f"{n}.weight") == 0).sum()) for n in WEIGHTS}
    assert sum(zeros.values()) == round(0.8 * sum(WEIGHTS.values()))
    for layer, size in WEIGHTS.items():  # at most one step of a level from what was tried
        assert zeros[layer] / size == pytest.approx(found.result.sparsities[layer], abs=0.08)
    written = json.loads(next(Path("ratio_search").glob("*/sparsities.json")).read_text())
    again = MagnitudeSparsity(written)
    other, _ = fit(again)
    assert again.sparsity == sparsity.sparsity
    assert same_weights(module, other)


@pytest.mark.parametrize("kind", [QuantizationAwareTraining, PostTrainingQuantization])
def test_bits_of_weights_meet_the_target(kind):
    found = search(None, space="bits", mean_weight_bits=4.0)
    quantization = kind(layer_bits="searched", num_calibration_batches=1)
    epochs = 0 if kind is PostTrainingQuantization else 1
    module, _ = fit(found, quantization, max_epochs=epochs)
    assert quantization.scheme.layer_bits == found.result.layer_bits
    bits = {n: module.model.quantization.weight(f"{n}.weight").grid.bits for n in WEIGHTS}
    assert bits == found.result.layer_bits
    mean = sum(bits[n] * size for n, size in WEIGHTS.items()) / sum(WEIGHTS.values())
    assert 3 < mean <= 4


def test_bytes_of_quantized_weights_meet_the_target():
    found = search(None, space="bits", target_size_bytes=1400)
    module, _ = fit(found, PostTrainingQuantization("weight_only", layer_bits="searched"),
                    max_epochs=0)  # fmt: skip
    assert stored_bytes(module.model) <= 1400


def test_layers_that_are_ignored_stay_whole_and_are_not_searched():
    candidates = CandidateSettings(round_to=2, num_calibration_batches=1, ignored_layers=["0"])
    found = search(0.8, candidates=candidates)
    pruning = ChannelPruning(plan="searched")
    module, _ = fit(found, pruning, max_steps=1)
    assert [d.name for d in found.result.decisions] == ["3"]
    assert (module.model[0].out_channels, module.model[3].out_channels < 16) == (12, True)


class Whole(Small):
    """Its layers are its own, so that the module is the network."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * self.model(x)


@pytest.mark.parametrize(
    ("pruning", "candidates", "cut", "says"),
    [
        ({}, {}, ("group", True, 2), None),
        ({}, {"importance": "l1", "num_calibration_batches": 0}, ("l1", False, 8), None),
        ({"importance": "group", "reconstruct": True}, {}, ("group", True, 2), None),
        ({"num_calibration_batches": 3}, {}, ("group", True, 3), None),
        ({"importance": "l2"}, {}, ("l2", True, 2), "='group' and .* by importance='l2' and"),
        ({"reconstruct": False}, {}, ("group", False, 2), "=True, .* reconstruct=False, so"),
    ],
)
def test_the_model_is_cut_as_the_candidates_were_or_it_is_told(pruning, candidates, cut, says):
    found = search(num_episodes=1, candidates=replace(FEW, **candidates))
    taker = ChannelPruning(plan="searched", **pruning)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(found, taker, max_steps=1)
    told = [str(w.message) for w in caught if "the plan was found with" in str(w.message)]
    assert len(told) == (says is not None)
    assert all(re.search(says, text) for text in told)
    assert (taker.importance, taker.reconstruct, taker.num_calibration_batches) == cut


class ScoredAtStart(pl.Callback):
    """The accuracy before the first step."""

    def on_train_start(self, trainer, pl_module):
        x, y = images(64, seed=3).tensors
        network = copy.deepcopy(pl_module.model).eval()
        with torch.no_grad():
            self.accuracy = float((network(x).argmax(1) == y).float().mean())


def test_the_model_scores_after_the_cut_what_the_search_says():
    module, _ = fit(max_epochs=3)
    scoring = ScoringSettings(split="val", num_examples=64, precision="trainer")
    found, at_start = search(scoring=scoring, seed=1), ScoredAtStart()
    ordered = loader(shuffle=False)  # least squares sees the same batches twice
    taker = ChannelPruning(plan="searched")
    val = DataLoader(images(64, seed=3), 16)
    fit(found, taker, at_start, module=module, data=ordered, val=val, max_steps=1)
    # Candidates share the sums of the dense network; the cut itself goes layer by layer.
    assert at_start.accuracy == pytest.approx(found.result.best_episode.score, abs=0.05)
    assert at_start.accuracy > 0.6


@pytest.mark.parametrize("space", ["channels", "sparsity"])
def test_a_module_that_is_the_network_itself(space):
    if space == "channels":
        found, taker = search(), ChannelPruning(plan="searched")
    else:
        found = search(None, space="sparsity", final_sparsity=0.8)
        taker = MagnitudeSparsity("searched")
    module, _ = fit(found, taker, module=Whole)
    assert {d.name for d in found.result.decisions} <= {"model.0", "model.3", "model.9"}
    assert found.result.num_failed == 0
    if space == "channels":
        assert count_macs(module.model, ONE) <= 0.5 * count_macs(DENSE, ONE)
    else:
        assert taker.sparsity == pytest.approx(0.8, abs=1e-3)


# --- Rewards and searchers ------------------------------------------------------------------------


@pytest.mark.parametrize("searcher", ["random", "rules", "sensitivity"])
def test_other_searchers_meet_the_same_target(searcher):
    found = search(searcher=searcher)
    fit(found, max_epochs=0)
    sources = {e.source for e in found.result.episodes}
    expected = {"uniform", "deep", "shallow"} if searcher == "rules" else {searcher}
    assert sources == expected
    limit = found.result.budget[1]
    assert all(e.costs["macs"] <= limit for e in found.result.episodes)


def test_without_a_target_the_cheapest_within_the_tolerance_wins():
    found = search(None, reward="error_log_macs", tolerance=0.3, num_episodes=6)
    fit(found, max_epochs=0)
    result = found.result
    assert result.budget is None
    near = [e for e in result.episodes if e.score >= result.dense_score - 0.3]
    assert near
    assert result.best_episode.costs["macs"] == min(e.costs["macs"] for e in near)


def test_a_function_is_a_reward_and_less_of_a_loss_is_better():
    found = search(None, reward=lambda score, costs: -score - costs["num_params"] / 1e4,
                   metric="val_loss")  # fmt: skip
    fit(found, max_epochs=0)
    result = found.result
    assert (result.metric, result.mode, result.reward) == ("val_loss", "min", "function")
    for episode in result.episodes:
        assert episode.reward == pytest.approx(-episode.score - episode.costs["num_params"] / 1e4)
    assert result.best_episode.reward == max(e.reward for e in result.episodes)


class AtTheEnd(Small):
    """Knows its accuracy when the epoch ends."""

    def on_validation_epoch_start(self):
        self.right = []

    def validation_step(self, batch, batch_idx):
        self.right.append((self(batch[0]).argmax(1) == batch[1]).float().mean())

    def on_validation_epoch_end(self):
        self.log("val_acc", torch.stack(self.right).mean())


def test_a_metric_of_the_whole_epoch_has_no_race():
    at_the_end, at_each_step = search(), search()
    scoring = ScoringSettings(num_examples=64, precision="trainer", race=True)
    at_the_end.scoring = at_each_step.scoring = scoring
    fit(at_the_end, module=AtTheEnd, max_epochs=0)
    fit(at_each_step, max_epochs=0)
    assert episodes(at_the_end.result) == episodes(at_each_step.result)


class TwoLoaders(Small):
    def val_dataloader(self):
        return [loader(32, shuffle=False), loader(48, shuffle=False)]

    def validation_step(self, batch, batch_idx, dataloader_idx):
        super().validation_step(batch, batch_idx)


def test_several_validation_loaders_have_a_metric_each():
    scoring = ScoringSettings(split="val", precision="trainer")
    found = search(scoring=scoring, metric="val_acc/dataloader_idx_1")
    module, run = fit(found, module=TwoLoaders, max_epochs=0)
    assert found.result.num_failed == 0
    (logged, other) = run.validate(module, verbose=False)
    name = "val_acc/dataloader_idx_1"
    assert found.result.dense_score == pytest.approx((logged | other)[name])


# --- As without it --------------------------------------------------------------------------------


class Jitter(Dataset):
    """Draws from all random number generators."""

    def __len__(self):
        return 128

    def __getitem__(self, index):
        x, y = images()[index]
        return x + torch.rand(1) + np.random.rand() + random.random(), y  # noqa: NPY002


class Partly(Small):
    """Has a part in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.model[4].eval()


class Watch(pl.Callback):
    """Notes what a fit finds when it begins, and each batch."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        self.seen += [torch.rand(1).item(), np.random.rand(), random.random()]  # noqa: NPY002

    def on_fit_start(self, trainer, pl_module):
        self.seen += [m.training for m in pl_module.modules()]
        self.seen += [p.stride() for p in pl_module.parameters()]
        self.seen += [trainer.global_step, dict(trainer.callback_metrics), trainer.state.stage]
        self.seen += [trainer.progress_bar_metrics, dict(trainer.logged_metrics)]
        self.seen += [list(vars(pl_module))]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch[0].sum().item())

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.seen.append(batch[0].sum().item())


def logged(folder):
    """The rows of a CSV log, without what is empty."""
    with (Path(folder) / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    return rows


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "space", [{}, {"space": "sparsity", "final_sparsity": 0.8}, {"space": "bits"}]
)
def test_a_fit_after_a_search_is_the_fit_without_it(space, split):
    if (split, space) == ("val", {"space": "bits"}):
        pytest.skip("as for the others")
    target = {"mean_weight_bits": 4.0} if space == {"space": "bits"} else {}
    target |= {} if space else {"target_macs_ratio": 0.5}
    scoring = ScoringSettings(split=split, num_examples=48)
    found = search(None, scoring=scoring, **space, **target)
    ends = []
    for name, callbacks in (("plain", []), ("searched", [found])):
        watch = Watch()
        module, run = fit(
            *callbacks, watch, module=Partly, max_epochs=2, log_every_n_steps=1,
            data=DataLoader(Jitter(), 16, shuffle=True), val=loader(32, shuffle=False),
            logger=CSVLogger(".", name=name, version=0),
        )  # fmt: skip
        metrics = {k: v.item() for k, v in run.callback_metrics.items()}
        ends.append((module, watch.seen, metrics, logged(f"{name}/version_0"), run.global_step))
    (plain, *without), (searched, *after) = ends
    assert same_weights(plain, searched)
    assert without[0] == after[0]
    assert (without[1], without[3]) == (after[1], after[3])
    own = [row for row in after[2] if "search/episode" in row]
    assert [row for row in after[2] if row not in own] == without[2]
    assert len(own) == found.num_episodes


def test_failures_cost_their_episodes_and_are_counted():
    class Fails(Small):
        calls = 0

        def validation_step(self, batch, batch_idx):
            Fails.calls += 1
            if Fails.calls == 4:  # of the first candidate, after the dense model twice
                raise RuntimeError("no more")
            super().validation_step(batch, batch_idx)
            if Fails.calls == 5:
                self.log("val_acc", float("nan"))

    found = search(num_episodes=8, searcher="random")
    fit(found, module=Fails, max_epochs=0)
    by_choice = {e.choice: e.failure for e in found.result.episodes}
    assert list(by_choice.values())[:3] == [None, "RuntimeError: no more", "the metric is nan"]
    assert set(list(by_choice.values())[3:]) <= {None}
    assert found.result.num_failed == sum(e.failure is not None for e in found.result.episodes)
    assert f"{found.result.num_failed} failed" in str(found.result)


def test_memory_that_runs_out_ends_the_search_and_restores_the_module():
    class Hungry(Partly):
        calls = 0

        def validation_step(self, batch, batch_idx):
            Hungry.calls += 1
            if Hungry.calls == 4:
                raise MemoryError
            super().validation_step(batch, batch_idx)

    found, module = search(), Hungry()
    modes = [m.training for m in module.modules()]
    with pytest.raises(MemoryError):
        fit(found, module=module, max_epochs=0)
    assert [m.training for m in module.modules()] == modes
    fit(found, module=module, max_epochs=0)  # and it goes on
    assert len(found.result.episodes) == 4


def test_ctrl_c_ends_the_search_with_the_best_so_far_and_the_fit_goes_on():
    found = search(num_episodes=8)
    module, run = fit(
        found, ChannelPruning(plan="searched"), logger=EndsAfter(2, KeyboardInterrupt())
    )
    assert len(found.result.episodes) == 3
    assert run.global_step == 8
    assert module.model[0].out_channels == found.result.plan.kept["0"]


# --- What is seen ---------------------------------------------------------------------------------


def test_every_episode_is_logged_and_files_are_written(monkeypatch):
    monkeypatch.setattr(search_report, "plot_search", PLOT)
    found = search(folder="found")
    fit(found, logger=CSVLogger(".", name="log", version=0), max_epochs=0)
    rows = logged("log/version_0")
    best = found.result.running_best()
    for row, episode in zip(rows, found.result.episodes, strict=True):
        assert float(row["search/episode"]) == float(row["step"]) == episode.number
        assert float(row["search/best_reward"]) == pytest.approx(best[episode.number])
        assert float(row["search/macs_ratio"]) <= 0.5
        assert float(row["search/score"]) == pytest.approx(episode.score)
    assert files(Path("found")) == {"plan.json", "search.json", "search.png", "state.pt"}
    assert SearchResult.load("found/search.json") == found.result
    assert ChannelPlan.load("found/plan.json") == found.result.plan
    module, _ = fit(ChannelPruning(plan="found/plan.json"), max_steps=1)
    assert module.model[3].out_channels == found.result.plan.kept["3"]


class Artifact:
    """In the place of W&B's, which takes seconds to import."""

    def __init__(self, name, type, metadata):
        self.name, self.type, self.metadata, self.files = name, type, metadata, []

    def add_file(self, file):
        assert Path(file).is_file()
        self.files.append(Path(file).name)


class Recorder(WandbLogger):
    """Notes what it is sent."""

    def __init__(self):
        self.metrics, self.sent = [], {}
        self._logger_name = None

    @property
    def experiment(self):
        return self

    name = version = save_dir = None

    def log_metrics(self, metrics, step=None):
        self.metrics.append((metrics, step))

    def log_hyperparams(self, params):
        pass

    def log_graph(self, *args, **kwargs):
        pass

    def log_table(self, key, columns=None, data=None):
        self.sent[key] = columns, data

    def log_image(self, key, images):
        self.sent[key] = images

    def log_artifact(self, artifact):
        self.sent["artifact"] = artifact

    def finalize(self, status):
        pass

    def after_save_checkpoint(self, checkpoint_callback):
        pass


def test_wandb_gets_rows_table_picture_and_artifact(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Artifact=Artifact))
    monkeypatch.setattr(search_report, "plot_search", PLOT)
    logger, found = Recorder(), search(folder="found")
    fit(found, logger=logger, max_epochs=0)
    assert [step for _, step in logger.metrics] == [None] * 4
    assert [metrics["search/episode"] for metrics, _ in logger.metrics] == [0, 1, 2, 3]
    columns, rows = logger.sent["search/layers"]
    assert columns == ["layer", "full", "kept", "ratio"]
    assert [row[:3] for row in rows] == [
        ["0", 12, found.result.values["0"]],
        ["3", 16, found.result.values["3"]],
    ]
    columns, rows = logger.sent["search/episodes"]
    assert columns[:5] == ["episode", "source", "val_acc", "reward", "complete"]
    assert [row[0] for row in rows] == [None, 0, 1, 2, 3]
    assert logger.sent["search/result"] == ["found/search.png"]
    artifact = logger.sent["artifact"]
    assert (artifact.name, artifact.type) == ("ratio-search", "search")
    assert artifact.files == ["search.json", "plan.json"]
    assert artifact.metadata["score"] == found.result.best_episode.score


def test_a_fast_run_of_development_tries_one_candidate():
    found = search(candidates=FEW)
    _, run = fit(found, ChannelPruning(plan="searched"), fast_dev_run=True)
    assert len(found.result.episodes) == 1
    assert run.global_step == 1


def test_calibration_leaves_half_of_few_batches_to_score_on():
    found = search(candidates=CandidateSettings(num_calibration_batches=24, round_to=2))
    fit(found, max_epochs=0)
    assert found.result.setting["scoring"].endswith(", 1 batches")
    assert found.result.best_episode.complete
