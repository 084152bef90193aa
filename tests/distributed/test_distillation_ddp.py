"""Distillation in two gloo processes; this file is also the script that they run."""

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_compress.callbacks.distillation.distillation import Distillation
from lit_compress.compress.distillation import soft_target_kl
from tests.callbacks.nets import ManualNet, Net, loader, same_weights, trainer
from tests.distributed.launch import report, run_in_two_processes


class NetByHand(Net):
    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        with torch.no_grad():
            target = self.teachers[0](x)
        return torch.nn.functional.cross_entropy(logits, y) + soft_target_kl(logits, target, 4.0)


class ManualByHand(ManualNet):
    def training_step(self, batch, batch_idx):
        loss = NetByHand.training_step(self, batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


class CalledWhole(Net):
    """Without a child that holds everything: distilled through its own forward."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.model(x) + self.bias


class CalledWholeByHand(NetByHand, CalledWhole):
    pass


def seeded(kind, seed=1):
    torch.manual_seed(seed)
    return kind()


def fit(module, *callbacks, ckpt_path=None, **kwargs):
    torch.manual_seed(2)
    options = {"strategy": "ddp", "devices": 2, "max_epochs": 2, "callbacks": list(callbacks)}
    trainer(**(options | kwargs)).fit(module, loader(), ckpt_path=ckpt_path)
    return module


def trains_as_by_hand(kind, by_hand, **kwargs):
    teacher = seeded(kind, seed=7)
    expected = seeded(by_hand)
    expected.teachers = [seeded(kind, seed=7).eval().requires_grad_(False)]
    fit(expected, **kwargs)
    whole = kind is CalledWhole
    module = fit(seeded(kind), Distillation(teacher if whole else teacher.model), **kwargs)
    return same_weights(module, expected)


def snapshot_agrees_and_resumes(folder: Path):
    def run(name, ckpt_path=None):
        callback = Distillation(begin=3)
        keeper = ModelCheckpoint(folder / name, filename="{epoch}", save_top_k=-1)
        kwargs = {"enable_checkpointing": True, "ckpt_path": ckpt_path}
        module = fit(seeded(Net), callback, keeper, **kwargs)
        return module, callback

    whole, callback = run("whole")
    resumed, restored = run("resumed", folder / "whole" / "epoch=0.ckpt")
    files = list(folder.glob("*/distillation-teacher-*.pt"))
    teachers = [c._teachers[0].network for c in (callback, restored)]
    # Running statistics differ between processes; in the snapshot those of rank 0 count.
    assert {file.name for file in files} == {callback._snapshot.name}
    assert len(files) == 2
    same = zip(params(whole), params(resumed), strict=True)
    return same_weights(*teachers) and all(torch.equal(a, b) for a, b in same)


def params(module):
    return list(module.parameters())


def main(folder: Path) -> None:
    results = {
        "automatic": trains_as_by_hand(Net, NetByHand),
        "accumulation": trains_as_by_hand(Net, NetByHand, accumulate_grad_batches=2),
        "manual": trains_as_by_hand(ManualNet, ManualByHand),
        "own forward": trains_as_by_hand(CalledWhole, CalledWholeByHand),
        "snapshot": snapshot_agrees_and_resumes(folder),
    }
    alone, distilled = fit(seeded(Net)), fit(seeded(Net), Distillation())
    results["has an effect"] = not same_weights(alone, distilled)
    report(folder, results)


def test_two_processes_train_as_if_the_loss_were_written_by_hand(tmp_path):
    found = run_in_two_processes(__file__, tmp_path)
    names = ["automatic", "accumulation", "manual", "own forward", "snapshot", "has an effect"]
    assert found == [str(dict.fromkeys(names, True))] * 2


if __name__ == "__main__":
    main(Path(sys.argv[1]))
