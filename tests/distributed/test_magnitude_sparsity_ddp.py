"""Sparsity in two gloo processes; this file is also the script that they run."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lit_compress import CompressionSummary, MagnitudeSparsity, Schedule
from tests.callbacks.nets import Net, loader, same_weights, trainer
from tests.distributed.launch import report, run_in_two_processes

WEIGHTS = 72 + 128 + 256
CHECKS = ["target", "report", "clipping", "ranks agree", "rank 0 decides", "average", "resume"]


class Disturb(pl.Callback):
    """Gives the second process other weights before the masks are chosen."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            pl_module.model[8].weight.data.copy_(torch.randn(4, 64))


def fit(*callbacks, ckpt_path=None, **kwargs):
    torch.manual_seed(1)
    module = Net()
    options = {"strategy": "ddp", "devices": 2, "max_epochs": 2, "callbacks": list(callbacks)}
    runner = trainer(**(options | kwargs))
    runner.fit(module, loader(), ckpt_path=ckpt_path)
    return module, runner.strategy


def masks(module):
    return [module.get_parameter(f"model.{i}.weight") != 0 for i in (0, 4, 8)]


def zeros(module):
    return sum(int((~mask).sum()) for mask in masks(module))


def agreement():
    """Whether both processes hold the same masks, and whether they are rank 0's own choice."""
    at_once = Schedule("constant", begin=4, end=4)
    module, strategy = fit(MagnitudeSparsity(0.77, schedule=at_once), Disturb())
    found = torch.cat([mask.view(-1) for mask in masks(module)])
    agree = bool(strategy.all_gather(found).float().std(0, correction=0).eq(0).all())
    undisturbed, _ = fit(MagnitudeSparsity(0.77, schedule=at_once))
    expected = torch.cat([mask.view(-1) for mask in masks(undisturbed)])
    # The disturbed process also spoils the gradients of the one step before the masks are chosen.
    return agree, float((found == expected).float().mean()) > 0.95


def average_and_resume(folder):
    """Whether the average is sparse and a resumed run bit-identical, in each process."""

    def callbacks():
        return [EMAWeightAveraging(decay=0.8), MagnitudeSparsity(0.77, schedule=Schedule(end=1.0))]

    save = ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1)
    whole, _ = fit(*callbacks(), save, enable_checkpointing=True)
    resumed, _ = fit(*callbacks(), ckpt_path=folder / "step=4.ckpt")
    parameters = zip(whole.parameters(), resumed.parameters(), strict=True)
    return zeros(whole) == round(0.77 * WEIGHTS), all(torch.equal(a, b) for a, b in parameters)


def main(folder: Path) -> None:
    summary = CompressionSummary(folder, latency=False, plots=False)
    plain, strategy = fit(MagnitudeSparsity(0.5), summary)
    written = summary.report is not None and summary.report.compressed.macs
    clipped, _ = fit(MagnitudeSparsity(0.5), gradient_clip_val=0.1)
    agree, decides = agreement()
    average, resume = average_and_resume(folder)
    target = zeros(plain) == WEIGHTS // 2
    clipping = zeros(clipped) == WEIGHTS // 2 and not same_weights(plain, clipped)
    reported = bool(written) == strategy.is_global_zero
    found = [target, reported, clipping, agree, decides, average, resume]
    report(folder, dict(zip(CHECKS, found, strict=True)))


def test_one_process_decides_and_both_follow(tmp_path):
    for text in run_in_two_processes(__file__, tmp_path):
        assert text == str(dict.fromkeys(CHECKS, True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
