"""Quantization-aware training in two gloo processes; also the script that they run."""

import sys
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.callbacks.channel_fits import pruning
from tests.callbacks.nets import Net, loader, trainer
from tests.callbacks.quantized_fits import Steps, integers, qat, quantizers, same_state
from tests.distributed.launch import report, run_in_two_processes

CHECKS = ["observed", "both are seen", "learned", "trained", "resume", "cut"]


class Louder(pl.Callback):
    """Gives the second process images of ten times the size."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1:
            batch[0].mul_(10)


def fit(*callbacks, ckpt_path=None, **kwargs):
    torch.manual_seed(1)
    module = Net()
    options = {"strategy": "ddp", "devices": 2, "max_epochs": 2, "callbacks": list(callbacks)}
    runner = trainer(**(options | kwargs))
    runner.fit(module, loader(), ckpt_path=ckpt_path)
    return module, runner.strategy


def state(module):
    values = [*module.parameters(), *quantizers(module).buffers()]
    return torch.cat([v.detach().double().view(-1) for v in values])


def agree(strategy, module):
    first, second = strategy.all_gather(state(module))
    return torch.equal(first, second)


def highs(module):
    return torch.stack([q.high for q in quantizers(module).activations.values()])


def learned(folder):
    """Whether ranks agree on scales that were trained, and a resumed run is bit-identical."""

    def callback():
        return qat(4, ranges="learned", begin=3)

    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    steps = Steps(lambda m: quantizers(m).weight("4.weight").scale.detach().clone())
    whole, strategy = fit(callback(), steps, save, enable_checkpointing=True)
    # They are fitted once more at step 3, and trained from the next step on.
    moved = [not torch.equal(a, b) for a, b in pairwise(steps.seen)]
    resumed, _ = fit(callback(), ckpt_path=folder / "step=4.ckpt")
    exact = same_state(whole, resumed)
    return agree(strategy, whole), moved == [False, *[True] * 6], exact


def main(folder: Path) -> None:
    plain, strategy = fit(qat(4, begin=2), Louder())
    alone, _ = fit(qat(4, begin=2))
    seen = bool((highs(plain) > highs(alone))[0])
    ranks_agree, trained, resume = learned(folder)
    slim, slim_strategy = fit(pruning(0.5, at=2), qat(4, ranges="learned", begin=4))
    reached = int(integers(slim, "4.weight").abs().max())
    cut = len(slim.model[0].weight) == 4 and reached == 7 and agree(slim_strategy, slim)
    found = [agree(strategy, plain), seen, ranks_agree, trained, resume, cut]
    report(folder, dict(zip(CHECKS, found, strict=True)))


def test_processes_agree_on_ranges_and_scales(tmp_path):
    for text in run_in_two_processes(__file__, tmp_path):
        assert text == str(dict.fromkeys(CHECKS, True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
