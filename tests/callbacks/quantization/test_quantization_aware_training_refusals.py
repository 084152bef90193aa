import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_compress import QuantizationAwareTraining
from lit_compress.compress.quantization.network import is_quantized
from tests.callbacks.channel_fits import fit
from tests.callbacks.nets import Net, loader, same_weights, trainer
from tests.callbacks.quantized_fits import qat


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 1}, "weight_bits is 1; expected a whole number of bits from 2 to 8"),
        ({"weight_bits": 9}, "weight_bits is 9"),
        ({"weight_bits": 4.0}, "weight_bits is 4.0"),
        ({"activation_bits": "8"}, "activation_bits is '8'"),
        ({"layer_bits": {"8": 16}}, r"layer_bits\['8'\] is 16"),
        ({"layer_bits": [4]}, r"layer_bits is \[4\]; give a mapping"),
        ({"ranges": "minmax"}, "ranges is 'minmax'; choose 'observed' or 'learned'"),
        ({"begin": -1}, "begin is -1, expected a number of steps"),
        ({"begin": None}, "begin is None"),
        ({"begin": 1.5}, "begin is 1.5"),
        ({"freeze_ranges": float("nan")}, "freeze_ranges is nan"),
        ({"freeze_batch_norm": "0.5"}, "freeze_batch_norm is '0.5'"),
        ({"unit": "batch"}, "unit is 'batch', expected 'step' or 'epoch'"),
        ({"weight_bits": 4, "initial_weight_bits": 3}, "initial_weight_bits is 3; expected"),
        ({"initial_weight_bits": 9}, "initial_weight_bits is 9"),
        ({"num_calibration_batches": 0}, "num_calibration_batches is 0"),
        ({"num_calibration_batches": 2.0}, "num_calibration_batches is 2.0"),
        ({"ignored_layers": "8"}, r"ignored_layers is the string '8'; give a list"),
        ({"quantize_first_layer": 1}, "quantize_first_layer is 1; give true or false"),
        ({"network": 3}, "network is 3; give its dotted name"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTraining(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ignored_layers": ["9"]}, "'9'"),
        ({"layer_bits": {"head": 4}}, "'head'"),
        ({"ignored_layers": ["*"]}, "no layer of Sequential can be quantized: 0: it is in ignored"),
        ({"network": "backbone"}, "'backbone' is no module of Net"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_network_is_refused_before_training(arguments, message):
    module = Net()
    before = copy.deepcopy(module)
    with pytest.raises(ValueError, match=message):
        fit(qat(**arguments), module=module)
    assert same_weights(before, module)
    assert not is_quantized(module.model)


def test_a_compiled_module_is_refused():
    runner = trainer(callbacks=[qat()])
    with pytest.raises(MisconfigurationException, match=r"torch\.compile has fixed .* uncompiled"):
        runner.fit(torch.compile(Net(), backend="eager"), loader())

    class Late(Net):
        def configure_model(self):
            self.model = torch.compile(self.model, backend="eager")

    with pytest.raises(MisconfigurationException, match=r"torch\.compile has fixed"):
        fit(qat(), module=Late)


def test_strategies_that_shard_or_spawn_are_refused(monkeypatch):
    spawning = trainer(strategy="ddp_spawn", devices=2)
    with pytest.raises(MisconfigurationException, match="spawns its processes .* strategy='ddp'"):
        qat().setup(spawning, Net(), "fit")
    runner = trainer()
    monkeypatch.setattr(
        type(runner), "strategy", property(lambda _: FSDPStrategy.__new__(FSDPStrategy))
    )
    with pytest.raises(MisconfigurationException, match="FSDPStrategy shards them; use strategy="):
        qat().setup(runner, Net(), "fit")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"begin": 0.5}, "begin"), ({"begin": 0, "freeze_ranges": 0.5}, "freeze_ranges")],
)
def test_fractions_of_an_endless_run_are_refused(arguments, name):
    with pytest.raises(MisconfigurationException, match=rf"{name} is 0\.5, a fraction of the run"):
        fit(qat(**arguments), max_epochs=-1, max_time="00:00:00:20")


def test_bits_that_have_no_time_to_go_are_refused():
    callback = qat(4, initial_weight_bits=8, begin=6, freeze_ranges=5)
    with pytest.raises(MisconfigurationException, match=r"from begin \(step 6\) to freeze_ranges"):
        fit(callback)


def test_one_network_is_not_quantized_twice():
    with pytest.raises(MisconfigurationException, match="two .* quantize the network 'model'"):
        fit(qat(), qat(network="model"))


def test_training_data_are_needed():
    with pytest.raises(MisconfigurationException, match="training data has no batch"):
        fit(qat(), data=DataLoader([]))


def test_a_nan_activation_is_named():
    images = torch.full((16, 1, 6, 6), float("nan"))
    data = DataLoader(TensorDataset(images, torch.zeros(16, dtype=torch.long)), 8)
    module = Net()
    before = copy.deepcopy(dict(module.named_parameters()))
    with pytest.raises(ValueError, match="activation .* NaN"):
        fit(qat(), module=module, data=data)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_a_nan_loss_stops_the_run_before_the_weights_change():
    class Diverges(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.trainer.global_step == 3:
                self.before = [p.detach().clone() for p in self.parameters()]
                loss = loss * torch.nan
            return loss

    module = Diverges()
    with pytest.raises(ValueError, match="the loss is NaN at step 3"):
        fit(qat(), module=module)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), module.before, strict=True))


def test_an_attribute_of_the_same_name_is_refused():
    class Taken(Net):
        def __init__(self):
            super().__init__()
            self.model.quantization = nn.Identity()

    with pytest.raises(ValueError, match="has an attribute 'quantization'"):
        fit(qat(), module=Taken)
