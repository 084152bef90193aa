"""What a fit holds beside the weights, over a cut in its middle."""

import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lit_compress import ChannelPenalty, Schedule
from lit_compress.callbacks.lightning.weight_averages import averaged_modules
from lit_compress.callbacks.pruning.cut_in_fit import cut_in_fit
from lit_compress.measure import count_macs
from tests.callbacks.channel_fits import (
    HALF,
    AcrossCut,
    Watch,
    WideNet,
    fit,
    pruning,
    widths,
)
from tests.callbacks.nets import ManualNet, Net, loader, same_weights, trainer

ROUNDS = Schedule("linear", begin=2, end=10, update_every=4)  # at 6 and at 10

# --- Optimizers -----------------------------------------------------------------------------------


class OtherNet(Net):
    """Takes its optimizer from the outside."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        return self.make(self)


def of(kind, **arguments):
    return lambda module: kind(module.parameters(), lr=0.02, **arguments)


def two_param_groups(module):
    decayed = [p for p in module.parameters() if p.dim() > 1]
    rest = [p for p in module.parameters() if p.dim() <= 1]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest}], lr=0.02)


OPTIMIZERS = {
    "sgd": of(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": of(torch.optim.Adam, amsgrad=True),
    "adamw foreach": of(torch.optim.AdamW, foreach=True),
    "adamw fused": of(torch.optim.AdamW, fused=True),
    "adafactor": of(torch.optim.Adafactor),
    "rmsprop": of(torch.optim.RMSprop, momentum=0.5, centered=True),
    "adagrad": of(torch.optim.Adagrad),
    "param groups": two_param_groups,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_optimizer_state_that_stay_keep_their_bits(name):
    across = AcrossCut()
    module = fit(*across.around(pruning(schedule=ROUNDS)), module=OtherNet(OPTIMIZERS[name]))
    assert across.compared == 2
    assert widths(module) == HALF
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 3, "max_epochs": 4},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"num_sanity_val_steps": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("importance", ["l2", "taylor", "apoz"])
def test_every_trainer(settings, importance):
    across = AcrossCut()
    callback = pruning(schedule=ROUNDS, importance=importance, penalty=ChannelPenalty(0.1))
    module = fit(*across.around(callback), **settings)
    assert across.compared == 2
    assert widths(module) == HALF


@pytest.mark.parametrize("make", [OPTIMIZERS["sgd"], OPTIMIZERS["adamw fused"]])
def test_a_gradient_scaler(make):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    across = AcrossCut()
    callback = pruning(schedule=ROUNDS, penalty=ChannelPenalty(0.1))
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    module = fit(*across.around(callback), module=OtherNet(make), plugins=[plugin])
    assert across.compared == 2
    assert scaler.get_scale() > 8.0  # it went on growing
    assert widths(module) == HALF


def test_the_penalty_is_as_strong_under_a_gradient_scaler():
    """Fused optimizers unscale the gradients themselves, after the hook."""

    def trained(scale):
        pl.seed_everything(1, verbose=False)
        module = OtherNet(OPTIMIZERS["adamw fused"])
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        callback = pruning({"4": 0.5}, at=99, penalty=ChannelPenalty(5.0))
        return fit(callback, module=module, plugins=[plugin], max_steps=3).model[4].weight

    torch.testing.assert_close(trained(1024.0), trained(1.0), rtol=1e-2, atol=1e-3)


class Keeping(Net):
    """Keeps its losses with their graphs, and so autograd's view of the old weights."""

    def training_step(self, batch, batch_idx):
        self.losses = [*getattr(self, "losses", []), super().training_step(batch, batch_idx)]
        return self.losses[-1]


@pytest.mark.parametrize("importance", ["l2", "taylor"])
def test_graphs_of_earlier_steps_may_live_on(importance):
    module = fit(pruning(schedule=ROUNDS, importance=importance), module=Keeping)
    assert len(module.losses) == 16
    assert widths(module) == HALF
    assert same_weights(module, fit(pruning(schedule=ROUNDS, importance=importance)))


def test_hooks_on_parameters_live_on():
    seen = []
    module = Net()
    weight = module.model[4].weight
    weight.register_hook(lambda gradient: seen.append(gradient.shape[0]))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape[0]))
    fit(pruning(at=5), module=module, max_steps=8)
    assert seen == [16] * 10 + [8] * 6


def test_accumulated_gradients_are_cut_with_their_weights():
    """Batches of one epoch are summed in threes; the cut comes after the last one, of two."""
    sums = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for parameter in pl_module.parameters():
                assert parameter.grad.shape == parameter.shape
            sums.append(pl_module.model[0].weight.grad.shape[0])

    class CutInBetween(pl.Callback):
        """Cuts when the gradients of the first of three batches are there."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                network, groups = pl_module.model, pruner.groups
                keep = torch.arange(groups.num_channels) % 2 == 0
                before = network[4].weight.grad.clone()
                cut_in_fit(trainer, pl_module, network, groups, keep)
                assert torch.equal(network[4].weight.grad, before[::2, ::2])

    pruner = pruning(at=99)
    module = fit(pruner, CutInBetween(), Look(), accumulate_grad_batches=3, max_epochs=1)
    assert sums == [8, 4, 4]
    assert widths(module) == HALF


def test_a_learning_rate_schedule_goes_on():
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    rates = {}

    class Rates(pl.Callback):
        def __init__(self, name):
            self.rates = rates.setdefault(name, [])

        def on_train_batch_end(self, trainer, *args):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(Rates("plain"), module=Scheduled())
    fit(pruning(schedule=ROUNDS), Rates("cut"), module=Scheduled())
    assert rates["plain"] == rates["cut"]
    assert len(set(rates["cut"])) == 16


def test_manual_optimization_with_two_optimizers():
    across = AcrossCut()
    callback = pruning(schedule=ROUNDS, penalty=ChannelPenalty(0.1))
    module = fit(*across.around(callback), module=ManualNet())
    assert across.compared == 2
    assert callback.ramp.end == 10  # batches, not optimizer steps
    assert widths(module) == HALF


# --- Networks -------------------------------------------------------------------------------------


def test_frozen_layers_are_cut_too():
    module = Net()
    module.model[0].requires_grad_(False)
    module.model[4].requires_grad_(False)
    weights = module.model[4].weight.clone()
    fit(pruning(at=5), module=module)
    assert widths(module) == HALF
    kept = {tuple(row.flatten().tolist()) for row in module.model[4].weight}
    assert not module.model[4].weight.requires_grad
    assert len(kept) == 8
    assert {v for row in kept for v in row} <= set(weights.flatten().tolist())


class Tied(pl.LightningModule):
    """Two layers with the same weight, and a head that has a name outside of the network too."""

    def __init__(self, lr=0.05):
        super().__init__()
        first, again, head = nn.Linear(36, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.head = head
        third = nn.Linear(12, 12)
        third.weight = again.weight
        self.model = nn.Sequential(
            nn.Flatten(), first, nn.ReLU(), again, nn.ReLU(), third, nn.ReLU(), head
        )

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_tied_weights_stay_tied():
    callback = pruning(at=5)
    module = fit(callback, EMAWeightAveraging(decay=0.5), module=Tied())
    layers = [layer for layer in module.model if isinstance(layer, nn.Linear)]
    assert sum(callback.kept.values()) == sum(callback.plan.kept.values())
    assert module.model[3].weight is module.model[5].weight
    assert module.head is module.model[7]
    for layer in layers:
        assert layer.weight.shape == (layer.out_features, layer.in_features)
        assert layer.in_features == 6 or layer is layers[0]
    assert layers[-1].weight.shape == (4, 6)


class Compiled(Net):
    def __init__(self):
        super().__init__()
        self.model = torch.compile(self.model, backend="eager")


@pytest.mark.parametrize("kind", ["inside", "whole", "in place"])
def test_compiled_modules_are_compiled_anew(kind):
    plain = fit(pruning(schedule=ROUNDS))
    pl.seed_everything(1, verbose=False)
    module = Compiled() if kind == "inside" else Net()
    fitted = module
    if kind == "whole":
        fitted = torch.compile(module, backend="eager")
    if kind == "in place":
        module.model.compile(backend="eager")
    across = AcrossCut()
    callback = pruning(schedule=ROUNDS)
    pl.seed_everything(1, verbose=False)
    run = trainer(max_epochs=2, callbacks=across.around(callback))
    run.fit(fitted, loader())
    assert across.compared == 2
    assert widths(module) == HALF
    # "eager" runs the same operators.
    weights = zip(module.state_dict().values(), plain.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_a_compiled_module_is_really_compiled_after_the_cut():
    compiled = []

    def backend(graph, inputs):
        compiled.append([tuple(t.shape) for t in inputs if isinstance(t, nn.Parameter)])
        return graph.forward

    class Noted(Net):
        def __init__(self):
            super().__init__()
            self.model = torch.compile(self.model, backend=backend)

    torch.compiler.reset()
    fit(pruning(at=5), module=Noted())
    assert len(compiled) >= 2
    assert (8, 1, 3, 3) in compiled[0]
    assert (4, 1, 3, 3) in compiled[-1]


def test_as_many_cuts_as_wanted_are_compiled():
    """More than torch compiles one function again before it gives up on it."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(max(t.shape[0] for t in inputs if isinstance(t, nn.Parameter)))
        return graph.forward

    class Noted(WideNet):
        def __init__(self):
            super().__init__()
            self.model = torch.compile(self.model, backend=backend)

    torch.compiler.reset()
    every_step = Schedule("linear", begin=0, end=13, update_every=1)
    fit(pruning(schedule=every_step), module=Noted)
    assert len(set(compiled)) == 14
    assert compiled[-1] == 48


# --- Averages, loggers ----------------------------------------------------------------------------


class LookAtAverage(pl.Callback):
    """Notes the average as it finds it."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        (average,) = averaged_modules(trainer)
        self.found.append({n: t.clone() for n, t in average.state_dict().items()})


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_are_cut_to_the_same_channels(kind, first):
    average = (
        EMAWeightAveraging(decay=0.9)
        if kind == "ema"
        else StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    )

    def first_channels(network, groups):  # every other one, the first group then the second
        return -(torch.arange(float(groups.num_channels)) % 2)

    before, after = LookAtAverage(), LookAtAverage()
    cut = [before, pruning(at=19, importance=first_channels), after]
    module = fit(*([average, *cut] if first else [*cut, average]), max_epochs=4)
    dense, slim = before.found[18], after.found[18]
    assert torch.equal(slim["model.0.weight"], dense["model.0.weight"][::2])
    assert torch.equal(slim["model.1.running_var"], dense["model.1.running_var"][::2])
    assert torch.equal(slim["model.4.weight"], dense["model.4.weight"][::2, ::2])
    assert widths(module) == HALF


def test_loggers_get_the_costs_and_the_channels(tmp_path):
    watch = Watch()
    logger = CSVLogger(tmp_path)
    module = fit(pruning(schedule=ROUNDS), watch, logger=logger, log_every_n_steps=1)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["channels/total"]]
    found = [
        [float(row[f"channels/{n}"]) for n in ("total", "group/0", "group/4", "num_params", "macs")]
        for row in rows
    ]
    params = sum(p.numel() for p in module.model.parameters())
    macs = count_macs(module.model, torch.zeros(1, 1, 6, 6))
    assert [row["step"] for row in rows] == ["5", "9"]  # after six and after ten steps
    assert [row[:3] for row in found] == [[18, 6, 12], [12, 4, 8]]
    assert found[-1][3:] == [params, macs]
