"""Runs that are interrupted and come back, and what their checkpoints are good for."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lit_compress import (
    ChannelPenalty,
    ChannelPruning,
    MagnitudeSparsity,
    Schedule,
    load_compressed,
)
from lit_compress.compress.structure import record_of
from lit_compress.tasks import DigitsDataModule, ImageClassifier
from tests.callbacks.channel_fits import HALF, WIDTHS, Watch, WideNet, fit, pruning, widths
from tests.callbacks.nets import Net, loader, same_weights, trainer

ROUNDS = Schedule("linear", begin=2, end=20, update_every=6)  # at 8, 14 and 20
RUNS = {
    "rounds": lambda: [pruning(schedule=ROUNDS)],
    "taylor": lambda: [pruning(schedule=ROUNDS, importance="taylor")],
    "random": lambda: [pruning(schedule=ROUNDS, importance="random")],
    "layers": lambda: [
        pruning(None, target_macs_ratio=0.5, allocation="global", spread="layers", schedule=ROUNDS)
    ],
    "penalty": lambda: [pruning(schedule=ROUNDS, penalty=ChannelPenalty(0.1, begin=0.05))],
    "fixed": lambda: [pruning(schedule=ROUNDS, reconstruct=True, recalibrate_batch_norm=True)],
    "epochs": lambda: [pruning(schedule=Schedule(begin=1, end=3, update_every=1, unit="epoch"))],
    "sparse": lambda: [
        MagnitudeSparsity(0.5, schedule=Schedule(begin=1, end=18, update_every=2)),
        pruning(schedule=ROUNDS),
    ],
    "average": lambda: [EMAWeightAveraging(decay=0.8), pruning(schedule=ROUNDS)],
}


def saving(folder, **settings):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **settings)


def in_epochs(*callbacks, folder=None, ckpt_path=None, **settings):
    keep = [] if folder is None else [saving(folder, every_n_train_steps=1)]
    return fit(
        *callbacks,
        *keep,
        data=loader(),
        ckpt_path=ckpt_path,
        **({"max_epochs": 4, "enable_checkpointing": bool(keep)} | settings),
    )


@pytest.mark.parametrize("name", RUNS)
def test_resume_at_epoch_boundaries_is_bit_identical(name, tmp_path):
    whole = in_epochs(*RUNS[name](), folder=tmp_path)
    assert widths(whole) != WIDTHS
    for step in (8, 16, 24, 32):
        callbacks = RUNS[name]()
        resumed = in_epochs(*callbacks, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert same_weights(whole, resumed), step
        assert callbacks[-1].kept == widths(whole)
        assert record_of(resumed) == record_of(whole)


def digits(*callbacks, ckpt_path=None, **settings):
    pl.seed_everything(0, verbose=False)
    module = ImageClassifier("digits_cnn", model_args={"width": 4}, lr=0.05)
    run = trainer(callbacks=list(callbacks), max_epochs=3, **settings)
    run.fit(module, DigitsDataModule(batch_size=128), ckpt_path=ckpt_path)
    return module, run


@pytest.mark.parametrize("importance", ["l2", "taylor", "apoz"])
def test_resume_at_any_step_is_bit_identical_with_a_resumable_loader(importance, tmp_path):
    def callback():
        schedule = Schedule("linear", begin=0.2, end=0.8, update_every=5)
        return pruning(schedule=schedule, importance=importance, penalty=ChannelPenalty(0.1))

    whole, run = digits(
        callback(), saving(tmp_path, every_n_train_steps=1), enable_checkpointing=True
    )
    total = run.global_step
    points = [0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95] if importance == "taylor" else [0.3, 0.75]
    assert record_of(whole)
    for point in points:
        resumed, _ = digits(callback(), ckpt_path=tmp_path / f"step={round(point * total)}.ckpt")
        assert same_weights(whole, resumed), point


def test_a_resumed_run_keeps_its_moments_when_it_is_made_longer(tmp_path):
    def callback():
        return pruning(schedule=Schedule("linear", begin=0.25, end=0.5, update_every=0.125))

    in_epochs(callback(), folder=tmp_path)
    watch, again = Watch(), callback()
    in_epochs(again, watch, ckpt_path=tmp_path / "step=8.ckpt", max_epochs=8)
    assert again.ramp.end == 16
    assert watch.firsts[:9] == [8, 8, 8, 6, 6, 6, 6, 4, 4]


# --- Checkpoints of another structure -------------------------------------------------------------


class Shrinking(Net):
    """Finds its validation loss lowest at the epoch that it is told."""

    def __init__(self, best: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.best = best

    def validation_step(self, batch, batch_idx):
        self(batch[0])
        self.log("val_loss", float(abs(self.current_epoch - self.best)))

    def test_step(self, batch, batch_idx):
        self.log("channels", float(self.model[0].out_channels))


EPOCHS = Schedule("linear", begin=0, end=3, update_every=1, unit="epoch")


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "weights_only"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save = ModelCheckpoint(
        folder,
        filename="{epoch}",
        save_top_k=-1,
        monitor="val_loss",
        save_weights_only=request.param,
    )
    pl.seed_everything(1, verbose=False)
    module = Shrinking()
    runs = trainer(
        max_epochs=4, callbacks=[pruning(schedule=EPOCHS), save], enable_checkpointing=True
    )
    runs.fit(module, loader(), loader(16))
    return runs, module, save, folder


def test_the_best_model_is_tested_though_the_last_is_slimmer(run):
    runs, module, save, folder = run
    assert save.best_model_path.endswith("epoch=1.ckpt")
    for path, channels in ((folder / "epoch=3.ckpt", 4), ("best", 5), (folder / "epoch=0.ckpt", 7)):
        (metrics,) = runs.test(module, loader(16), ckpt_path=path, verbose=False)
        assert metrics["channels"] == channels
        assert widths(module)["0"] == channels
    other = Shrinking()
    quiet = trainer(callbacks=[pruning()])
    for function in (quiet.validate, quiet.test):
        function(other, loader(16), ckpt_path=folder / "epoch=1.ckpt", verbose=False)
        assert widths(other)["0"] == 5


def test_it_comes_back_without_the_callback(run):
    folder = run[3]
    stored = torch.load(folder / "epoch=2.ckpt", weights_only=True)
    loaded = load_compressed(folder / "epoch=2.ckpt", Shrinking)
    assert loaded.best == 1
    assert widths(loaded) == {"0": 4, "4": 8}
    assert all(torch.equal(stored["state_dict"][n], t) for n, t in loaded.state_dict().items())
    network = load_compressed(folder / "epoch=2.ckpt", Net().model)
    assert same_weights(network, loaded.model)
    trained = trainer(max_epochs=1)
    trained.fit(loaded, loader())
    assert trained.global_step == 8


def test_a_run_goes_on_after_another_structure_was_tested(run, tmp_path):
    """What is saved then is the module as it is; the callback sees that it is not its own."""
    runs, module, _, _ = run
    runs.test(module, loader(16), ckpt_path="best", verbose=False)
    runs.save_checkpoint(tmp_path / "best.ckpt")
    callback, resumed = pruning(schedule=EPOCHS), Shrinking()
    further = trainer(max_epochs=6, callbacks=[callback])
    further.fit(resumed, loader(), loader(16), ckpt_path=tmp_path / "best.ckpt")
    assert widths(resumed) == callback.kept == HALF


def test_a_fit_does_not_take_the_state_of_a_checkpoint_that_was_evaluated(tmp_path):
    def callback():
        return pruning(schedule=Schedule("linear", begin=0.0, end=0.5, update_every=0.25))

    in_epochs(callback(), folder=tmp_path, max_epochs=2)
    again, module = callback(), Net()
    run = trainer(callbacks=[again], max_epochs=4)
    run.validate(module, loader(16), ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
    run.fit(module, loader())
    assert again.ramp.end == 16  # of this run; the evaluated one ended its cuts at 8
    assert widths(module) == HALF


def test_a_checkpoint_of_another_model_is_refused(run, tmp_path):
    _, _, _, folder = run
    other = Shrinking()
    other.model[0] = nn.Conv2d(1, 7, 3, padding=1, bias=False)
    message = "'epoch=2.ckpt' does not fit Shrinking: 'out_channels' of module 'model.0' is 7, exp"
    with pytest.raises(ValueError, match=message.replace("'epoch", "'.*epoch")):
        trainer(callbacks=[pruning()]).test(other, loader(16), ckpt_path=folder / "epoch=2.ckpt")
    with pytest.raises(ValueError, match=message.replace("'epoch", "'.*epoch")):
        trainer(callbacks=[pruning()]).fit(other, loader(), ckpt_path=folder / "epoch=2.ckpt")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    in_epochs(pruning(at=3), folder=tmp_path, max_epochs=1)
    file = tmp_path / "step=5.ckpt"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint .* Resume from another"):
        in_epochs(pruning(at=3), ckpt_path=file)


def test_checkpoints_are_plain_data(tmp_path):
    callbacks = RUNS["penalty"]()
    module = in_epochs(*callbacks, folder=tmp_path)
    for step in (1, 12, 32):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert saved["state_dict"].keys() == module.state_dict().keys()
        assert "ChannelPruning" in saved["callbacks"]


class Keeping(Net):
    """Keeps its last loss with its graph, and so autograd's view of the weights of that time."""

    def training_step(self, batch, batch_idx):
        self.last = super().training_step(batch, batch_idx)
        return self.last


def test_a_module_that_keeps_a_graph_is_trained_after_another_structure_was_tested(tmp_path):
    module = Keeping()
    in_epochs(pruning(at=12), module=module, folder=tmp_path)
    run = trainer(callbacks=[pruning(at=4)], max_epochs=2)
    run.validate(module, loader(16), ckpt_path=tmp_path / "step=8.ckpt", verbose=False)
    assert widths(module) == WIDTHS
    run.fit(module, loader())
    assert widths(module) == HALF


# --- Other arguments, and fits without a checkpoint -----------------------------------------------


def test_a_second_fit_does_not_cut_again():
    callback = pruning()
    module = fit(callback)
    assert widths(module) == HALF
    fit(callback, module=module)
    assert widths(module) == callback.kept == HALF
    fit(pruning(schedule=Schedule("linear", begin=1, end=9, update_every=2)), module=module)
    assert widths(module) == HALF
    assert len(record_of(module)) == 1


def test_a_second_fit_goes_on_from_where_the_first_left_off():
    module = fit(pruning({"0": 0.25, "4": 0.5}))
    assert widths(module) == {"0": 6, "4": 8}
    watch = Watch()
    later = pruning(0.75, schedule=Schedule("linear", begin=0, end=8, update_every=2))
    fit(later, watch, module=module)
    assert later.plan.channels == WIDTHS
    assert watch.firsts == [6, 6, 6, 5, 5, 4, 4, 2] + [2] * 8
    assert widths(module) == {"0": 2, "4": 4}


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_targets_are_relative_to_the_dense_model(kind, allocation):
    def callback(ratio):
        targets = {f"target_{kind}_ratio": ratio}
        return ChannelPruning(round_to=1, allocation=allocation, **targets)

    def cost(module):
        if kind == "params":
            return sum(p.numel() for p in module.parameters())
        first, second = widths(module).values()
        return 36 * (9 * first + 9 * first + first * second) + 16 * second

    dense = cost(WideNet())
    module = fit(callback(0.8), module=WideNet, max_steps=4)
    assert 0.792 * dense < cost(module) <= 0.8 * dense
    record = record_of(module)
    fit(callback(0.8), module=module, max_steps=4)
    assert record_of(module) == record
    fit(callback(0.4), module=module, max_steps=4)
    assert 0.396 * dense < cost(module) <= 0.4 * dense


def test_other_arguments_on_resume_lead_on_from_the_checkpoint(tmp_path):
    in_epochs(pruning(0.25, at=4), folder=tmp_path, max_epochs=1)
    again = pruning(0.5, at=12)
    module = in_epochs(again, ckpt_path=tmp_path / "step=8.ckpt")
    assert again.plan.channels == WIDTHS
    assert widths(module) == HALF
    message = "the plan keeps 6 of the 8 channels of group '0', and an earlier cut left 4; channels"
    with pytest.raises(ValueError, match=message):
        fit(pruning(0.25), module=module)


def test_a_group_of_one_channel_stays_as_it_is():
    module = fit(pruning({"0": 0.99, "4": 0.25}))
    assert widths(module)["0"] == 1
    callback = pruning({"0": 0.99, "4": 0.5})
    fit(callback, module=module)
    assert widths(module) == {"0": 1, "4": 8}


def test_a_loaded_module_is_cut_further(tmp_path):
    in_epochs(pruning(0.25, at=4), folder=tmp_path, max_epochs=1)
    module = load_compressed(tmp_path / "step=8.ckpt", Net)
    fit(pruning(0.5, at=2), saving(tmp_path, every_n_train_steps=8), module=module,
        enable_checkpointing=True, max_epochs=1)  # fmt: skip
    assert widths(module) == HALF
    assert same_weights(load_compressed(tmp_path / "step=8-v1.ckpt", Net), module)
