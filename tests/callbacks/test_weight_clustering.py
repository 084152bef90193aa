import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lit_compress.callbacks.magnitude_sparsity import MagnitudeSparsity
from lit_compress.callbacks.pruning.channel_pruning import ChannelPruning
from lit_compress.callbacks.weight_clustering import WeightClustering
from lit_compress.compress.packing.packed_file import read_packed, write_packed
from lit_compress.compress.schedules import Schedule
from tests.callbacks.nets import ManualNet, Net, loader, same_weights, trainer, zeros

NAMES = ("model.0.weight", "model.4.weight", "model.8.weight")
DEPTHWISE = "model.3.weight"


def fit(*callbacks, module=None, data=None, ckpt_path=None, **kwargs):
    torch.manual_seed(1)
    module = module or Net()
    trainer(callbacks=list(callbacks), **kwargs).fit(module, data or loader(), ckpt_path=ckpt_path)
    return module


def distinct(module, names=NAMES):
    return [len(torch.unique(module.get_parameter(name).detach())) for name in names]


class Watch(pl.Callback):
    """The numbers of distinct values, the zeros and a weight after each step."""

    def __init__(self):
        self.counts, self.zeros, self.heads = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.counts.append(max(distinct(pl_module)))
        self.zeros.append(zeros(pl_module, list(NAMES)))
        self.heads.append(pl_module.model[8].weight.detach().clone())


# --- Few values after every step ------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kmeans++", "density", "linear"])
@pytest.mark.parametrize("begin", [0.0, 5, 0.5])
def test_weights_have_few_values_from_the_begin_on(init, begin):
    watch = Watch()
    callback = WeightClustering(8, init, begin)
    module = fit(callback, watch, max_epochs=2)
    first = begin if isinstance(begin, int) else round(begin * 16)
    assert [count <= 8 for count in watch.counts] == [step >= first for step in range(1, 17)]
    assert distinct(module, [DEPTHWISE])[0] > 8
    assert callback.clustered_names == set(NAMES)
    assert not torch.equal(watch.heads[-1], watch.heads[-2])  # its values are trained


@pytest.mark.parametrize(
    "kwargs",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"max_steps": 13, "max_epochs": -1},
    ],
    ids=str,
)
def test_they_stay_few_under_every_trainer(kwargs):
    watch = Watch()
    module = fit(WeightClustering(6), watch, **kwargs)
    assert max(watch.counts) <= 6
    assert max(distinct(module)) <= 6


def test_a_gradient_scaler_that_skips_steps():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    watch = Watch()
    module = fit(WeightClustering(6), watch, plugins=[plugin], gradient_clip_val=1.0, max_epochs=8)
    assert max(watch.counts) <= 6
    assert torch.equal(watch.heads[0], watch.heads[1])  # skipped
    assert not torch.equal(watch.heads[0], watch.heads[-1])
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_they_stay_few_under_every_optimizer(optimizer):
    class Other(Net):
        def configure_optimizers(self):
            return optimizer(self.parameters(), lr=1e-2, weight_decay=0.1)

    watch = Watch()
    fit(WeightClustering(6, begin=5), watch, module=Other())
    assert max(watch.counts[5:]) <= 6


def test_manual_optimization_with_two_optimizers():
    watch = Watch()
    fit(WeightClustering(6, begin=0.25), watch, module=ManualNet())
    assert max(watch.counts[8:]) <= 6
    assert min(watch.counts[:7]) > 6


def test_a_compiled_module():
    torch.manual_seed(1)
    module, callback = Net(), WeightClustering(6)
    trainer(callbacks=[callback], max_epochs=1).fit(
        torch.compile(module, backend="aot_eager"), loader()
    )
    assert callback.clustered_names == set(NAMES)
    assert max(distinct(module)) <= 6


def test_each_layer_can_have_its_own_number():
    callback = WeightClustering({"model.8": 4, "model.[04]": 16})
    module = fit(callback, max_epochs=1)
    assert distinct(module, [NAMES[2]])[0] <= 4
    assert 4 < max(distinct(module, NAMES[:2])) <= 16


def test_gradients_are_tied_before_they_are_clipped():
    class Norm(Net):
        def on_before_optimizer_step(self, optimizer):
            gradient = self.model[8].weight.grad
            indices = callback.clusters["model.8.weight"].indices
            spread = [float(gradient[indices == j].std()) for j in indices.unique()]
            self.spread = max(value for value in spread if value == value)

    callback = WeightClustering(6)
    module = fit(callback, module=Norm(), gradient_clip_val=0.5, max_epochs=1)
    assert module.spread < 1e-7


def test_values_that_are_not_trainable_stay_while_the_rest_learns():
    watch = Watch()
    before = Net()
    module = fit(WeightClustering(6, begin=3, trainable=False), watch)
    assert all(torch.equal(head, watch.heads[2]) for head in watch.heads[3:])
    assert not torch.equal(module.model[8].bias, before.model[8].bias)


def test_training_the_values_helps():
    class Losses(pl.Callback):
        def __init__(self):
            self.losses = []

        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            self.losses.append(float(outputs["loss"]))

    def last_loss(*callbacks):
        losses = Losses()
        fit(*callbacks, losses, max_epochs=40)
        return sum(losses.losses[-8:]) / 8, sum(losses.losses[:8]) / 8

    free, begin = last_loss()
    tied, _ = last_loss(WeightClustering(16))
    fixed, _ = last_loss(WeightClustering(16, trainable=False))
    assert free < tied < fixed < begin


# --- With the others ------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_masks_stay_when_they_are_final_before(optimizer):
    class Other(Net):
        def configure_optimizers(self):
            return optimizer(self.parameters(), lr=1e-2, weight_decay=0.1)

    watch = Watch()
    sparsity = MagnitudeSparsity(0.7, schedule=Schedule(begin=0.0, end=0.5))
    module = fit(sparsity, WeightClustering(5, begin=0.5), watch, module=Other())
    assert zeros(module, list(NAMES)) == round(0.7 * 456) == watch.zeros[-1]
    assert set(watch.zeros[16:]) == {watch.zeros[-1]}
    assert max(watch.counts[15:]) <= 5
    assert not any(torch.signbit(w[w == 0]).any() for w in map(module.get_parameter, NAMES))


def test_a_sparse_model_stays_sparse_without_masks():
    module = fit(MagnitudeSparsity(0.7))
    before = zeros(module, list(NAMES))
    fit(WeightClustering(5), module=module)
    assert zeros(module, list(NAMES)) == before
    other = fit(MagnitudeSparsity(0.7))
    fit(WeightClustering(5, preserve_sparsity=False), module=other)
    assert zeros(other, list(NAMES)) < before


@pytest.mark.parametrize("reconstruct", [False, True])
def test_channels_cut_after_the_clustering_take_their_clusters_along(reconstruct):
    watch = Watch()
    pruning = ChannelPruning(
        0.5,
        schedule=Schedule("constant", begin=8, end=8, update_every=1),
        reconstruct=reconstruct,
        round_to=4,
    )
    module = fit(pruning, WeightClustering(6, begin=4), watch, max_epochs=2)
    assert module.model[4].weight.shape[0] < 16
    assert max(watch.counts[4:]) <= 6


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_an_exponential_average_is_clustered(first, tmp_path):
    callback, ema = WeightClustering(6, begin=10), EMAWeightAveraging(decay=0.9)
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    callbacks = [callback, ema, save] if first else [ema, callback, save]
    module = fit(*callbacks, enable_checkpointing=True)
    assert max(distinct(module)) <= 6
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert max(len(torch.unique(saved[name])) for name in NAMES) <= 6
    assert "update_parameters" not in vars(ema._average_model)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_stochastic_average_is_clustered(first):
    callback = WeightClustering(6)
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    module = fit(*([callback, swa] if first else [swa, callback]))
    assert max(distinct(module)) <= 6


# --- Checkpoints ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("averaging", [False, True], ids=["plain", "ema"])
@pytest.mark.parametrize("trainable", [True, False])
def test_resume_is_bit_identical(tmp_path, averaging, trainable):
    def callbacks():
        sparsity = MagnitudeSparsity(0.5, schedule=Schedule(begin=0, end=6, update_every=1))
        averages = [EMAWeightAveraging(decay=0.8)] if averaging else []
        return [sparsity, WeightClustering(6, begin=0.5, trainable=trainable), *averages]

    save = save_each(tmp_path, every_n_train_steps=1)
    options = {"max_epochs": 3, "enable_checkpointing": True}
    whole = fit(*callbacks(), save, data=Counting(), **options)
    for step in (3, 8, 11, 12, 13, 16, 22):
        file = tmp_path / f"step={step}.ckpt"
        resumed = fit(*callbacks(), data=Counting(), ckpt_path=file, max_epochs=3)
        assert same_weights(whole, resumed), step
    assert max(distinct(whole)) <= 6


def test_a_resumed_run_keeps_its_begin_when_it_is_made_longer(tmp_path):
    save = save_each(tmp_path, every_n_train_steps=4)
    fit(WeightClustering(6, begin=0.5), save, enable_checkpointing=True, max_epochs=2)
    watch = Watch()
    file = tmp_path / "step=4.ckpt"
    fit(WeightClustering(6, begin=0.5), watch, ckpt_path=file, max_epochs=8, data=Counting())
    assert [count <= 6 for count in watch.counts[:6]] == [False] * 3 + [True] * 3


def test_other_arguments_cluster_anew(tmp_path, caplog):
    save = save_each(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True)
    fit(WeightClustering(16), save, enable_checkpointing=True, max_epochs=2)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        module = fit(WeightClustering(4), ckpt_path=tmp_path / "step=16.ckpt", max_epochs=3)
    assert max(distinct(module)) <= 4
    assert "written under other arguments (num_clusters is 4, was 16)" in caplog.text


def test_a_checkpoint_is_plain_safe_to_open_and_packs_small(tmp_path):
    save = save_each(tmp_path, every_n_train_steps=20)
    module = fit(WeightClustering(6), save, enable_checkpointing=True)
    file = next(tmp_path.glob("*.ckpt"))
    saved = torch.load(file, weights_only=True)
    assert saved["state_dict"].keys() == Net().state_dict().keys() == module.state_dict().keys()
    assert max(len(torch.unique(saved["state_dict"][name])) for name in NAMES) <= 6
    packed = tmp_path / "model.packed"
    write_packed(packed, module.state_dict())
    loaded = Net()
    loaded.load_state_dict(read_packed(packed).state_dict)
    assert same_weights(module, loaded)


def test_clusters_of_another_selection_are_refused(tmp_path):
    save = save_each(tmp_path, every_n_train_steps=20)
    fit(WeightClustering(6), save, enable_checkpointing=True)
    file = next(tmp_path.glob("*.ckpt"))
    saved = torch.load(file, weights_only=True)
    (key,) = saved["callbacks"].keys() & {WeightClustering(6).state_key}
    shapes = saved["callbacks"][key]["weights"]["shapes"]
    shapes["model.9.weight"] = shapes.pop("model.8.weight")
    torch.save(saved, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"'model.8.weight' has shape None in the checkpoint and"):
        fit(WeightClustering(6), ckpt_path=tmp_path / "foreign.ckpt")


def test_a_truncated_checkpoint_is_refused_and_left_as_it_is(tmp_path):
    save = save_each(tmp_path, every_n_train_steps=20)
    fit(WeightClustering(6), save, enable_checkpointing=True)
    file = next(tmp_path.glob("*.ckpt"))
    half = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(half)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint .* Resume from another"):
        fit(WeightClustering(6), ckpt_path=file)
    assert file.read_bytes() == half


def test_a_fit_after_validating_a_checkpoint_begins_anew(tmp_path):
    first = trainer(max_epochs=1, callbacks=[WeightClustering(6)])
    first.fit(Net(), loader())
    first.save_checkpoint(tmp_path / "clustered.ckpt")
    again = WeightClustering(6, begin=6)
    second = trainer(max_epochs=1, limit_train_batches=3, callbacks=[again])
    second.validate(Net(), loader(), ckpt_path=tmp_path / "clustered.ckpt", verbose=False)
    fresh = Net()
    with pytest.warns(UserWarning, match="training ended before step 6, where the weights are"):
        second.fit(fresh, loader())
    assert again.clustered_names == frozenset()
    assert min(distinct(fresh)) > 6


# --- Several of them, and again -------------------------------------------------------------------


def test_two_callbacks_on_disjoint_layers(tmp_path):
    def callbacks():
        return [
            WeightClustering(8, layer_types=["conv"]),
            WeightClustering(4, begin=8, layers=["model.8"]),
        ]

    save = save_each(tmp_path, every_n_train_steps=16)
    module = fit(*callbacks(), save, enable_checkpointing=True)
    assert max(distinct(module, NAMES[:2])) <= 8
    assert distinct(module, [NAMES[2]])[0] <= 4
    assert same_weights(module, fit(*callbacks(), ckpt_path=tmp_path / "step=16.ckpt"))


def test_the_callback_can_be_used_again():
    callback = WeightClustering(6)
    first = fit(callback)
    other = fit(callback, module=Net(lr=0.01))
    assert max(distinct(first)) <= 6
    assert max(distinct(other)) <= 6
    assert same_weights(fit(copy.deepcopy(WeightClustering(6))), first)


def test_nothing_is_left_on_the_optimizers():
    module, runner = Net(), trainer(callbacks=[WeightClustering(6)])
    runner.fit(module, loader())
    assert not runner.optimizers[0]._optimizer_step_post_hooks


def test_torchs_random_numbers_are_left_alone():
    class Draw(pl.Callback):
        def on_train_batch_end(self, *args):
            self.drawn = torch.rand(3)

    drawn = []
    for callbacks in ([], [WeightClustering(6, begin=2)]):
        draw = Draw()
        fit(*callbacks, draw, max_epochs=1)
        drawn.append(draw.drawn)
    assert torch.equal(*drawn)


# --- Words ----------------------------------------------------------------------------------------


def test_every_logger_gets_clusters_and_inertia(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(WeightClustering(6, begin=4), logger=logger, log_every_n_steps=1)
    header, *lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    (row,) = [
        found
        for line in lines
        if (found := dict(zip(header.split(","), line.split(","), strict=True)))[
            "clustering/relative_error"
        ]
    ]
    assert row["step"] == "3"  # the fourth
    assert 0 < float(row["clustering/relative_error"]) < 0.1
    for name in NAMES:
        assert float(row[f"clustering/clusters/{name}"]) == 6
        assert float(row[f"clustering/inertia/{name}"]) > 0


def test_it_says_what_it_chose_and_left(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(WeightClustering(6), max_epochs=1)
    assert "3 weights are clustered." in caplog.text
    assert "model.3.weight: its type, depthwise" in caplog.text


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clusters": 1}, "num_clusters is 1, expected a whole number from 2 to 256"),
        ({"num_clusters": 257}, "num_clusters is 257, expected"),
        ({"num_clusters": 16.0}, "num_clusters is 16.0, expected"),
        ({"num_clusters": "16"}, "num_clusters is '16', expected"),
        ({"num_clusters": {}}, "num_clusters is an empty mapping"),
        ({"num_clusters": {"a": 0}}, r"num_clusters\['a'\] is 0"),
        ({"num_clusters": {"a": 4}, "layers": ["a"]}, "Leave layers out"),
        ({"init": "random"}, r"init is 'random', expected one of kmeans\+\+, density, linear"),
        ({"begin": 1.5}, r"begin is 1.5, expected a fraction of the run in \[0, 1\]"),
        ({"begin": -1}, "begin is -1, expected"),
        ({"begin": "0"}, "begin is '0', expected"),
        ({"trainable": 1}, "trainable is 1, expected true or false"),
        ({"preserve_sparsity": "yes"}, "preserve_sparsity is 'yes', expected true or false"),
        ({"layers": "model.8"}, "layers is the string 'model.8'; give a list"),
        ({"ignored_layers": "model.8"}, "ignored_layers is the string 'model.8'; give a list"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightClustering(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["model.conv"]}, "layers holds the pattern 'model.conv', which matches none"),
        ({"ignored_layers": ["*"]}, "no layer is left"),
        ({"layer_types": ["dense"]}, "layer_types holds 'dense', expected some of"),
        ({"num_clusters": {"head": 4}}, "holds the pattern 'head'"),
    ],
    ids=str,
)
def test_bad_selections_are_refused_before_training(arguments, message):
    module = Net()
    before = copy.deepcopy(module)
    with pytest.raises(ValueError, match=message):
        fit(WeightClustering(**arguments), module=module)
    assert same_weights(before, module)


@pytest.mark.parametrize("later", [MagnitudeSparsity(0.5), ChannelPruning(0.5)], ids=["s", "c"])
def test_pruning_after_clustering_is_refused_in_setup(later):
    order = "Order the callbacks as ChannelPruning, MagnitudeSparsity, WeightClustering"
    with pytest.raises(MisconfigurationException, match=f"comes after WeightClustering.* {order}"):
        fit(WeightClustering(6, begin=0.5), later)


@pytest.mark.parametrize(
    ("schedule", "begin", "message"),
    [
        (Schedule(end=0.5), 0.0, "until step 16, and WeightClustering .* step 0; .* begin=16,"),
        (Schedule(end=0.5), 15, "until step 16, and WeightClustering clusters it at step 15"),
        (
            Schedule(begin=0, end=2, update_every=1, unit="epoch"),
            0.25,
            "until epoch 2, and WeightClustering clusters it at step 8; .* Set begin=16,",
        ),
    ],
)
def test_masks_that_move_after_the_clustering_are_refused(schedule, begin, message):
    module = Net()
    before = copy.deepcopy(module)
    with pytest.raises(MisconfigurationException, match=message):
        fit(
            MagnitudeSparsity(0.5, schedule=schedule),
            WeightClustering(6, begin=begin),
            module=module,
        )
    assert same_weights(before, module)


def test_masks_in_epochs_may_end_where_the_clustering_begins():
    schedule = Schedule(begin=0, end=2, update_every=1, unit="epoch")
    module = fit(MagnitudeSparsity(0.5, schedule=schedule), WeightClustering(6, begin=16))
    assert zeros(module, list(NAMES)) == 228
    assert max(distinct(module)) <= 6


def test_masks_of_other_layers_may_move():
    convs = MagnitudeSparsity(0.5, layer_types=["conv"])
    module = fit(convs, WeightClustering(6, layer_types=["linear"]))
    assert zeros(module, list(NAMES[:2])) == 100
    assert distinct(module, [NAMES[2]])[0] <= 6


def test_masks_that_would_be_filled_are_refused():
    sparsity = MagnitudeSparsity(0.5, schedule=Schedule(begin=0, end=4, update_every=1))
    with pytest.raises(MisconfigurationException, match="set preserve_sparsity=True"):
        fit(sparsity, WeightClustering(6, begin=0.5, preserve_sparsity=False))


def test_two_callbacks_on_one_weight_are_refused():
    with pytest.raises(MisconfigurationException, match="two .* cluster 'model.8.weight'"):
        fit(WeightClustering(6, layers=["model.8"]), WeightClustering(6))


def test_fractions_of_an_endless_run_are_refused():
    with pytest.raises(
        MisconfigurationException, match=r"begin is 0\.5, a fraction of .* no known length"
    ):
        fit(WeightClustering(6, begin=0.5), max_epochs=-1, max_time="00:00:00:20")


def test_a_nan_loss_stops_the_run_before_the_weights_change():
    class Diverges(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.nan if self.trainer.global_step == 5 else loss

    module = Diverges()
    with pytest.raises(ValueError, match="loss is NaN at step 5; .*the last checkpoint is intact"):
        fit(WeightClustering(6), module=module)
    assert max(distinct(module)) <= 6


def test_sharded_strategies_are_refused(monkeypatch):
    from lightning.pytorch.strategies import FSDPStrategy

    runner = trainer()
    monkeypatch.setattr(
        type(runner), "strategy", property(lambda _: FSDPStrategy.__new__(FSDPStrategy))
    )
    with pytest.raises(MisconfigurationException, match="FSDPStrategy shards them; use strategy="):
        WeightClustering(6).setup(runner, Net(), "fit")


def test_a_tied_weight_is_clustered_under_the_name_that_was_chosen():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.model[8] = nn.Linear(64, 4, bias=False)
            self.model.insert(0, nn.Identity())
            self.model[0].table = nn.Embedding(4, 64)
            self.model[9].weight = self.model[0].table.weight

    module, callback = Tied(), WeightClustering(3)
    fit(callback, module=module)
    assert "model.9.weight" in callback.clustered_names
    assert len(torch.unique(module.model[0].table.weight)) <= 3
