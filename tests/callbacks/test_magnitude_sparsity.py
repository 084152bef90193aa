import copy

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lit_compress.callbacks.magnitude_sparsity import MagnitudeSparsity
from lit_compress.compress.schedules import Schedule
from tests.callbacks.nets import ManualNet, Net, loader, same_weights, trainer, zeros

NUM_WEIGHTS = 72 + 128 + 256  # the two convs and the linear layer of Net


def fit(callback, module=None, data=None, callbacks=(), before=(), ckpt_path=None, **kwargs):
    torch.manual_seed(1)
    module = module or Net()
    runner = trainer(callbacks=[*before, callback, *callbacks], **kwargs)
    runner.fit(module, data or loader(), ckpt_path=ckpt_path)
    return module


def assert_exact(module, callback, sparsity):
    names = list(callback.selection.names)
    assert zeros(module, names) == round(sparsity * NUM_WEIGHTS)


# --- The target is met --------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["uniform", "global", "heuristic"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.777, 0.95])
def test_the_target_is_met_exactly(allocation, sparsity):
    callback = MagnitudeSparsity(sparsity, allocation=allocation)
    module = fit(callback, max_epochs=2)
    assert_exact(module, callback, sparsity)
    assert zeros(module, ["model.3.weight", "model.3.bias", "model.1.weight"]) == 0


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    begin=st.sampled_from([0, 3, 0.0, 0.3]),
    end=st.sampled_from([0.3, 0.5, 0.9, 1.0, 16, 11]),
    update_every=st.sampled_from([1, 3, 7, 100, 0.01, 0.37]),
    kind=st.sampled_from(["cubic", "linear", "constant"]),
)
def test_the_target_is_met_whatever_the_schedule(begin, end, update_every, kind):
    schedule = Schedule(kind, begin=begin, end=end, update_every=update_every)
    callback = MagnitudeSparsity(0.77, initial_sparsity=0.1, schedule=schedule)
    module = fit(callback, max_epochs=2)
    assert_exact(module, callback, 0.77)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"max_steps": 13, "max_epochs": -1},
        {"limit_train_batches": 3},
    ],
    ids=str,
)
def test_the_target_is_met_under_every_trainer(kwargs):
    callback = MagnitudeSparsity(0.77, schedule=Schedule(end=1.0))
    assert_exact(fit(callback, **kwargs), callback, 0.77)


def test_masks_survive_a_gradient_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    callback = MagnitudeSparsity(0.77)
    assert_exact(fit(callback, plugins=[plugin], gradient_clip_val=1.0), callback, 0.77)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_masks_survive_every_optimizer(optimizer):
    class Other(Net):
        def configure_optimizers(self):
            return optimizer(self.parameters(), lr=1e-2, weight_decay=0.1)

    callback = MagnitudeSparsity(0.77)
    assert_exact(fit(callback, Other()), callback, 0.77)


def test_manual_optimization_with_two_optimizers():
    callback = MagnitudeSparsity(0.77, schedule=Schedule(end=1.0))
    module = fit(callback, ManualNet())
    assert callback.ramp.end == 32  # batches, not optimizer steps
    assert_exact(module, callback, 0.77)


def test_a_compiled_module():
    callback = MagnitudeSparsity(0.77)
    torch.manual_seed(1)
    module = Net()
    trainer(callbacks=[callback]).fit(torch.compile(module, backend="aot_eager"), loader())
    assert_exact(module, callback, 0.77)
    plain = MagnitudeSparsity(0.77)
    assert callback.selection == plain.selection or fit(plain) is not None
    assert callback.selection == plain.selection


def test_masks_hold_after_every_step_between_updates():
    class Watch(pl.Callback):
        counts: list[int] = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.counts.append(zeros(pl_module, list(callback.selection.names)))

    callback = MagnitudeSparsity(
        0.8, schedule=Schedule("linear", begin=2, end=20, update_every=6), initial_sparsity=0.2
    )
    watch = Watch()
    fit(callback, callbacks=[watch])
    expected = []
    for step in range(1, 33):
        point = None if step < 2 else 20 if step >= 20 else 2 + (step - 2) // 6 * 6
        value = 0.0 if point is None else 0.8 - 0.6 * (1 - (point - 2) / 18)
        expected.append(round(value * NUM_WEIGHTS))
    assert watch.counts == expected


def test_weights_can_come_back_until_the_schedule_ends():
    class Poke(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            weight = pl_module.model[8].weight
            if trainer.global_step == 4:
                self.gone = (weight == 0).clone()
                weight.data[~self.gone] *= 1e-3  # all kept ones shrink below the removed ones
            if trainer.global_step == 6:
                self.returned = (weight != 0) & self.gone

    poke = Poke()
    schedule = Schedule("constant", begin=0, end=6, update_every=1)
    fit(MagnitudeSparsity(0.5, schedule=schedule), callbacks=[poke])
    assert poke.gone.sum() > 100
    assert poke.returned.sum() > 100


def test_epochs_as_the_unit_update_before_validation():
    class Watch(pl.Callback):
        seen: list[int] = []

        def on_validation_start(self, trainer, pl_module):
            if not trainer.sanity_checking:
                self.seen.append(zeros(pl_module, list(callback.selection.names)))

    schedule = Schedule("linear", begin=1, end=3, update_every=1, unit="epoch")
    callback = MagnitudeSparsity(0.5, schedule=schedule)
    watch = Watch()
    torch.manual_seed(0)
    module = Net()
    trainer(callbacks=[callback, watch]).fit(module, loader(), loader())
    assert watch.seen == [0, round(0.25 * NUM_WEIGHTS), NUM_WEIGHTS // 2, NUM_WEIGHTS // 2]


def test_explicit_sparsities_by_name():
    callback = MagnitudeSparsity({"model.8": 0.9, "model.*": 0.25})
    module = fit(callback)
    assert zeros(module, ["model.8.weight"]) == round(0.9 * 256)
    assert zeros(module, ["model.0.weight"]) == round(0.25 * 72)
    assert zeros(module, ["model.4.weight"]) == round(0.25 * 128)


def test_depthwise_layers_on_request():
    callback = MagnitudeSparsity(0.5, layer_types=["depthwise"])
    assert zeros(fit(callback), ["model.3.weight"]) == 36


def test_patterns_are_complete_at_the_end():
    callback = MagnitudeSparsity(0.5, pattern="2:4")
    module = fit(callback)
    assert [s.name for s in callback.selection.skipped] == ["model.0.weight", "model.3.weight"]
    for weight in (module.model[4].weight, module.model[8].weight):
        groups = (weight != 0).movedim(1, -1).reshape(-1, 4)
        assert (groups.sum(1) == 2).all()
    callback = MagnitudeSparsity(0.75, pattern="4x1")
    module = fit(callback)
    kept = (module.model[4].weight != 0).view(4, 4, 8)
    assert torch.equal(kept.all(1), kept.any(1))
    assert zeros(module, list(callback.selection.names)) == round(0.75 * NUM_WEIGHTS / 4) * 4


def test_clipping_counts_only_weights_that_are_there():
    norms = {}

    class Norm(Net):
        def on_before_optimizer_step(self, optimizer):
            names = list(callback.selection.names)
            grads = [p.grad for n, p in self.named_parameters() if n in names]
            norms["removed"] = sum(
                float(g[p == 0].abs().sum())
                for g, p in zip(grads, (self.get_parameter(n) for n in names), strict=True)
            )

    callback = MagnitudeSparsity(0.9, schedule=Schedule(begin=0, end=0.5))
    fit(callback, Norm(), gradient_clip_val=0.5)
    assert norms["removed"] == 0.0
    fit(callback, Norm())
    assert norms["removed"] > 0.0


# --- Averages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_an_exponential_average_is_sparse(first, tmp_path):
    callback, ema = MagnitudeSparsity(0.77), EMAWeightAveraging(decay=0.9)
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    around = {"callbacks": [ema, save]} if first else {"before": [ema], "callbacks": [save]}
    module = fit(callback, enable_checkpointing=True, **around)
    assert_exact(module, callback, 0.77)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert sum(int((saved[n] == 0).sum()) for n in callback.selection.names) == 351
    assert any(not torch.equal(saved[n], p) for n, p in Net().state_dict().items())


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_stochastic_average_is_sparse_and_its_extra_epoch_is_not_counted(first):
    callback = MagnitudeSparsity(0.77, schedule=Schedule(end=1.0))
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    around = {"callbacks": [swa]} if first else {"before": [swa]}
    module = fit(callback, **around)
    assert callback.ramp.end == 32
    assert_exact(module, callback, 0.77)


def test_averaging_callbacks_are_left_as_they_were():
    ema = EMAWeightAveraging(decay=0.9)
    fit(MagnitudeSparsity(0.5), callbacks=[ema])
    assert "update_parameters" not in vars(ema._average_model)


# --- Checkpoints --------------------------------------------------------------------------------


def save_each(tmp_path, **kwargs):
    return ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **kwargs)


class Counting:
    """A loader that Lightning resumes in mid-epoch: its state is how many batches it gave."""

    def __init__(self):
        self.batches = list(loader())
        self.given = 0

    def __iter__(self):
        self.given %= len(self.batches)
        while self.given < len(self.batches):
            self.given += 1
            yield self.batches[self.given - 1]

    def __len__(self):
        return len(self.batches)

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


@pytest.mark.parametrize("unit", ["step", "epoch"])
@pytest.mark.parametrize("averaging", [False, True], ids=["plain", "ema"])
def test_resume_at_epoch_boundaries_is_bit_identical(tmp_path, unit, averaging):
    schedule = Schedule(begin=0.25, end=0.75, update_every=0.1, unit=unit)

    def callbacks():
        return [EMAWeightAveraging(decay=0.8)] if averaging else []

    save = save_each(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True)
    whole = fit(
        MagnitudeSparsity(0.77, schedule=schedule),
        callbacks=[*callbacks(), save],
        enable_checkpointing=True,
    )
    for step in (8, 16, 24):
        file = tmp_path / f"step={step}.ckpt"
        callback = MagnitudeSparsity(0.77, schedule=schedule)
        resumed = fit(callback, callbacks=callbacks(), ckpt_path=file)
        assert same_weights(whole, resumed), file
        assert_exact(resumed, callback, 0.77)


def test_resume_at_any_step_is_bit_identical_with_a_resumable_loader(tmp_path):
    schedule = Schedule("linear", begin=2, end=20, update_every=3)
    save = save_each(tmp_path, every_n_train_steps=1)
    whole = fit(
        MagnitudeSparsity(0.77, schedule=schedule),
        data=Counting(),
        callbacks=[save],
        enable_checkpointing=True,
        max_epochs=3,
    )
    files = {int(f.stem.removeprefix("step=")): f for f in tmp_path.glob("*.ckpt")}
    assert len(files) == 24
    for step in (1, 2, 3, 7, 8, 9, 12, 16, 20, 21, 23):
        resumed = fit(
            MagnitudeSparsity(0.77, schedule=schedule),
            data=Counting(),
            ckpt_path=files[step],
            max_epochs=3,
        )
        assert same_weights(whole, resumed), step


def test_a_resumed_run_keeps_its_schedule_when_it_is_made_longer(tmp_path):
    save = save_each(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True)
    fit(MagnitudeSparsity(0.77), callbacks=[save], enable_checkpointing=True)
    callback = MagnitudeSparsity(0.77)
    module = fit(callback, ckpt_path=tmp_path / "step=32.ckpt", max_epochs=8)
    assert callback.ramp.end == 16
    assert_exact(module, callback, 0.77)


def test_a_new_target_starts_a_new_schedule_from_the_old_masks(tmp_path):
    save = save_each(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True)
    fit(MagnitudeSparsity(0.5), callbacks=[save], enable_checkpointing=True)
    callback = MagnitudeSparsity(0.9, initial_sparsity=0.5)
    module = fit(callback, ckpt_path=tmp_path / "step=32.ckpt", max_epochs=8)
    assert_exact(module, callback, 0.9)


def test_a_checkpoint_is_plain_and_safe_to_open(tmp_path):
    callback = MagnitudeSparsity(0.77, schedule=Schedule(end=1.0))
    save = save_each(tmp_path, every_n_train_steps=20)
    module = fit(callback, callbacks=[save], enable_checkpointing=True)
    file = next(tmp_path.glob("*.ckpt"))
    saved = torch.load(file, weights_only=True)
    assert saved["state_dict"].keys() == Net().state_dict().keys()
    assert Net.load_from_checkpoint(file, weights_only=True) is not None
    weights = [saved["state_dict"][n] for n in callback.selection.names]
    assert not any(torch.signbit(w[w == 0]).any() for w in weights)
    assert module.state_dict().keys() == saved["state_dict"].keys()


def test_a_truncated_checkpoint_is_refused_and_left_as_it_is(tmp_path):
    save = save_each(tmp_path, every_n_train_steps=20)
    fit(MagnitudeSparsity(0.5), callbacks=[save], enable_checkpointing=True)
    file = next(tmp_path.glob("*.ckpt"))
    half = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(half)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint .* Resume from another"):
        fit(MagnitudeSparsity(0.5), ckpt_path=file)
    assert file.read_bytes() == half


def test_a_foreign_file_is_refused_as_a_checkpoint(tmp_path):
    torch.save({"weights": torch.ones(3)}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"is no Lightning checkpoint: .* found \['weights'\]"):
        fit(MagnitudeSparsity(0.5), ckpt_path=tmp_path / "foreign.ckpt")


def test_masks_of_another_selection_are_refused(tmp_path):
    save = save_each(tmp_path, every_n_train_steps=20)
    fit(MagnitudeSparsity(0.5), callbacks=[save], enable_checkpointing=True)
    file = next(tmp_path.glob("*.ckpt"))
    saved = torch.load(file, weights_only=True)
    (key,) = saved["callbacks"].keys() & {MagnitudeSparsity(0.5).state_key}
    shapes = saved["callbacks"][key]["weights"]["shapes"]
    shapes["model.9.weight"] = shapes.pop("model.8.weight")
    torch.save(saved, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"'model.8.weight' has shape None in the checkpoint and"):
        fit(MagnitudeSparsity(0.5), ckpt_path=tmp_path / "foreign.ckpt")


# --- Several of them, and again -----------------------------------------------------------------


def test_two_callbacks_on_disjoint_layers(tmp_path):
    convs = MagnitudeSparsity(0.5, layer_types=["conv"])
    head = MagnitudeSparsity(0.9, layers=["model.8"])
    save = save_each(tmp_path, every_n_train_steps=16)
    module = fit(convs, callbacks=[head, save], enable_checkpointing=True)
    assert zeros(module, ["model.8.weight"]) == 230
    assert zeros(module, ["model.0.weight", "model.4.weight"]) == 100
    resumed = fit(
        MagnitudeSparsity(0.5, layer_types=["conv"]),
        callbacks=[MagnitudeSparsity(0.9, layers=["model.8"])],
        ckpt_path=tmp_path / "step=16.ckpt",
    )
    assert same_weights(module, resumed)


def test_two_callbacks_on_one_weight_are_refused():
    with pytest.raises(MisconfigurationException, match="two .* mask 'model.8.weight'"):
        fit(MagnitudeSparsity(0.5, layers=["model.8"]), callbacks=[MagnitudeSparsity(0.5)])


def test_the_callback_can_be_used_again():
    callback = MagnitudeSparsity(0.77)
    first = fit(callback)
    other = Net()
    trained = fit(callback, other)
    assert_exact(trained, callback, 0.77)
    assert_exact(first, callback, 0.77)
    again = MagnitudeSparsity(0.77)
    torch.manual_seed(1)
    assert same_weights(fit(copy.deepcopy(again)), fit(again))


def test_nothing_is_left_on_the_optimizers():
    callback = MagnitudeSparsity(0.5)
    torch.manual_seed(0)
    module, runner = Net(), trainer(callbacks=[callback])
    runner.fit(module, loader())
    assert not runner.optimizers[0]._optimizer_step_post_hooks


# --- Words --------------------------------------------------------------------------------------


def test_every_logger_gets_the_sparsities(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = MagnitudeSparsity(0.77)
    save = ModelCheckpoint(tmp_path / "c", filename="{epoch}-{sparsity:.2f}", save_top_k=-1)
    fit(callback, callbacks=[save], logger=logger, enable_checkpointing=True, log_every_n_steps=1)
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    header = text[0].split(",")
    for name in ("sparsity/total", "sparsity/scheduled", "sparsity/layer/model.8.weight"):
        assert name in header
    column = header.index("sparsity/total")
    values = [float(v) for line in text[1:] if (v := line.split(",")[column])]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(351 / 456)
    assert (tmp_path / "c" / "epoch=3-sparsity=0.77.ckpt").exists()


def test_it_says_what_it_chose_and_left(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(MagnitudeSparsity(0.5))
    assert "3 weights are made sparse" in caplog.text
    assert "model.3.weight: its type, depthwise" in caplog.text


def test_a_run_that_ends_early_says_so():
    callback = MagnitudeSparsity(0.77, schedule=Schedule(begin=0, end=50, update_every=1))
    with (
        pytest.warns(UserWarning, match="the schedule ends at step 50, the run at 32"),
        pytest.warns(
            UserWarning, match=r"training ended before step 50.* is 0\.7\d+ and not 0\.77"
        ),
    ):
        fit(callback)


# --- Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final_sparsity": 1.0}, r"final_sparsity is 1.0, expected a share of zeros in \[0, 1\)"),
        ({"final_sparsity": -0.1}, r"final_sparsity is -0.1, expected"),
        ({"final_sparsity": 90}, r"For 90 % write 0\.9"),
        ({"final_sparsity": float("nan")}, "final_sparsity is nan"),
        ({"final_sparsity": {}}, "final_sparsity is an empty mapping"),
        ({"final_sparsity": {"a": 2.0}}, r"final_sparsity\['a'\] is 2.0"),
        ({"final_sparsity": 0.5, "initial_sparsity": 0.6}, "below initial_sparsity=0.6"),
        ({"final_sparsity": 0.5, "initial_sparsity": -1}, "initial_sparsity is -1"),
        ({"final_sparsity": 0.5, "allocation": "best"}, "allocation is 'best', expected"),
        ({"final_sparsity": {"a": 0.5}, "allocation": "global"}, "leave allocation out"),
        ({"final_sparsity": {"a": 0.5}, "layers": ["a"]}, "Leave layers out"),
        ({"final_sparsity": 0.6, "pattern": "2:4"}, r"write final_sparsity=0\.5"),
        ({"final_sparsity": 0.5, "pattern": "2:4", "allocation": "heuristic"}, "use allocation="),
        ({"final_sparsity": 0.5, "pattern": "nm"}, "pattern is 'nm', expected"),
        ({"final_sparsity": 0.5, "layers": "model.8"}, "layers is the string .model.8."),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        MagnitudeSparsity(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["model.conv"]}, "layers holds the pattern 'model.conv', which matches none"),
        ({"ignored_layers": ["*"]}, "no layer is left to be made sparse"),
        ({"layer_types": ["dense"]}, "layer_types holds 'dense', expected some of"),
        ({"final_sparsity": {"head": 0.5}}, "holds the pattern 'head'"),
    ],
    ids=str,
)
def test_bad_selections_are_refused_before_training(arguments, message):
    module = Net()
    before = copy.deepcopy(module)
    with pytest.raises(ValueError, match=message):
        fit(MagnitudeSparsity(**({"final_sparsity": 0.5} | arguments)), module)
    assert same_weights(before, module)


def test_fractions_of_an_endless_run_are_refused():
    with pytest.raises(MisconfigurationException, match="the run has no known length"):
        fit(MagnitudeSparsity(0.5), max_epochs=-1, max_time="00:00:00:20")


def test_a_nan_loss_stops_the_run_before_the_weights_change():
    class Diverges(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.trainer.global_step == 5:
                self.before = copy.deepcopy(self.state_dict())
                loss = loss * torch.nan
            return loss

    module = Diverges()
    with pytest.raises(ValueError, match="loss is NaN at step 5; .*the last checkpoint is intact"):
        fit(MagnitudeSparsity(0.5), module)
    parameters = dict(module.named_parameters())
    assert all(torch.equal(parameters[n], module.before[n]) for n in parameters)


def test_sharded_strategies_are_refused(monkeypatch):
    from lightning.pytorch.strategies import FSDPStrategy

    runner = trainer()
    monkeypatch.setattr(
        type(runner), "strategy", property(lambda _: FSDPStrategy.__new__(FSDPStrategy))
    )
    with pytest.raises(MisconfigurationException, match="FSDPStrategy shards them; use strategy="):
        MagnitudeSparsity(0.5).setup(runner, Net(), "fit")


def test_a_module_without_layers_is_refused():
    class Empty(Net):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36))

        def configure_optimizers(self):
            return None

    with pytest.raises(ValueError, match="no layer is left"):
        fit(MagnitudeSparsity(0.5), Empty(), DataLoader([]))


def test_a_fit_after_validating_a_checkpoint_begins_anew(tmp_path):
    schedule = Schedule("constant", begin=2, end=2, update_every=1)
    first = trainer(max_epochs=1, callbacks=[MagnitudeSparsity(0.5, schedule=schedule)])
    first.fit(Net(), loader())
    first.save_checkpoint(tmp_path / "sparse.ckpt")

    again, module = MagnitudeSparsity(0.5, schedule=schedule), Net()
    second = trainer(max_epochs=1, limit_train_batches=1, callbacks=[again])
    second.validate(module, loader(), ckpt_path=tmp_path / "sparse.ckpt", verbose=False)
    fresh = Net()
    second.fit(fresh, loader())
    assert again.sparsity == 0.0  # the schedule of the new run has not begun
    assert zeros(fresh) == 0
