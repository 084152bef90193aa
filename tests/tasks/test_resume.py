"""A fit that is interrupted inside an epoch and resumed is the uninterrupted fit, bit for bit."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_compress.tasks import DigitsDataModule, ImageClassifier

# Checkpoints of the resumed run go to another folder, which Lightning remarks upon.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

EPOCHS = 3
BATCHES = 5


class _AsksForTheLength(Callback):
    """Makes Lightning build the training loader before it reads the checkpoint."""

    def setup(self, trainer, pl_module, stage):
        assert trainer.estimated_stepping_batches > 0


def _fit(folder, ckpt_path=None, lr_schedule="cosine", callbacks=(), **kwargs):
    """Fit with momentum and augmentation; a checkpoint after every step goes to ``folder``."""
    seed_everything(7 if ckpt_path else 0)  # nothing may hang on the global seed when resumed
    module = ImageClassifier(
        "digits_cnn", model_args={"width": 2}, momentum=0.9, lr_schedule=lr_schedule
    )
    checkpoints = ModelCheckpoint(
        folder,
        filename="{step}",
        every_n_train_steps=1,
        save_top_k=-1,
        enable_version_counter=False,
    )
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoints, *callbacks],
        **kwargs,
    )
    data = DigitsDataModule(batch_size=240, crop_padding=1)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer, module.state_dict()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        # Of 15 steps: inside each epoch, at the end of one, at the start of the next.
        ({}, (2, 5, 6, 8, 12)),
        ({"lr_schedule": "constant"}, (2, 7)),
        ({"callbacks": (_AsksForTheLength(),)}, (3, 8)),
        ({"limit_train_batches": 4}, (1, 4, 6)),  # an epoch that ends before the loader's
        ({"val_check_interval": 2}, (2, 3, 8)),
    ],
    ids=["plain", "constant rate", "early loader", "limited", "validating within"],
)
def test_resumed_fit_is_the_uninterrupted_one(tmp_path, options, steps):
    trainer, expected = _fit(tmp_path / "whole", **options)
    total = EPOCHS * options.get("limit_train_batches", BATCHES)
    assert trainer.global_step == total
    for step in steps:
        resumed, weights = _fit(
            tmp_path / f"from {step}", str(tmp_path / "whole" / f"step={step}.ckpt"), **options
        )
        assert resumed.global_step == total
        assert len(list((tmp_path / f"from {step}").iterdir())) >= total - step
        for name, value in expected.items():
            assert torch.equal(value, weights[name]), (step, name)


def test_accumulated_gradients_resume_at_their_steps(tmp_path):
    options = {"accumulate_grad_batches": 2}
    trainer, expected = _fit(tmp_path / "whole", **options)
    for step in (1, 4):
        _, weights = _fit(
            tmp_path / "resumed", str(tmp_path / "whole" / f"step={step}.ckpt"), **options
        )
        for name, value in expected.items():
            assert torch.equal(value, weights[name]), (step, name)
    assert trainer.global_step == 9


def test_resuming_inside_an_epoch_with_another_batch_size_is_refused(tmp_path):
    _fit(tmp_path / "whole")
    module = ImageClassifier("digits_cnn", model_args={"width": 2})
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with pytest.raises(ValueError, match=r"inside epoch 0 with batch_size=240.*batch_size=100"):
        trainer.fit(
            module,
            DigitsDataModule(batch_size=100, crop_padding=1),
            ckpt_path=str(tmp_path / "whole" / "step=2.ckpt"),
            weights_only=True,
        )
