"""What a run with channels to cut leaves as it was: data, random numbers, the module itself."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lit_compress import ChannelPenalty, Schedule
from tests.callbacks.channel_fits import WIDTHS, fit, pruning, shuffled, widths
from tests.callbacks.nets import Net, loader, same_weights

ROUNDS = Schedule("linear", begin=2, end=10, update_every=4)


class DropoutNet(Net):
    def __init__(self):
        super().__init__()
        self.model.insert(8, nn.Dropout(0.5))


KEEP_ALL = {
    "plain": {},
    "taylor": {"importance": "taylor"},
    "apoz": {"importance": "apoz"},
    "everything": {"importance": "apoz", "reconstruct": True, "recalibrate_batch_norm": True},
    "penalty": {"penalty": ChannelPenalty(1.0)},
    "target": {"target_macs_ratio": 1.0, "allocation": "global"},
}


@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 0) for name in KEEP_ALL), ("plain", 2), ("taylor", 2)]
)
def test_a_run_that_loses_no_channel_is_the_run_without(name, workers):
    arguments = dict(KEEP_ALL[name])
    ratio = None if "target_macs_ratio" in arguments else 0.0

    def run(*callbacks):
        pl.seed_everything(1, verbose=False)
        data = shuffled(workers, persistent_workers=bool(workers))
        module = fit(*callbacks, module=DropoutNet(), data=data)
        return module, torch.rand(3)

    plain, numbers = run()
    kept, others = run(pruning(ratio, schedule=ROUNDS, **arguments))
    assert same_weights(plain, kept)
    assert torch.equal(numbers, others)
    assert vars(plain).keys() >= {k for k in vars(kept) if not k.startswith("on_")}


def test_the_loaders_own_generator_is_not_drawn_from():
    def run(*callbacks):
        generator = torch.Generator().manual_seed(5)
        module = fit(*callbacks, data=shuffled(generator=generator))
        return module, generator.get_state()

    (plain, state), (kept, other) = run(), run(pruning(0.0, at=3, importance="taylor"))
    assert same_weights(plain, kept)
    assert torch.equal(state, other)


def test_streams_are_read_from_their_beginning():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(loader().dataset)

    seen = {}

    class Look(pl.Callback):
        def __init__(self, name):
            self.seen = seen.setdefault(name, [])

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append(batch[0].sum())

    fit(Look("plain"), data=DataLoader(Stream(), 8))
    fit(pruning(at=3, importance="taylor"), Look("cut"), data=DataLoader(Stream(), 8))
    assert seen["plain"] == seen["cut"]
    assert len(seen["cut"]) == 16


def test_the_modules_own_attributes_are_as_before():
    module = Net()
    names = set(vars(module))
    fit(pruning(at=3, importance="taylor"), module=module)
    assert set(vars(module)) - names <= {"on_save_checkpoint", "on_load_checkpoint"}
    assert not any(layer._forward_hooks for layer in module.modules())
    assert widths(module) != WIDTHS
