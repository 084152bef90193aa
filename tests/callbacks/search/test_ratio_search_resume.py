"""Searches and fits that are interrupted and come back, and that repeat."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lit_compress import (
    ChannelPruning,
    MagnitudeSparsity,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    Schedule,
)
from lit_compress.callbacks.search import report as search_report
from lit_compress.callbacks.search.ratio_search import RatioSearch
from lit_compress.search.evaluation import Evaluator
from lit_compress.search.settings import CandidateSettings
from tests.callbacks.nets import trainer
from tests.callbacks.quantized_fits import same_state
from tests.callbacks.search_fits import EndsAfter, Killed, Small, episodes, fit, loader, search

FINE = CandidateSettings(round_to=1, num_calibration_batches=2)
ROUNDS = Schedule("linear", begin=0, end=12, update_every=6)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(search_report, "plot_search", lambda result, path: path)


@pytest.fixture
def evaluated(monkeypatch):
    """The choices that are evaluated and not only remembered."""
    choices, evaluate = [], Evaluator._evaluated

    def noting(self, choice):
        choices.append(choice)
        return evaluate(self, choice)

    monkeypatch.setattr(Evaluator, "_evaluated", noting)
    return choices


@pytest.mark.parametrize("searcher", ["ddpg", "random"])
def test_a_search_that_is_killed_goes_on_exactly(searcher, evaluated):
    settings = {"num_episodes": 8, "searcher": searcher, "candidates": FINE}
    whole = search(**settings, folder="whole")
    fit(whole, max_epochs=0)
    assert len(set(evaluated)) == len(evaluated) >= 5
    for episode in (0, 4):
        folder = f"killed-{episode}"
        killed = search(**settings, folder=folder)
        with pytest.raises(Killed):
            fit(killed, logger=EndsAfter(episode), max_epochs=0)
        assert killed.result is None
        before = len(evaluated)
        again = search(**settings, folder=folder)
        fit(again, max_epochs=0)
        assert len(evaluated) - before <= 8 - (episode + 1)
        assert episodes(again.result) == episodes(whole.result)
        assert again.result.best == whole.result.best


def test_the_same_search_repeats_and_another_one_has_a_folder_of_its_own(evaluated):
    first, second, third = search(), search(folder="elsewhere"), search(0.6)
    for found in (first, second, third):
        fit(found, max_epochs=0)
    assert episodes(first.result) == episodes(second.result) != episodes(third.result)
    before = len(evaluated)
    fit(again := search(), max_epochs=0)  # its folder holds the answer
    assert len(evaluated) == before
    assert again.result == first.result
    fit(other := search(), seed=2, max_epochs=0)  # other weights
    assert len(evaluated) > before
    assert other.result.setting["weights"] != first.result.setting["weights"]


def test_a_folder_of_another_search_is_refused():
    fit(search(folder="mine"), max_epochs=0)
    with pytest.raises(ValueError, match="holds another search: its budget is"):
        fit(search(0.6, folder="mine"), max_epochs=0)


SPARSITY = {"target": None, "space": "sparsity", "final_sparsity": 0.8}
BITS = {"target": None, "space": "bits", "mean_weight_bits": 4.0}
RUNS = {
    "channels": lambda: [
        search(),
        ChannelPruning(plan="searched", schedule=ROUNDS, round_to=1, reconstruct=True),
    ],
    "sparsity": lambda: [search(**SPARSITY), MagnitudeSparsity("searched")],
    "sparsity of fewer channels": lambda: [
        search(**SPARSITY),
        ChannelPruning(0.5, round_to=1),
        MagnitudeSparsity("searched"),
    ],
    "bits": lambda: [search(**BITS), QuantizationAwareTraining(layer_bits="searched")],
    "two": lambda: [
        search(),
        search(**SPARSITY),
        ChannelPruning(plan="searched"),
        MagnitudeSparsity("searched"),
    ],
}


class Steady(Small):
    """Without dropout."""

    def __init__(self):
        super().__init__()
        self.model[8] = nn.Identity()


@pytest.mark.parametrize("name", RUNS)
def test_training_that_is_resumed_does_not_search_again(name, tmp_path, monkeypatch):
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    data = loader(shuffle=False)  # checkpoints hold no state of random number generators
    settings = {"module": Steady, "data": data, "max_epochs": 2}
    whole = RUNS[name]()
    module, _ = fit(*whole, save, enable_checkpointing=True, **settings)
    torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    monkeypatch.setattr(RatioSearch, "_search", lambda *_: pytest.fail("searched again"))
    resumed = RUNS[name]()
    again, _ = fit(*resumed, ckpt_path=tmp_path / "epoch=0.ckpt", seed=5, **settings)
    assert same_state(module, again)
    assert resumed[0].result == whole[0].result
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours.declared == theirs.declared


def test_a_resumed_run_under_another_target_keeps_what_was_found(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="last")
    fit(first := search(), ChannelPruning(plan="searched"), save, enable_checkpointing=True)
    other, pruning = search(0.7), ChannelPruning(plan="searched")
    with pytest.warns(
        UserWarning,
        match=r"target_macs_ratio is 0.7, was 0.5.; what it found stays",
    ):
        fit(other, pruning, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert other.result == first.result
    assert pruning.kept == first.result.plan.kept


def test_a_callback_that_fits_again_searches_again():
    found, quantization = search(**BITS), PostTrainingQuantization(layer_bits="searched")
    fit(found, quantization, max_epochs=0)
    first = found.result
    fit(found, quantization, seed=2, max_epochs=0)
    assert found.result.setting["weights"] != first.setting["weights"]
    assert quantization.scheme.layer_bits == found.result.layer_bits


def test_a_checkpoint_that_is_evaluated_is_no_run_that_is_resumed(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="last")
    fit(first := search(), save, enable_checkpointing=True)
    found = search(0.7)
    runner = trainer(callbacks=[found], max_epochs=0)
    runner.validate(Small(), loader(16), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    runner.fit(Small(), loader())
    assert found.result.budget != first.result.budget
