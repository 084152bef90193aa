"""The LightningModule of the recipes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

from lit_compress.tasks import ArrayLoader, DigitsDataModule, ImageClassifier, Normalization
from lit_compress.tasks.classification import lr_factor

SCHEDULES = ("cosine", "constant", "one_cycle")


def _trainer(tmp_path, **kwargs):
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "enable_checkpointing": False, **kwargs},
    )


def _tiny(**kwargs):
    return ImageClassifier("digits_cnn", model_args={"width": 4}, **kwargs)


class _Rates(Callback):
    """Notes the learning rate of every step, and may stop the fit after some."""

    def __init__(self, stop_after=None):
        self.rates = []
        self.stop_after = stop_after

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        trainer.should_stop = len(self.rates) == self.stop_after


def test_digits_are_learned(tmp_path):
    seed_everything(0)
    module, data = ImageClassifier("digits_cnn", model_args={"width": 16}), DigitsDataModule()
    trainer = _trainer(tmp_path, max_epochs=8)
    trainer.fit(module, data)
    logged = set(trainer.callback_metrics)
    assert logged == {"train_loss", "val_loss", "val_top1", "val_top5"}
    assert trainer.callback_metrics["val_top1"] > 0.97
    (results,) = trainer.test(module, data, verbose=False)
    assert set(results) == {"test_loss", "test_top1", "test_top5"}
    assert results["test_top1"] > 0.97
    assert results["test_top5"] >= results["test_top1"]


def test_logged_accuracies_are_those_of_the_logits(tmp_path):
    module, data = _tiny(), DigitsDataModule()
    trainer = _trainer(tmp_path)
    (results,) = trainer.test(module, data, verbose=False)
    logits = torch.cat(trainer.predict(module, data))
    labels = data.splits["test"][1]
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert results["test_top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert results["test_top5"] == pytest.approx(top5)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert results["test_loss"] == pytest.approx(loss, rel=1e-4)


def test_fewer_than_five_classes_have_a_top5_of_all(tmp_path):
    module = ImageClassifier("resnet20", num_classes=3)
    images = torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8)
    normalization = Normalization((0.5,) * 3, (0.2,) * 3)
    loader = ArrayLoader(images, torch.tensor([0, 1, 2, 0]), 2, normalization)
    (results,) = _trainer(tmp_path).test(module, loader, verbose=False)
    assert results["test_top5"] == 1


@pytest.mark.parametrize("lr_schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.25])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_learning_rate_follows_the_schedule_step_by_step(
    tmp_path, lr_schedule, warmup_fraction, optimizer
):
    rates = _Rates()
    module = _tiny(
        optimizer=optimizer, lr=0.01, lr_schedule=lr_schedule, warmup_fraction=warmup_fraction
    )
    _trainer(tmp_path, limit_train_batches=6, limit_val_batches=0, callbacks=[rates]).fit(
        module, DigitsDataModule()
    )
    expected = [0.01 * lr_factor(step, 6, lr_schedule, warmup_fraction) for step in range(6)]
    assert rates.rates == pytest.approx(expected)


@settings(deadline=None, max_examples=80)
@given(
    step=st.integers(0, 300),
    total=st.integers(1, 200),
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.floats(0, 0.9),
)
def test_lr_factor_stays_in_range_and_rises_only_in_the_warm_up(step, total, schedule, warmup):
    now, after = (lr_factor(at, total, schedule, warmup) for at in (step, step + 1))
    assert 0 <= now <= 1
    rising_until = (warmup or 0.3 if schedule == "one_cycle" else warmup) * total
    if step + 1 < rising_until:
        assert after > now
    elif step >= rising_until:
        assert after <= now


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_lr_factor_ends_at_zero(schedule):
    assert lr_factor(100, 100, schedule, 0.2) == 0
    assert lr_factor(1000, 100, schedule, 0.2) == 0


def test_endless_run_needs_a_constant_rate(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"needs the length of the run.*max_epochs"):
        _trainer(tmp_path, max_epochs=-1).fit(_tiny(), DigitsDataModule())
    rates = _Rates(stop_after=3)
    trainer = _trainer(tmp_path, max_epochs=-1, limit_val_batches=0, callbacks=[rates])
    trainer.fit(_tiny(lr_schedule="constant", lr=0.1), DigitsDataModule())
    assert rates.rates == [0.1] * 3


def test_checkpoint_loads_where_the_first_weights_are_not(tmp_path):
    weights = tmp_path / "first.pt"
    torch.save(_tiny().model.state_dict(), weights)
    module = _tiny(weights=str(weights), lr=0.01)
    trainer = _trainer(tmp_path, limit_train_batches=2, limit_val_batches=1)
    trainer.fit(module, DigitsDataModule())
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    weights.unlink()
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "fit.ckpt", weights_only=True)
    assert loaded.hparams["lr"] == 0.01
    assert "weights" not in loaded.hparams
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_weights_are_there_from_the_start(tmp_path):
    source = _tiny()
    torch.save({"state_dict": source.model.state_dict(), "top1": 1.0}, tmp_path / "net.pt")
    module = _tiny(weights=str(tmp_path / "net.pt"))
    for name, value in source.state_dict().items():
        assert torch.equal(value, module.state_dict()[name])


def test_state_dict_holds_the_network_alone():
    module = _tiny()
    assert set(module.state_dict()) == {f"model.{name}" for name in module.model.state_dict()}


def test_label_smoothing_changes_the_training_loss_alone():
    batch = (torch.randn(8, 1, 8, 8), torch.arange(8))
    plain = _tiny().eval()
    smoothed = _tiny(label_smoothing=0.3).eval()
    smoothed.load_state_dict(plain.state_dict())
    plain.log = smoothed.log = lambda *_, **__: None
    assert plain.training_step(batch, 0) != smoothed.training_step(batch, 0)
    expected = torch.nn.functional.cross_entropy(plain(batch[0]), batch[1], label_smoothing=0.3)
    torch.testing.assert_close(smoothed.training_step(batch, 0), expected)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"lr": 0.0}, "lr came as 0.0"),
        ({"momentum": 1.0}, r"momentum came as 1.0; give a value in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay came as -0.1"),
        ({"warmup_fraction": 1.0}, "warmup_fraction came as 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing came as -0.1"),
        ({"optimizer": "lion"}, "optimizer came as 'lion'; the choices are sgd, adamw"),
        ({"lr_schedule": "step"}, "lr_schedule came as 'step'; the choices are cosine"),
        ({"model": "resnet21"}, "did you mean .*resnet20"),
    ],
)
def test_values_out_of_range_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        ImageClassifier(**kwargs)
