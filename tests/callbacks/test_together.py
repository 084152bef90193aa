"""Sparsity and distillation in one Trainer, on real data, interrupted and resumed."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_compress import Distillation, MagnitudeSparsity, Schedule
from lit_compress.tasks import DigitsDataModule, ImageClassifier
from tests.callbacks.nets import same_weights, trainer


def fit(*callbacks, ckpt_path=None, **kwargs):
    pl.seed_everything(0, verbose=False)
    module = ImageClassifier("digits_cnn", model_args={"width": 4}, lr=0.05)
    data = DigitsDataModule(batch_size=128)
    runner = trainer(callbacks=list(callbacks), max_epochs=3, **kwargs)
    runner.fit(module, data, ckpt_path=ckpt_path)
    return module, runner


def compression():
    schedule = Schedule(begin=0.2, end=0.8, update_every=2)
    return [Distillation(begin=0.2), MagnitudeSparsity(0.8, schedule=schedule)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module, runner = fit(*compression(), save, enable_checkpointing=True)
    return folder, module, runner


@pytest.mark.parametrize("progress", [0.1, 0.25, 0.4, 0.5, 0.75, 0.9])
def test_a_run_resumed_in_mid_epoch_is_bit_identical(whole, progress):
    folder, module, runner = whole
    step = round(progress * runner.global_step)
    resumed, _ = fit(*compression(), ckpt_path=folder / f"step={step}.ckpt")
    assert same_weights(module, resumed)


def test_both_are_in_force(whole):
    folder, module, _ = whole
    weights = [p for p in module.model.parameters() if p.dim() > 1]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert zeros == round(0.8 * sum(w.numel() for w in weights))
    undistilled, _ = fit(compression()[1])
    assert not same_weights(module, undistilled)
    # The teacher is in a file of its own, and in no checkpoint.
    assert len(list(folder.glob("distillation-teacher-*.pt"))) == 1
    saved = torch.load(next(folder.glob("step=*.ckpt")), weights_only=True)
    assert saved["state_dict"].keys() == module.state_dict().keys()


def test_a_snapshot_must_see_the_weights_before_they_are_changed():
    distillation, sparsity = compression()
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="Put Distillation"):
        fit(sparsity, distillation)
