"""Layers are named as in the LightningModule or in its network, alike for every callback."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lit_compress import (
    ChannelPruning,
    MagnitudeSparsity,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RatioSearch,
    WeightClustering,
)
from lit_compress.search.settings import CandidateSettings
from tests.callbacks.nets import Net, loader
from tests.callbacks.nets import trainer as trainer_of
from tests.callbacks.quantized_fits import quantizers
from tests.callbacks.search_fits import SMALL, Small
from tests.callbacks.search_fits import loader as pictures

SPELLINGS = ["4", "model.4", "model.[4]", "*4"]  # all of them one layer of ``Net``


def fitted(callback: Any, module: pl.LightningModule | None = None, **settings: Any) -> Any:
    """The module after one step."""
    pl.seed_everything(1, verbose=False)
    module = Net() if module is None else module
    data = pictures() if isinstance(module, Small) else loader(16)
    trainer_of(**({"max_steps": 1, "callbacks": callback} | settings)).fit(module, data)
    return module


def pruning(*ratios: Any, **arguments: Any) -> ChannelPruning:
    return ChannelPruning(*ratios, round_to=1, num_calibration_batches=1, **arguments)


def search(space: str, ignored_layers: list[str]) -> RatioSearch:
    target = {"channels": "target_macs_ratio", "sparsity": "final_sparsity"}
    value = {target.get(space, "mean_weight_bits"): 4.0 if space == "bits" else 0.5}
    few = CandidateSettings(round_to=2, num_calibration_batches=0, ignored_layers=ignored_layers)
    return RatioSearch(
        space, **value, num_episodes=1, searcher="rules", candidates=few, scoring=SMALL
    )


@pytest.mark.parametrize("name", SPELLINGS)
def test_sparsity(name):
    sparsity = MagnitudeSparsity(0.5, ignored_layers=[name])
    fitted(sparsity)
    assert set(sparsity.sparsities) == {"model.0.weight", "model.8.weight"}
    sparsity = MagnitudeSparsity(0.5, layers=[name])
    fitted(sparsity)
    assert set(sparsity.sparsities) == {"model.4.weight"}


@pytest.mark.parametrize("name", SPELLINGS)
def test_sparsity_by_layer(name):
    sparsity = MagnitudeSparsity({name: 0.25, "*": 0.5})
    fitted(sparsity)
    assert sparsity.sparsities == {
        "model.0.weight": 0.5,
        "model.4.weight": 0.25,
        "model.8.weight": 0.5,
    }


@pytest.mark.parametrize("name", SPELLINGS)
def test_clusters(name):
    clustering = WeightClustering({name: 3, "model.8": 2}, preserve_sparsity=False)
    fitted(clustering)
    found = {name: len(clusters.centroids) for name, clusters in clustering.clusters.items()}
    assert found == {"model.4.weight": 3, "model.8.weight": 2}
    clustering = WeightClustering(2, ignored_layers=[name])
    fitted(clustering)
    assert clustering.clustered_names == {"model.0.weight", "model.8.weight"}


@pytest.mark.parametrize("name", SPELLINGS)
def test_channels(name):
    callback = pruning(0.5, ignored_layers=[name])
    fitted(callback)
    assert callback.kept == {"0": 4}
    for rest in ({}, {"target_macs_ratio": 0.82}):
        callback = pruning({name: 0.5}, **rest)
        fitted(callback)
        assert callback.kept["0"] == 8
        assert callback.kept["4"] < 16


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("network", [None, "model"])
def test_quantization_in_training(name, network):
    arguments: dict[str, Any] = {"network": network, "num_calibration_batches": 1}
    module = fitted(QuantizationAwareTraining(layer_bits={name: 4}, **arguments))
    weights = quantizers(module).placement.weights.values()
    bits = {weight: quantizers(module).weight(weight).grid.bits for weight in weights}
    assert bits == {"0.weight": 8, "3.weight": 8, "4.weight": 4, "8.weight": 8}
    module = fitted(QuantizationAwareTraining(ignored_layers=[name], **arguments))
    weights = quantizers(module).placement.weights.values()
    assert set(weights) == {"0.weight", "3.weight", "8.weight"}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_checkpoint_of_a_quantized_network_needs_no_other_names(name, tmp_path):
    def qat(**arguments: Any) -> QuantizationAwareTraining:
        return QuantizationAwareTraining(
            layer_bits={name: 4}, ignored_layers=["model.8"], num_calibration_batches=1, **arguments
        )

    pl.seed_everything(1, verbose=False)
    module, whole = Net(), trainer_of(max_steps=2, callbacks=[qat()])
    whole.fit(module, loader(16))
    whole.save_checkpoint(tmp_path / "whole.ckpt")
    resumed = Net()
    trainer_of(max_steps=3, callbacks=[qat()]).fit(
        resumed, loader(16), ckpt_path=tmp_path / "whole.ckpt"
    )
    scheme = quantizers(resumed).scheme
    assert (scheme.layer_bits, scheme.ignored_layers) == ({"4": 4}, ("8",))


@pytest.mark.parametrize("name", SPELLINGS)
def test_quantization_after_training(name):
    callback = PostTrainingQuantization(
        layer_bits={name: 4}, ignored_layers=[name.replace("4", "8")], num_calibration_batches=1,
        save=False,
    )  # fmt: skip
    module = fitted(callback, max_steps=-1, max_epochs=0)
    weights = dict.fromkeys(quantizers(module).placement.weights.values())
    bits = {weight: quantizers(module).weight(weight).grid.bits for weight in weights}
    assert bits == {"0.weight": 8, "3.weight": 8, "4.weight": 4}


@pytest.mark.parametrize("space", ["channels", "sparsity", "bits"])
@pytest.mark.parametrize("name", ["3", "model.3"])
def test_searches(space, name, tmp_path):
    callback = search(space, [name])
    fitted(callback, Small(), max_steps=-1, max_epochs=0, default_root_dir=tmp_path)
    assert callback.result is not None
    found = [decision.name for decision in callback.result.decisions]
    assert found == (["0"] if space == "channels" else ["0", "9"])


class Twice(pl.LightningModule):
    """A network in which ``model.head`` is a name, too, as in the LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"model": nn.ModuleDict({"head": nn.Linear(36, 6)})})
        self.model["head"] = nn.Linear(6, 4)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = self.model["model"]["head"](batch[0].flatten(1))
        return nn.functional.cross_entropy(self.model["head"](x), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_a_name_that_both_have_is_that_in_the_network():
    sparsity = MagnitudeSparsity({"model.head": 0.5, "head": 0.25})
    fitted(sparsity, Twice())
    assert sparsity.sparsities == {"model.model.head.weight": 0.5, "model.head.weight": 0.25}


def compiled(kind: str) -> Small:
    module = Small()
    if kind == "network":
        module.model = torch.compile(module.model, backend="eager")
    else:
        module.model[3] = torch.compile(module.model[3], backend="eager")
    return module


@pytest.mark.parametrize("kind", ["network", "part"])
def test_compiled_networks_have_plain_names(kind):
    for name in ("3", "model.3", "*3"):
        sparsity = MagnitudeSparsity({name: 0.5})
        fitted(sparsity, compiled(kind))
        assert set(sparsity.sparsities) == {"model.3.weight"}
        callback = pruning({name: 0.5})
        fitted(callback, compiled(kind))
        assert callback.kept == {"0": 12, "3": 8}


@pytest.mark.parametrize("kind", ["network", "part"])
def test_what_is_searched_in_a_compiled_network_goes_to_the_callbacks(kind, tmp_path):
    both = [search("sparsity", ["model.9"]), MagnitudeSparsity("searched")]
    fitted(both, compiled(kind), default_root_dir=tmp_path)
    assert set(both[1].sparsities) == {"model.0.weight", "model.3.weight"}
    both = [search("channels", []), ChannelPruning(plan="searched", round_to=1)]
    fitted(both, compiled(kind), default_root_dir=tmp_path)
    assert both[1].kept == both[0].result.plan.kept
    assert set(both[1].kept) == {"0", "3"}


@pytest.mark.parametrize(
    ("argument", "callback"),
    [
        ("ignored_layers", lambda name: MagnitudeSparsity(0.5, ignored_layers=[name])),
        ("layers", lambda name: MagnitudeSparsity({name: 0.5})),
        ("ignored_layers", lambda name: WeightClustering(ignored_layers=[name])),
        ("layers", lambda name: WeightClustering({name: 4})),
        ("ignored_layers", lambda name: pruning(0.5, ignored_layers=[name])),
        ("pruning_ratio", lambda name: pruning({name: 0.5})),
        ("ignored_layers", lambda name: QuantizationAwareTraining(ignored_layers=[name])),
        ("layer_bits", lambda name: QuantizationAwareTraining(layer_bits={name: 4})),
        ("ignored_layers", lambda name: PostTrainingQuantization(ignored_layers=[name])),
        ("layer_bits", lambda name: PostTrainingQuantization(layer_bits={name: 4})),
        ("ignored_layers", lambda name: search("channels", [name])),
        ("ignored_layers", lambda name: search("sparsity", [name])),
        ("ignored_layers", lambda name: search("bits", [name])),
    ],
)
@pytest.mark.parametrize("name", ["model.0x", "0x"])
def test_a_pattern_that_matches_nothing_names_the_nearest(argument, callback, name, tmp_path):
    nearest = name.removesuffix("x")
    message = (
        rf"{argument} holds the pattern '{name}', which matches none of the \d layers there are to "
        rf"choose from; the nearest names are '{nearest}'"
    )
    with pytest.raises(ValueError, match=message):
        fitted(callback(name), Small(), default_root_dir=tmp_path)
