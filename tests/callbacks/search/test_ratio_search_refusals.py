"""What a search and those who wait for it refuse, each with the fix."""

import lightning.pytorch as pl
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lit_compress import (
    ChannelPruning,
    MagnitudeSparsity,
    PostTrainingQuantization,
    QuantizationAwareTraining,
)
from lit_compress.callbacks.search import report as search_report
from lit_compress.callbacks.search.ratio_search import RatioSearch
from lit_compress.search.settings import CandidateSettings, ScoringSettings
from tests.callbacks.search_fits import Small, fit, loader, search

WHOLE = CandidateSettings(min_preserve_ratio=1, num_calibration_batches=1)
NINE = CandidateSettings(num_calibration_batches=1, ignored_layers=["nine"])
VAL = ScoringSettings(split="val", precision="trainer")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(search_report, "plot_search", lambda result, path: path)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "a search over channels by its score alone needs a target"),
        ({"target_macs_ratio": 1.5}, r"target_macs_ratio is 1.5, expected a number in \(0, 1\)"),
        ({"target_latency_ms": 0}, "target_latency_ms is 0, expected a number above 0"),
        ({"target_macs_ratio": 0.5, "target_params_ratio": 0.5}, "has one budget, give one"),
        ({"final_sparsity": 0.5}, "final_sparsity is given, and the search is over channels"),
        ({"space": "sparsity", "target_macs_ratio": 0.5}, "its target is one of final_sparsity"),
        ({"space": "sparsity", "reward": "error_log_macs"}, r"give final_sparsity\."),
        ({"space": "bits"}, r"give mean_weight_bits or target_size_bytes\."),
        ({"space": "bits", "mean_weight_bits": 9}, r"mean_weight_bits is 9.* in \(2, 8\)"),
        ({"space": "bits", "reward": "error_log_macs"}, "change neither MACs nor"),
        ({"space": "layers"}, "space is 'layers', expected one of 'channels', 'sparsity'"),
        ({"searcher": "grid", "target_macs_ratio": 0.5}, "searcher is 'grid', expected one of"),
        ({"reward": "accuracy"}, "reward is 'accuracy'; expected one of 'score'"),
        ({"reward": "error_log_macs", "mode": "min"}, "needs a metric in .0, 1. of which more"),
        ({"target_macs_ratio": 0.5, "num_episodes": 0}, "num_episodes is 0, expected a whole"),
        ({"target_macs_ratio": 0.5, "tolerance": -1}, "tolerance is -1, expected a loss"),
    ],
)
def test_arguments_that_make_no_search(arguments, match):
    with pytest.raises(ValueError, match=match):
        RatioSearch(**arguments)


class Silent(Small):
    def validation_step(self, batch, batch_idx):
        self(batch[0])


class NoStep(Small):
    validation_step = pl.LightningModule.validation_step


class OneLayer(Small):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))


class Percent(Small):
    def validation_step(self, batch, batch_idx):
        self.log("val_acc", 100 * (self(batch[0]).argmax(1) == batch[1]).float().mean())


@pytest.mark.parametrize(
    ("found", "settings", "error", "match"),
    [
        (lambda: search(0.01), {}, ValueError,
         r"the budget is \S+ macs, and the lowest that the bounds allow is \S+ \(\S+%"),
        (lambda: search(metric="accuracy"), {}, ValueError,
         "metric 'accuracy' is not logged by the validation; what is: 'val_acc', 'val_loss'"),
        (lambda: search(), {"module": Silent}, ValueError, "validation_step logs nothing"),
        (lambda: search(), {"module": NoStep}, MisconfigurationException,
         "NoStep has no validation_step"),
        (lambda: search(scoring=VAL), {}, MisconfigurationException,
         "the validation data have no batch to score candidates on; give a loader"),
        (lambda: search(scoring=VAL), {"val": loader(16), "limit_val_batches": 0},
         MisconfigurationException, "the validation data have no batch"),
        (lambda: search(), {"data": loader(16)},
         MisconfigurationException, "have no batch to score .* beside the 1 for calibration"),
        (lambda: search(), {"module": OneLayer}, ValueError, "no channels that can be cut"),
        (lambda: search(candidates=WHOLE), {},
         ValueError, "there is nothing to search"),
        (lambda: search(candidates=NINE), {}, ValueError,
         "'nine'.* matches"),
        (lambda: search(None, reward="error_log_macs"), {"module": Percent}, ValueError,
         r"needs a metric in \[0, 1\], and it came as"),
    ],
)  # fmt: skip
def test_fits_that_cannot_be_searched(found, settings, error, match):
    with pytest.raises(error, match=match):
        fit(found(), **({"max_epochs": 0} | settings))


def test_where_all_candidates_fail_the_last_failure_is_told():
    class Fails(Small):
        def validation_step(self, batch, batch_idx):
            if self.model[3].out_channels < 16:
                raise RuntimeError("too narrow")
            super().validation_step(batch, batch_idx)

    with pytest.raises(ValueError, match=r"none of 4 episodes finished \(4 failed.*too narrow"):
        fit(search(), module=Fails, max_epochs=0)


def test_a_network_that_is_quantized_is_refused():
    module, _ = fit(PostTrainingQuantization(num_calibration_batches=1), max_epochs=0)
    with pytest.raises(MisconfigurationException, match="RatioSearch has to come before quant"):
        fit(search(), module=module, max_epochs=0)


WAITING = [
    (lambda: ChannelPruning(plan="searched"), "channels", r'ChannelPruning\(plan="searched"\)'),
    (lambda: MagnitudeSparsity("searched"), "sparsity", r'final_sparsity="searched"\)'),
    (lambda: QuantizationAwareTraining(layer_bits="searched"), "bits",
     r'QuantizationAwareTraining\(layer_bits="searched"\)'),
    (lambda: PostTrainingQuantization(layer_bits="searched"), "bits",
     r'PostTrainingQuantization\(layer_bits="searched"\)'),
]  # fmt: skip


@pytest.mark.parametrize(("taker", "space", "words"), WAITING)
def test_waiting_for_a_search_that_does_not_come(taker, space, words):
    match = rf'{words} waits for a RatioSearch\(space="{space}"\) and none is listed before it'
    other = search() if space != "channels" else search(None, space="bits", mean_weight_bits=4.0)
    for callbacks in ([], [other]):
        with pytest.raises(MisconfigurationException, match=match):
            fit(*callbacks, taker())
    if space == "channels":
        with pytest.raises(MisconfigurationException, match=match):
            fit(taker(), search())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MagnitudeSparsity("search"), "final_sparsity is 'search', expected a number in"),
        (lambda: MagnitudeSparsity("searched", allocation="global"), "leave both out"),
        (lambda: MagnitudeSparsity("searched", pattern="2:4"), "the pattern 2:4 are given"),
        (lambda: MagnitudeSparsity("searched", ignored_layers=["0"]), "are those of the search"),
        (lambda: MagnitudeSparsity("searched", layers=["0"]), "are those of the search"),
        (lambda: MagnitudeSparsity("searched", layer_types=["conv"]), "are those of the search"),
        (lambda: QuantizationAwareTraining(layer_bits="search"), "layer_bits is 'search'"),
        (lambda: QuantizationAwareTraining(layer_bits="searched", network="model"),
         "network is 'model'; the search has the bits .* Leave network out"),
        (lambda: PostTrainingQuantization("float16", layer_bits="searched"),
         "layer_bits is .*method='float16' has no use for"),
        (lambda: PostTrainingQuantization(layer_bits="search"), "layer_bits"),
        (lambda: ChannelPruning(plan="search"), "there is no such file"),
    ],
)  # fmt: skip
def test_receivers_refuse_what_is_no_search(make, match):
    with pytest.raises(ValueError, match=match):
        make()
