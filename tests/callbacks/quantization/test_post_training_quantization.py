"""Quantization at the end of a fit, with the user's own validation before and after."""

import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lit_compress import (
    ChannelPruning,
    CompressionSummary,
    Distillation,
    MagnitudeSparsity,
    QuantizationAwareTraining,
    Schedule,
    load_compressed,
)
from lit_compress.callbacks.quantization.post_training_quantization import PostTrainingQuantization
from lit_compress.callbacks.weight_clustering import WeightClustering
from lit_compress.compress.quantization.formats.fixed_point import FixedPoint
from lit_compress.compress.quantization.network import is_quantized, quantized_network
from lit_compress.compress.quantization.stored import QUANTIZATION_KEY, quantization_records
from tests.callbacks.nets import ManualNet, Net, loader, same_weights, trainer

METHODS = ["static", "dynamic", "weight_only", "float16", "bfloat16", "fixed_point",
           "int8_dynamic_linear", "int8_weight_only_linear"]  # fmt: skip


class Scored(Net):
    """Logs a loss and a torchmetrics accuracy, and has a test step."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(4, average="micro")

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.accuracy.update(self(batch[0]), batch[1])
        self.log("val_top1", self.accuracy)

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)


class Inline(pl.LightningModule):
    """Has its layers itself, and calls its own forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(64, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(callback, *others, module=None, data=None, validation="same", **kwargs):
    """A fit of no epochs, unless said otherwise; the Trainer and the module."""
    torch.manual_seed(1)
    module = module or Scored()
    run = trainer(**({"max_epochs": 0, "callbacks": [*others, callback]} | kwargs))
    validation = loader(24) if validation == "same" else validation
    run.fit(module, data or loader(), validation)
    return run, module


def quantization(**kwargs):
    return PostTrainingQuantization(**({"num_calibration_batches": 3} | kwargs))


def images():
    return next(iter(loader(16, 16)))[0]


# --- What it finds --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_epochs", [0, 1])
def test_metrics_are_those_of_the_trainer_before_and_after(method, max_epochs):
    callback = quantization(method=method, save=False)
    torch.manual_seed(1)
    twin = Scored()
    if max_epochs:
        trainer(max_epochs=1).fit(twin, loader())
    (before,) = trainer().validate(twin, loader(24), verbose=False)
    run, module = fit(callback, max_epochs=max_epochs)
    (after,) = run.validate(module, loader(24), verbose=False)
    (tested,) = run.test(module, loader(24), verbose=False)
    assert callback.result.metrics_before == pytest.approx(before)
    assert callback.result.metrics_after == pytest.approx(after)
    assert after == tested
    assert set(before) == {"val_loss", "val_top1"}
    assert after["val_loss"] != before["val_loss"]
    difference = {name: after[name] - before[name] for name in after}
    assert callback.result.difference == pytest.approx(difference)
    assert callback.result.size_bytes_after < 0.75 * callback.result.size_bytes_before


def test_it_comes_after_the_last_step_and_changes_nothing_before():
    callback = quantization(save=False)
    _, plain = fit(pl.Callback(), max_epochs=2)
    _, module = fit(callback, max_epochs=2)
    weights = {n: v for n, v in module.state_dict().items() if ".quantization." not in n}
    assert weights.keys() == plain.state_dict().keys()
    assert all(torch.equal(v, weights[n]) for n, v in plain.state_dict().items())
    assert type(module.model[0]) is nn.Conv2d
    assert quantized_network(module.model).quantizing


def test_the_random_state_is_left_alone():
    states = []
    for callback in (pl.Callback(), quantization(save=False)):
        fit(callback)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_ranges_come_from_training_batches_only():
    module = Scored()
    wide = [(100 * x, y) for x, y in loader(8).dataset]
    callback = quantization(ranges="minmax", num_calibration_batches=2)
    fit(callback, module=module, validation=DataLoader(wide, batch_size=8))
    first = torch.cat([x for x, _ in list(loader())[:2]])
    observed = quantized_network(module.model).activation("input:0")
    assert float(observed.low) == float(first.min())
    assert float(observed.high) == float(first.max())
    assert callback.result.num_calibration_batches == 2


def test_modes_gradients_and_metrics_are_as_they_were():
    _, module = fit(quantization(save=False))
    assert module.training
    assert all(m.training for m in module.modules())
    assert all(p.requires_grad for p in module.model.parameters())
    assert float(module.accuracy.tp.sum()) == 0


def test_layers_and_bits():
    callback = quantization(
        weight_bits=4, layer_bits={"0": 8}, ignored_layers=["8"], activation_bits=6, save=False
    )
    _, module = fit(callback)
    found = quantized_network(module.model)
    assert {n: found.weight(n).grid.bits for n in found.placement.weights.values()} == {
        "0.weight": 8,
        "3.weight": 4,
        "4.weight": 4,
    }
    assert found.activation("input:0").grid.bits == 6
    assert callback.result.floating == {"8": "it is in ignored_layers"}
    table = str(callback.result)
    assert "static, 4-bit weights, but {'0': 8}, 6-bit activations, mse ranges" in table
    assert "  8: it is in ignored_layers" in table
    assert "val_top1" in table


def test_corrections_say_what_they_did():
    callback = quantization(corrections=["bias_correction", "equalization"], save=False)
    fit(callback)
    assert len(callback.result.remarks) == 2
    assert all(remark.splitlines()[0] in str(callback.result) for remark in callback.result.remarks)


def test_fixed_point_of_a_named_network():
    point = FixedPoint("minmax", param_bits=5, activation_bits=None)
    module = Scored()
    callback = quantization(method="fixed_point", fixed_point=point, network="model.8", save=False)
    fit(callback, module=module)
    assert list(quantization_records(module)) == ["model.8"]
    assert len(module.model[8].weight.unique()) <= 32 < len(module.model[4].weight.unique())


@pytest.mark.parametrize("method", ["static", "float16", "fixed_point"])
def test_a_module_that_is_the_network_itself(method, tmp_path):
    callback = quantization(method=method, dirpath=tmp_path)
    run, module = fit(callback, module=Inline())
    assert list(quantization_records(module)) == [""]
    (after,) = run.validate(module, loader(24), verbose=False)
    assert callback.result.metrics_after == pytest.approx(after)
    again = load_compressed(callback.result.checkpoint, Inline)
    assert torch.equal(again.eval()(images()), module.eval()(images()))


def test_without_validation_nothing_is_said_of_accuracy():
    for kwargs in ({"validation": None}, {"limit_val_batches": 0}):
        callback = quantization(save=False)
        fit(callback, **kwargs)
        assert callback.result.metrics_before == callback.result.metrics_after == {}
        assert "nothing is known of its accuracy" in str(callback.result)


def test_limits_several_loaders_and_odd_batches_count_as_in_lightning():
    class Two(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    callback = quantization(save=False)
    loaders = [loader(24), loader(21)]
    run, module = fit(callback, module=Two(), validation=loaders, limit_val_batches=2)
    run.validate(module, loaders, verbose=False)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert set(logged) == {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"}
    assert callback.result.metrics_after == pytest.approx(logged)


def test_manual_optimization_and_mixed_precision():
    callback = quantization(save=False)
    fit(callback, module=ManualNet(), max_epochs=1)
    assert set(callback.result.metrics_after) == {"val_loss"}
    callback = quantization(save=False)
    run, module = fit(callback, precision="bf16-mixed", max_epochs=1)
    (after,) = run.validate(module, loader(24), verbose=False)
    assert callback.result.metrics_after == pytest.approx(after)


# --- Checkpoints and loggers ----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_checkpoint_loads_in_every_way(method, tmp_path):
    callback = quantization(method=method)
    saved = ModelCheckpoint(tmp_path / "kept")
    run, module = fit(callback, saved, enable_checkpointing=True, max_epochs=1)
    path = callback.result.checkpoint
    assert path == str(tmp_path / "kept" / "quantized.ckpt")
    expected = module.eval().model(images())
    for target in (Scored, Scored(), Scored().model):
        again = load_compressed(path, target).eval()
        assert torch.equal(getattr(again, "model", again)(images()), expected)
    (metrics,) = run.test(module, loader(24), ckpt_path=path, verbose=False)
    assert metrics == pytest.approx(callback.result.metrics_after)
    # The best float checkpoint of the run takes the module back to floating point, and again.
    run.validate(module, loader(24), ckpt_path=saved.best_model_path, verbose=False)
    assert not quantization_records(module)
    run.validate(module, loader(24), ckpt_path=path, verbose=False)
    assert torch.equal(module.eval().model(images()), expected)


def test_a_trainer_of_its_own_tests_the_checkpoint(tmp_path):
    callback = quantization(method="int8_dynamic_linear", dirpath=tmp_path)
    fit(callback)
    fresh = Scored()
    run = trainer(callbacks=[quantization(method="int8_dynamic_linear")])
    (metrics,) = run.test(fresh, loader(24), ckpt_path=callback.result.checkpoint, verbose=False)
    assert metrics == pytest.approx(callback.result.metrics_after)


def test_the_checkpoint_holds_plain_data_and_no_optimizer(tmp_path):
    callback = quantization(dirpath=tmp_path / "made")
    fit(callback)
    content = torch.load(tmp_path / "made" / "quantized.ckpt", weights_only=True)
    assert "optimizer_states" not in content
    assert list(content[QUANTIZATION_KEY]) == ["model"]
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["quantized.ckpt"]


@pytest.mark.parametrize("kwargs", [{"save": False}, {}], ids=str)
def test_nothing_is_written_where_nothing_is_wanted(kwargs, tmp_path):
    options = {} if kwargs else {"fast_dev_run": True, "max_epochs": 1}
    callback = quantization(**kwargs)
    _, module = fit(callback, default_root_dir=tmp_path, **options)
    assert callback.result.checkpoint is None
    assert not list(tmp_path.rglob("*.ckpt"))
    assert is_quantized(module.model)


def test_loggers_get_metrics_before_and_after(tmp_path):
    callback = quantization()
    logger = CSVLogger(tmp_path, name="run")
    fit(callback, logger=logger, max_epochs=1, log_every_n_steps=1)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = {name: float(value) for row in rows for name, value in row.items() if value}
    result = callback.result
    expected = {f"quantization/{n}_before": v for n, v in result.metrics_before.items()}
    expected |= {f"quantization/{n}_after": v for n, v in result.metrics_after.items()}
    assert len(expected) == 4
    assert {name: logged[name] for name in expected} == pytest.approx(expected)
    assert result.checkpoint == f"{logger.log_dir}/quantized.ckpt"


# --- Together with others -------------------------------------------------------------------------


def test_zeros_and_clusters_are_kept():
    callback = quantization()
    others = [MagnitudeSparsity(0.5), WeightClustering(6, begin=0.75)]
    _, module = fit(callback, *others, max_epochs=2)
    found = quantized_network(module.model)
    for name in ("0.weight", "4.weight", "8.weight"):
        weight = module.model.get_parameter(name)
        rounded = found.weight(name)(weight)
        assert bool((rounded[weight == 0] == 0).all())
        assert len(rounded.unique()) <= len(weight.unique()) <= 6
    assert float((module.model[8].weight == 0).float().mean()) >= 0.3


def test_a_slim_network_and_its_checkpoint():
    at_once = Schedule("constant", begin=0, end=0)
    callback = quantization()
    others = [Distillation(), ChannelPruning(0.5, round_to=1, schedule=at_once)]
    _, module = fit(callback, *others, max_epochs=1)
    again = load_compressed(callback.result.checkpoint, Scored).eval()
    assert again.model[0].out_channels == 4
    assert torch.equal(again(images()), module.eval()(images()))


def test_the_average_is_what_is_quantized():
    average = EMAWeightAveraging(decay=0.5)
    _, plain = fit(EMAWeightAveraging(decay=0.5), max_epochs=1)
    callback = quantization(save=False)
    _, module = fit(callback, average, max_epochs=1)
    assert torch.equal(module.model[8].weight, plain.model[8].weight)


def test_the_summary_reports_the_metrics_of_integers(tmp_path):
    callback = quantization(save=False)
    torch.manual_seed(1)
    run = trainer(max_epochs=0, callbacks=[
        callback, summary := CompressionSummary(tmp_path, latency=False, plots=False),
    ])  # fmt: skip
    run.fit(Scored(), loader(), loader(24))
    assert summary.report.dense.metrics == pytest.approx(callback.result.metrics_before)
    assert summary.report.compressed.metrics == pytest.approx(callback.result.metrics_after)


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "int4"}, "method is 'int4'; choose one of static"),
        ({"num_calibration_batches": 0}, "num_calibration_batches is 0; give a whole number"),
        ({"num_calibration_batches": True}, "num_calibration_batches is True"),
        ({"weight_bits": 1}, "weight_bits is 1; expected a whole number of bits from 2 to 8"),
        ({"method": "float16", "corrections": ["adaround"]}, "corrections is .* no use for"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        PostTrainingQuantization(**arguments)


def refused(message, callback=None, *others, error=MisconfigurationException, **kwargs):
    with pytest.raises(error, match=message):
        fit(callback or quantization(), *others, **kwargs)


def test_a_second_quantization():
    refused("are in the same Trainer, and a network is quantized once", None,
            QuantizationAwareTraining())  # fmt: skip
    refused("there are two PostTrainingQuantization callbacks", None, quantization(network="model"))
    for method in ("static", "float16"):
        _, module = fit(quantization(method=method, save=False))
        before = {n: v.clone() for n, v in module.state_dict().items() if torch.is_tensor(v)}
        refused("quantizes float networks, and 'model' is quantized already", module=module)
        now = module.state_dict()
        assert all(torch.equal(v, now[n]) for n, v in before.items())


def test_training_data_that_are_empty():
    refused("the training data has no batch", limit_train_batches=0)


def test_batches_that_do_not_run():
    x, y = loader().dataset.tensors
    wide = DataLoader(TensorDataset(x.repeat(1, 3, 1, 1), y), batch_size=8)
    refused("a step of Scored on a training batch raised RuntimeError", data=wide,
            validation=None)  # fmt: skip


def test_activations_that_are_nan():
    x, y = (t.clone() for t in loader().dataset.tensors)
    x[9, 0, 0, 0] = torch.nan
    module = Scored()
    before = Scored()
    before.load_state_dict(module.state_dict())
    refused("activation 'input:0': ", module=module, error=ValueError,
            data=DataLoader(TensorDataset(x, y), batch_size=8))  # fmt: skip
    assert same_weights(module, before)
    assert not quantization_records(module)


def test_patterns_that_match_nothing():
    refused(
        "ignored_layers holds the pattern 'head'",
        quantization(ignored_layers=["head"]),
        error=ValueError,
    )
    refused("no module of Scored", quantization(network="net"), error=ValueError)


def test_corrections_that_would_undo_clusters():
    callback = quantization(corrections=["adaround"])
    refused("'adaround' gives the weights of a layer values of their own, and those of '0.weight'",
            callback, WeightClustering(4, begin=0), max_epochs=1)  # fmt: skip


def test_callbacks_in_another_order():
    run = trainer(max_epochs=1, callbacks=[quantization(), MagnitudeSparsity(0.5)])
    with pytest.raises(MisconfigurationException, match="MagnitudeSparsity comes after PostTrain"):
        run.fit(Scored(), loader())


def test_a_compiled_module():
    module = Scored()
    module.model = torch.compile(module.model, backend="eager")
    refused("Scored is compiled by torch.compile", module=module)


def test_strategies_that_shard_or_spawn(monkeypatch):
    spawning = trainer(strategy="ddp_spawn", devices=2)
    with pytest.raises(MisconfigurationException, match="spawns its processes .* strategy='ddp'"):
        quantization().setup(spawning, Scored(), "fit")
    whole = trainer()
    place = "lit_compress.callbacks.lightning.requirements.FSDPStrategy"
    monkeypatch.setattr(place, type(whole.strategy))
    with pytest.raises(MisconfigurationException, match="shards them; use strategy='ddp'"):
        quantization().setup(whole, Scored(), "fit")
