"""Evaluations in memory give the numbers of Trainer.validate, and touch nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lit_compress.callbacks.lightning.resident_validation import (
    ResidentValidation,
    record_validation,
    with_network,
)
from tests.callbacks.nets import Net, loader, same_weights, trainer


class Logging(Net):
    """Logs in every way that an epoch's value can be logged in."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.seen = []
        self.hooks = []

    def val_dataloader(self):
        return loader(20)  # the last batch is smaller

    def on_validation_epoch_start(self):
        self.hooks.append("start")

    def on_validation_batch_start(self, batch, batch_idx):
        self.hooks.append(batch_idx)

    def validation_step(self, batch):
        x, y = batch
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"low": loss, "weighted": loss}, reduce_fx="min")
        self.log("high", loss, reduce_fx=torch.max)
        self.log("count", len(y), reduce_fx="sum")
        self.log("plain", loss, batch_size=1)
        self.log("accuracy", self.accuracy)
        self.log("only_steps", loss, on_step=True, on_epoch=False)
        self.seen.append(float(loss))
        return logits

    def on_validation_epoch_end(self):
        assert self.trainer.validating
        self.log("spread", max(self.seen) - min(self.seen))
        self.seen.clear()


class Whole(Logging):
    """Its layers are its own, so that the module is the network."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class TwoLoaders(Net):
    def val_dataloader(self):
        return [loader(16), loader(24)]

    def validation_step(self, batch, batch_idx, dataloader_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        self.log(f"own{dataloader_idx}", loss + batch_idx, add_dataloader_idx=False)


def resident(module, network=None):
    runner = trainer()
    batches, dense = record_validation(runner, module)
    return ResidentValidation(module, network or module.model, batches, runner), dense


@pytest.mark.parametrize("kind", [Logging, Whole, TwoLoaders])
def test_numbers_are_those_of_lightning(kind):
    torch.manual_seed(0)
    module = kind()
    network = module if kind is Whole else module.model
    validation, dense = resident(module, network)
    assert set(dense) >= {"loss"} or "loss/dataloader_idx_1" in dense
    for _ in range(2):  # and again
        assert validation(copy.deepcopy(network)) == pytest.approx(dense)


def test_another_network_gives_its_own_numbers():
    torch.manual_seed(0)
    module, other = Logging(), Logging()
    validation, dense = resident(module)
    _, expected = resident(other)
    assert validation(other.model) == pytest.approx(expected)
    assert validation(module.model) == pytest.approx(dense)
    assert dense["loss"] != pytest.approx(expected["loss"])


def test_an_evaluation_leaves_module_network_trainer_and_random_numbers_alone():
    torch.manual_seed(0)
    module = Logging()
    validation, _ = resident(module)
    hooks, before, network = list(module.hooks), copy.deepcopy(module), copy.deepcopy(module.model)
    network[1].eval()
    modes = [part.training for part in network.modules()]
    assert set(modes) == {True, False}
    stage = validation._trainer.state.stage
    random = torch.get_rng_state()
    validation(network)
    assert [part.training for part in network.modules()] == modes
    assert same_weights(module, before)
    assert same_weights(network, before.model)
    assert module.hooks == hooks
    assert "log" not in vars(module)
    assert validation._trainer.state.stage == stage
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("kind", [Logging, Whole])
def test_a_network_that_was_evaluated_can_be_trained(kind):
    """Batch norm must see the modes and tensors that training needs."""
    torch.manual_seed(0)
    module = kind()
    network = module if kind is Whole else module.model
    validation, _ = resident(module, network)
    evaluated, fresh = copy.deepcopy(network), copy.deepcopy(network)
    validation(evaluated)
    losses = []
    for part in (evaluated, fresh):
        torch.manual_seed(1)
        trainer(max_steps=6, limit_val_batches=0).fit(validation.module_with(part), loader())
        losses.append(validation(part)["loss"])
    assert same_weights(evaluated, fresh)
    assert losses[0] == losses[1] != pytest.approx(validation(network)["loss"])


def test_batches_are_loaded_once():
    class Counted(TensorDataset):
        loads = 0

        def __getitem__(self, index):
            Counted.loads += 1
            return super().__getitem__(index)

    module = Net()
    data = Counted(torch.randn(12, 1, 6, 6), torch.randint(0, 4, (12,)))
    module.val_dataloader = lambda: DataLoader(data, batch_size=4)
    validation, _ = resident(module)
    assert Counted.loads == 12
    validation(module.model)
    assert Counted.loads == 12


def test_random_validation_uses_the_same_numbers_each_time():
    class Random(Net):
        def val_dataloader(self):
            return loader(16)

        def validation_step(self, batch, batch_idx):
            self.log("noise", torch.rand(()))

    module = Random()
    validation, _ = resident(module)
    assert validation(module.model) == validation(module.model)


def test_other_references_follow_to_the_other_network():
    module = Net()
    module.head = module.model[8]
    module.name_of = {"first": module.model[0]}
    other = copy.deepcopy(module.model)
    copied = with_network(module, module.model, other)
    assert copied is not module
    assert copied.model is other
    assert copied.head is other[8]
    assert copied.name_of["first"] is other[0]
    assert module.head is module.model[8]


def test_nothing_to_validate_on_is_refused():
    module = Net()
    with pytest.raises(ValueError, match="the validation data are empty; expected at least one"):
        ResidentValidation(module, module.model, [], trainer())
