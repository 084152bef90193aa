"""Clustering in two gloo processes; this file is also the script that they run."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lit_compress.callbacks.magnitude_sparsity import MagnitudeSparsity
from lit_compress.callbacks.weight_clustering import WeightClustering
from lit_compress.compress.schedules import Schedule
from tests.callbacks.nets import Net, loader, trainer, zeros
from tests.distributed.launch import report, run_in_two_processes

NAMES = ["model.0.weight", "model.4.weight", "model.8.weight"]
CHECKS = ["few values", "zeros", "ranks agree", "rank 0 decides", "resume"]


class Disturb(pl.Callback):
    """Gives the second process other weights before they are clustered."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 4 and trainer.global_rank == 1:
            pl_module.model[8].weight.data.copy_(torch.randn(4, 64))


class Look(pl.Callback):
    """The weights when they have just been clustered."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 4:
            self.seen = weights(pl_module)


def fit(*callbacks, ckpt_path=None, **kwargs):
    torch.manual_seed(1)
    module = Net()
    options = {"strategy": "ddp", "devices": 2, "max_epochs": 2, "callbacks": list(callbacks)}
    runner = trainer(**(options | kwargs))
    runner.fit(module, loader(), ckpt_path=ckpt_path)
    return module, runner.strategy


def weights(module):
    return torch.cat([module.get_parameter(name).detach().view(-1) for name in NAMES])


def agree(strategy, values):
    first, second = strategy.all_gather(values)
    return torch.equal(first, second)


def main(folder: Path) -> None:
    def callbacks():
        sparsity = MagnitudeSparsity(0.5, schedule=Schedule(begin=0, end=2, update_every=1))
        return [sparsity, WeightClustering(6, begin=4), EMAWeightAveraging(decay=0.8)]

    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    whole, strategy = fit(*callbacks(), save, enable_checkpointing=True)
    few = max(len(torch.unique(whole.get_parameter(name))) for name in NAMES) <= 6
    sparse = zeros(whole, NAMES) == 228
    same = agree(strategy, weights(whole))
    resumed, _ = fit(*callbacks(), ckpt_path=folder / "step=4.ckpt")
    resume = torch.equal(weights(whole), weights(resumed))

    ours, undisturbed = Look(), Look()
    _, strategy = fit(Disturb(), WeightClustering(6, begin=4), ours)
    fit(WeightClustering(6, begin=4), undisturbed)
    decides = agree(strategy, ours.seen) and torch.equal(ours.seen, undisturbed.seen)
    found = [few, sparse, same, decides, resume]
    report(folder, dict(zip(CHECKS, found, strict=True)))


def test_one_process_decides_and_both_follow(tmp_path):
    for text in run_in_two_processes(__file__, tmp_path):
        assert text == str(dict.fromkeys(CHECKS, True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
