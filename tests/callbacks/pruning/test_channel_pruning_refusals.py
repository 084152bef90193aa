"""What cannot work is refused before anything is trained, with a way to fix it."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lit_compress import ChannelPenalty, ChannelPlan, ChannelPruning, Schedule
from lit_compress.compress.schedules import Ramp
from tests.callbacks.channel_fits import WideNet, fit, pruning
from tests.callbacks.nets import ManualNet, Net, loader, trainer


class NoSteps(pl.Callback):
    """Fails where a step was made."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise AssertionError("training has begun")


def refused(error, message, *callbacks, **settings):
    with pytest.raises(error, match=message):
        fit(NoSteps(), *callbacks, **settings)


class Plain(pl.LightningModule):
    """Around a network that a test gives."""

    def __init__(self, network, called=True):
        super().__init__()
        self.model, self.called = network, called

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x = self(batch[0]) if self.called else next(self.parameters())
        return x.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_network_without_channels_to_cut():
    module = Plain(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))
    message = (
        r"Sequential has no channels that can be cut: 0 groups.*\n  1: reaches the model's out"
    )
    refused(ValueError, message, pruning(), module=module)
    message = "has no channels that can be cut: .*matches ignored_layers"
    refused(ValueError, f"(?s){message}", pruning(ignored_layers=["*"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"target_macs_ratio": 0.001},
            "the target is 264.* the lowest cost that can be reached is .* raise the target",
        ),
        ({"target_params_ratio": 0.001}, "the lowest cost that can be reached is"),
        ({"target_size_bytes": 10}, "the lowest cost that can be reached is"),
        (
            {"target_size_bytes": 10**9},
            "the target is 1.* and the dense model costs 37016; expected",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_targets_out_of_reach(arguments, message, allocation):
    callback = ChannelPruning(allocation=allocation, **arguments)
    refused(ValueError, message, callback, module=WideNet)


def test_plans_for_another_model():
    other = ChannelPlan({"0": 4, "7": 4}, {"0": 8, "7": 8})
    refused(
        ValueError, "the plan has a group '7' and the model has none", pruning(None, plan=other)
    )
    wider = ChannelPlan({"0": 4}, {"0": 32})
    message = "the plan is for 32 channels in group '0' and the model has 8"
    refused(ValueError, message, pruning(None, plan=wider))


def test_damaged_plans(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    message = "plan.json cannot be read as a channel plan"
    refused(ValueError, message, pruning(None, plan=tmp_path / "plan.json"))


def test_names_that_match_nothing():
    message = "'conv9', which matches none of the 2 layers .* the nearest names are '0', '4'"
    refused(ValueError, message, pruning({"conv9": 0.5}))
    message = "ignored_layers holds the pattern 'conv9', which matches none"
    refused(ValueError, message, pruning(ignored_layers=["conv9"]))
    message = "lists 3 ratios and the model has 2 groups; give one for each of 0, 4"
    refused(ValueError, message, pruning([0.1, 0.2, 0.3]))


class Failing(Net):
    def forward(self, x):
        raise RuntimeError("out of order")


def test_modules_that_do_not_run_on_a_training_batch():
    message = "a step of Failing on a training batch raised RuntimeError: out of order. It was run"
    refused(MisconfigurationException, message, pruning(), module=Failing)
    message = "its training and validation steps do not call forward. Set example_input_array"
    module = Plain(Net().model, called=False)
    refused(MisconfigurationException, message, pruning(), module=module)
    module.example_input_array = torch.zeros(2, 1, 6, 6)
    callback = pruning(at=99)
    fit(callback, module=module, max_steps=1)
    assert callback.kept == {"0": 8, "4": 16}


def test_manual_optimization_without_gradients_to_look_at():
    message = "under manual optimization training_step .*choose an importance other than 'taylor'"
    refused(MisconfigurationException, message, pruning(importance="taylor"), module=ManualNet)


class EmptyStream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    "data", [DataLoader([]), [], DataLoader(EmptyStream())], ids=["loader", "list", "stream"]
)
def test_no_batch(data):
    message = "the training data has no batch, and at least one is needed"
    refused(MisconfigurationException, message, pruning(), data=data)


def test_no_batch_that_is_wanted():
    message = "the training data has no batch, and at least one is needed"
    refused(MisconfigurationException, message, pruning(), limit_train_batches=0)


def test_no_more_batches_are_looked_at_than_wanted():
    class Counted:
        def __iter__(self):
            for batch in loader():
                seen.append(batch)
                yield batch

    seen = []
    fit(data=Counted(), limit_train_batches=2, max_epochs=1)
    alone = len(seen)
    fit(pruning(at=1), data=Counted(), limit_train_batches=2, max_epochs=1)
    assert len(seen) == 2 * alone + 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter(loader().dataset)


def test_runs_of_unknown_length():
    stream = DataLoader(Stream(), 8)
    message = r"ChannelPruning: begin is 0\.5, a fraction of the run, .* no known length"
    callback = pruning(schedule=Schedule("constant", begin=0.5, end=8, update_every=1))
    refused(MisconfigurationException, message, callback, data=stream)
    callback = pruning(at=3, penalty=ChannelPenalty(0.1, begin=0.5))
    message = r"penalty\.begin is 0\.5, a fraction .* Set max_epochs or"
    refused(MisconfigurationException, message, callback, data=stream)
    fit(pruning(at=3, penalty=ChannelPenalty(0.1, begin=1)), data=stream)


def test_fractions_of_a_run_of_which_only_epochs_are_known_are_rounded_to_epochs(caplog):
    callback = pruning(
        schedule=Schedule("linear", begin=0.0, end=0.5, update_every=0.25),
        penalty=ChannelPenalty(0.1, begin=0.0),
    )
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        module = fit(callback, data=DataLoader(Stream(), 8))
    assert callback.ramp == Ramp("linear", 0, 1, 1, "epoch")  # of 2 epochs
    assert "the length of an epoch is not known, so fractions of the run are rounded" in caplog.text
    assert module.model[4].out_channels == 8


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_parameters(strategy):
    run = SimpleNamespace(strategy=strategy.__new__(strategy))
    with pytest.raises(MisconfigurationException, match="ChannelPruning needs whole parameters"):
        pruning().setup(run, Net(), "fit")


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_strategies_that_spawn_processes(strategy):
    callback = pruning()
    run = trainer(callbacks=[callback], strategy=strategy, devices=2)
    with pytest.raises(MisconfigurationException, match="use strategy='ddp'"):
        callback.setup(run, Net(), "fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing was given to say how many channels are to go; give exactly one of"),
        ({"pruning_ratio": 0.5, "target_macs_ratio": 0.5}, "pruning_ratio and target_macs_ratio"),
        ({"pruning_ratio": 1.0}, "pruning_ratio is 1.0, expected a share of channels to remove"),
        ({"pruning_ratio": 50}, "For 50 % write 0.5"),
        ({"target_macs_ratio": 2.0}, "For half of it write target_macs_ratio=0.5"),
        ({"target_latency_ms": float("nan")}, "target_latency_ms is nan, expected a positive"),
        ({"pruning_ratio": 0.5, "importance": "size"}, "importance is 'size', expected a function"),
        ({"pruning_ratio": 0.5, "spread": "rows"}, "spread is 'rows', expected 'channels' or"),
        ({"pruning_ratio": 0.5, "round_to": 0}, "round_to is 0, expected a whole number from 1"),
        (
            {"pruning_ratio": 0.5, "num_calibration_batches": 0},
            "num_calibration_batches is 0, expected a whole number",
        ),
        ({"pruning_ratio": 0.5, "ignored_layers": "fc"}, r"give a list, as in \['fc'\]"),
        ({"pruning_ratio": 0.5, "allocation": "best"}, "expected 'uniform' or 'global'"),
        ({"pruning_ratio": [0.5], "allocation": "global"}, "give a single number or"),
        ({"plan": "gone.json"}, "plan is 'gone.json', and there is no such file"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChannelPruning(**arguments)


def test_the_callback_can_be_used_again_after_a_refusal():
    callback = pruning({"4": 0.5})
    refused(MisconfigurationException, "out of order", callback, module=Failing)
    module = fit(callback)
    assert module.model[4].out_channels == 8
    assert not callback.bindings
    assert callback._sample is None
