"""Channels that go while other callbacks compress the same module."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_compress import CompressionSummary, Distillation, MagnitudeSparsity, Schedule
from lit_compress.tasks import DigitsDataModule, ImageClassifier
from tests.callbacks.channel_fits import HALF, WIDTHS, fit, pruning, widths
from tests.callbacks.nets import Net, same_weights, trainer, zeros

ROUNDS = Schedule("linear", begin=2, end=10, update_every=4)


def weights_of(module):
    return [module.model[i].weight for i in (0, 4, 8)]


# --- Sparsity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["sparsity", "channels"])
@pytest.mark.parametrize("end", [6, 10, 15])
def test_the_slim_weights_are_exactly_sparse(first, end):
    sparsity = MagnitudeSparsity(0.6, schedule=Schedule(begin=1, end=end, update_every=2))
    order = [sparsity, pruning(schedule=ROUNDS)]
    module = fit(*(order if first == "sparsity" else reversed(order)))
    assert widths(module) == HALF
    weights = weights_of(module)
    found = sum(int((w == 0).sum()) for w in weights)
    total = sum(w.numel() for w in weights)
    assert sparsity.sparsity == pytest.approx(found / total)
    if end > 10:  # masks were chosen after the last cut
        assert found == round(0.6 * total)
    assert 0.3 * total < found < 0.8 * total


@pytest.mark.parametrize("first", ["sparsity", "channels"])
def test_masks_stay_with_their_weights(first):
    """What was removed before the cut and is left after it is still removed, and nothing else."""
    seen = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            masks = [w == 0 for w in weights_of(pl_module)]
            seen[trainer.global_step] = masks

    sparsity = MagnitudeSparsity(0.6, schedule=Schedule(begin=1, end=3, update_every=2))
    order = [sparsity, pruning(at=5)]
    fit(*(order if first == "sparsity" else reversed(order)), Look())
    assert seen[4][0].shape[0] == 8
    for step in range(6, 17):
        assert all(torch.equal(a, b) for a, b in zip(seen[5], seen[step], strict=True))
    rows = {tuple(row.flatten().tolist()) for row in seen[4][0]}
    assert {tuple(row.flatten().tolist()) for row in seen[5][0]} <= rows


# --- Distillation ---------------------------------------------------------------------------------


def teacher():
    torch.manual_seed(7)
    return Net().model.eval()


def test_a_given_teacher_teaches_before_and_after():
    plain = fit(pruning(schedule=ROUNDS))
    distillation = Distillation(teacher())
    taught = fit(distillation, pruning(schedule=ROUNDS))
    assert widths(taught) == HALF
    assert not same_weights(taught, plain)
    network = distillation._teachers[0].network
    assert widths(network) == WIDTHS
    assert same_weights(network, teacher())


@pytest.mark.parametrize("first", ["distillation", "channels"])
@pytest.mark.parametrize("at", [0, 5])
def test_a_snapshot_teacher_stays_dense(first, at):
    distillation = Distillation()
    order = [distillation, pruning(at=at)]
    module = fit(*(order if first == "distillation" else reversed(order)))
    pl.seed_everything(1, verbose=False)
    assert widths(module) == HALF
    assert same_weights(distillation._teachers[0].network, Net().model)


@pytest.mark.parametrize("begin", [0, 7])
def test_a_run_with_a_snapshot_teacher_resumes_before_and_after_the_cuts(begin, tmp_path):
    """With begin=7 the teacher is a snapshot of a network that lost channels already."""

    def callbacks():
        sparsity = MagnitudeSparsity(0.5, schedule=Schedule(begin=8, end=20, update_every=3))
        return [Distillation(begin=begin), sparsity, pruning(schedule=ROUNDS)]

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(*callbacks(), save, enable_checkpointing=True, max_epochs=4)
    for step in (8, 16, 24):
        again = callbacks()
        resumed = fit(*again, ckpt_path=tmp_path / f"step={step}.ckpt", max_epochs=4)
        assert same_weights(whole, resumed), step
        network = again[0]._teachers[0].network
        assert widths(network) == (WIDTHS if begin == 0 else {"0": 6, "4": 12})
    assert len(list(tmp_path.glob("distillation-teacher-*.pt"))) == 1


def test_a_checkpoint_teacher_stays_dense(tmp_path):
    torch.save(teacher().state_dict(), tmp_path / "teacher.pt")
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)

    def callbacks():
        return [Distillation(checkpoint=tmp_path / "teacher.pt", teacher=teacher()), pruning(at=5)]

    whole = fit(*callbacks(), save, enable_checkpointing=True)
    again = callbacks()
    resumed = fit(*again, ckpt_path=tmp_path / "step=8.ckpt")
    assert same_weights(whole, resumed)
    alone = Distillation(checkpoint=tmp_path / "teacher.pt")
    fit(alone, pruning(at=5), module=fit(pruning(at=0)))  # a student that is slim already
    assert same_weights(alone._teachers[0].network, teacher())


def digits(*callbacks, ckpt_path=None, **settings):
    pl.seed_everything(0, verbose=False)
    module = ImageClassifier("digits_cnn", model_args={"width": 4}, lr=0.05)
    run = trainer(callbacks=list(callbacks), max_epochs=3, **settings)
    run.fit(module, DigitsDataModule(batch_size=128), ckpt_path=ckpt_path)
    return module, run


def test_all_of_them_on_real_data_interrupted_in_mid_epoch(tmp_path):
    def callbacks():
        schedule = Schedule(begin=0.2, end=0.7, update_every=3)
        return [
            Distillation(begin=0.1),
            MagnitudeSparsity(0.5, schedule=schedule),
            pruning(None, target_macs_ratio=0.5, schedule=schedule, importance="taylor"),
        ]

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, run = digits(*callbacks(), save, enable_checkpointing=True)
    assert run.global_step > 20
    for progress in (0.15, 0.4, 0.6, 0.9):
        step = round(progress * run.global_step)
        resumed, _ = digits(*callbacks(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert same_weights(whole, resumed), progress


# --- The summary ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["summary", "channels"])
@pytest.mark.parametrize("at", [0, 5])
def test_the_summary_reports_what_was_cut(first, at, tmp_path):
    summary = CompressionSummary(tmp_path, latency=False, plots=False)
    order = [summary, pruning(at=at)]
    module = fit(*(order if first == "summary" else reversed(order)))
    report = summary.report
    assert report.dense.macs == 36 * (9 * 8 + 9 * 8 + 8 * 16) + 64 * 4
    assert report.compressed.macs == 36 * (9 * 4 + 9 * 4 + 4 * 8) + 32 * 4
    assert report.compressed.num_params == sum(p.numel() for p in module.parameters())
    assert report.compressed.size_bytes < report.dense.size_bytes
    assert zeros(module) == 0
