"""Channels cut in two gloo processes; this file is also the script that they run."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from lit_compress import ChannelPenalty, MagnitudeSparsity, Schedule
from tests.callbacks.channel_fits import HALF, pruning, widths
from tests.callbacks.nets import Net, loader, same_weights, trainer
from tests.distributed.launch import report, run_in_two_processes

ROUNDS = Schedule("linear", begin=1, end=5, update_every=2)  # at 3 and at 5 of 8 steps
CHECKS = [
    "plain",
    "taylor",
    "penalty",
    "views",
    "unused parameters",
    "static graph",
    "gradients are reduced",
    "rank 0 decides",
    "as one process",
    "sparse",
    "resume",
]


class Narrow(Net):
    """Without batch norm, whose statistics are each process's own."""

    def __init__(self):
        super().__init__()
        self.model[1] = nn.Identity()


class Unused(Narrow):
    """With a layer that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3)


class Disturb(pl.Callback):
    """Gives the second process other weights, and so other scores, before a cut."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            pl_module.model[4].weight.data.neg_().add_(torch.randn(16, 8, 1, 1))


class Gradients(pl.Callback):
    """Whether the gradients of each step are the same everywhere, from batches that are not."""

    def __init__(self):
        self.same, self.wrapped = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batches = trainer.strategy.all_gather(batch[0])
        assert not torch.equal(batches[0], batches[1])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.wrapped.append(isinstance(trainer.strategy.model, DistributedDataParallel))
        for parameter in pl_module.parameters():
            gathered = trainer.strategy.all_gather(parameter.grad)
            self.same.append(torch.equal(gathered[0], gathered[1]))


def fit(*callbacks, kind=Narrow, strategy="ddp", data=None, ckpt_path=None, **kwargs):
    pl.seed_everything(1, verbose=False)
    module = kind()
    options = {"strategy": strategy, "devices": 2, "max_epochs": 2, "callbacks": list(callbacks)}
    runner = trainer(**(options | kwargs))
    runner.fit(module, data or loader(), ckpt_path=ckpt_path)
    return module, runner


def agree(module, runner):
    """Whether both processes have the same slim weights."""
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])
    gathered = runner.strategy.all_gather(flat)
    return widths_of(module) == HALF and torch.equal(gathered[0], gathered[1])


def widths_of(module):
    if isinstance(module.model[1], nn.Identity):
        first, second = module.model[0], module.model[4]
        return {"0": first.out_channels, "4": second.out_channels}
    return widths(module)


def as_one_process():
    """Two processes with half of each batch do what one does with all of it."""
    own = Subset(loader().dataset, range(int(os.environ["RANK"]), 64, 2))
    halves, _ = fit(
        pruning(schedule=ROUNDS),
        data=DataLoader(own, 8),
        use_distributed_sampler=False,
    )
    pl.seed_everything(1, verbose=False)
    whole = Narrow()
    single = pl.strategies.SingleDeviceStrategy(device="cpu")
    run = trainer(callbacks=[pruning(schedule=ROUNDS)], max_epochs=2, strategy=single)
    run.fit(whole, loader(64, 16))
    values = zip(halves.parameters(), whole.parameters(), strict=True)
    return all(torch.allclose(a, b, atol=1e-5) for a, b in values)


def resume(folder):
    def callbacks():
        return [pruning(schedule=ROUNDS, importance="taylor")]

    save = ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1)
    whole, _ = fit(*callbacks(), save, enable_checkpointing=True)
    resumed, runner = fit(*callbacks(), ckpt_path=folder / "step=4.ckpt")
    return same_weights(whole, resumed) and agree(resumed, runner)


def rank_zero_decides():
    """DDP makes weights equal in any case; momentum is equal only where the same channels stay."""
    disturbed, runner = fit(pruning({"4": 0.5}, at=3), Disturb(), max_steps=3)
    momentum = runner.optimizers[0].state[disturbed.model[4].bias]["momentum_buffer"]
    both = runner.strategy.all_gather(momentum)
    return both.shape == (2, 8) and torch.equal(both[0], both[1])


def main(folder: Path) -> None:
    watch = Gradients()
    static = pl.strategies.DDPStrategy(static_graph=True)
    views = pl.strategies.DDPStrategy(gradient_as_bucket_view=True)
    penalty = ChannelPenalty(0.5)
    sparsity = MagnitudeSparsity(0.5, schedule=Schedule(begin=1, end=7, update_every=1))
    sparse = fit(sparsity, pruning(schedule=ROUNDS))
    found = [
        agree(*fit(pruning(schedule=ROUNDS), kind=Net)),
        agree(*fit(pruning(schedule=ROUNDS, importance="taylor", reconstruct=True))),
        agree(*fit(pruning(schedule=ROUNDS, penalty=penalty), accumulate_grad_batches=1)),
        agree(*fit(pruning(schedule=ROUNDS), strategy=views)),
        agree(
            *fit(pruning(schedule=ROUNDS), kind=Unused, strategy="ddp_find_unused_parameters_true")
        ),
        agree(*fit(pruning(schedule=ROUNDS), strategy=static)),
        agree(*fit(pruning(schedule=ROUNDS), watch)) and all(watch.same) and all(watch.wrapped),
        rank_zero_decides(),
        as_one_process(),
        agree(*sparse) and sparsity.sparsity == 0.5,
        resume(folder),
    ]
    report(folder, dict(zip(CHECKS, found, strict=True)))


def test_both_processes_cut_the_same_and_go_on_together(tmp_path):
    for text in run_in_two_processes(__file__, tmp_path):
        assert text == str(dict.fromkeys(CHECKS, True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
