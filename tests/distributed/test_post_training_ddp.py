"""Quantization after training in two gloo processes; this file is also the script they run."""

import sys
from pathlib import Path

import torch

from lit_compress import load_compressed
from lit_compress.callbacks.quantization.post_training_quantization import PostTrainingQuantization
from tests.callbacks.nets import Net, loader, trainer
from tests.distributed.launch import report, run_in_two_processes

METHODS = ["static", "fixed_point", "float16"]
CHECKS = [f"{m}: {what}" for m in METHODS for what in ("one network", "one report", "file", "mean")]


def quantized(folder, method):
    """Whether both processes hold the same network and metrics, and the file is that network."""
    torch.manual_seed(1)
    module = Net()
    callback = PostTrainingQuantization(method, num_calibration_batches=2, dirpath=folder / method)
    run = trainer(strategy="ddp", devices=2, max_epochs=1, callbacks=[callback])
    run.fit(module, loader(), loader(32))
    output = module.eval()(next(iter(loader(16, 16)))[0]).detach()
    alike = bool(run.strategy.all_gather(output).std(0, correction=0).eq(0).all())
    metrics = torch.tensor([*callback.result.metrics_before.values(),
                            *callback.result.metrics_after.values()])  # fmt: skip
    same_metrics = bool(run.strategy.all_gather(metrics).std(0, correction=0).eq(0).all())
    again = load_compressed(callback.result.checkpoint, Net())
    loaded = torch.equal(again.eval()(next(iter(loader(16, 16)))[0]), output)
    # Without sync_dist each process logs the loss of its own half; the report has their mean.
    run.validate(module, loader(32), verbose=False)
    halves = run.strategy.all_gather(run.callback_metrics["val_loss"])
    mean = torch.isclose(halves.mean(), metrics[1], rtol=1e-5)
    return alike, same_metrics and len(metrics) == 2, loaded, bool(mean)


def main(folder: Path) -> None:
    found = [check for method in METHODS for check in quantized(folder, method)]
    report(folder, dict(zip(CHECKS, found, strict=True)))


def test_both_processes_end_with_the_network_of_the_first(tmp_path):
    for text in run_in_two_processes(__file__, tmp_path):
        assert text == str(dict.fromkeys(CHECKS, True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
