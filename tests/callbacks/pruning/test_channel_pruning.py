import lightning.pytorch as pl
import pytest
import torch

from lit_compress import ChannelPenalty, ChannelPruning, Schedule
from lit_compress.measure import count_macs
from tests.callbacks.channel_fits import (
    HALF,
    WIDTHS,
    Watch,
    WideNet,
    fit,
    pruning,
    widths,
)
from tests.callbacks.nets import Net, loader, trainer

# --- When channels go -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule("constant", begin=0, end=0), [4] * 16),
        (Schedule("constant", begin=3, end=3), [8] * 2 + [4] * 14),
        (Schedule("constant", begin=1, end=1, unit="epoch"), [8] * 7 + [4] * 9),
        (Schedule("constant", begin=0.5, end=0.5), [8] * 7 + [4] * 9),
        (
            Schedule("linear", begin=2, end=10, update_every=2),
            [8] * 3 + [7] * 2 + [6] * 2 + [5] * 2 + [4] * 7,
        ),
        (
            Schedule("cubic", begin=2, end=10, update_every=2),
            [8] * 3 + [6] * 2 + [5] * 2 + [4] * 9,
        ),
    ],
    ids=["start", "step", "epoch", "fraction", "rounds", "cubic"],
)
def test_channels_go_when_the_schedule_says(schedule, expected):
    watch, callback = Watch(), pruning(schedule=schedule)
    module = fit(callback, watch)
    assert watch.firsts == expected
    assert watch.start == (HALF if schedule.begin == 0 else WIDTHS)
    assert widths(module) == callback.kept == HALF
    assert callback.plan.kept == HALF
    assert callback.plan.channels == WIDTHS
    assert [g.num_channels for g in callback.groups.groups] == [4, 8]


def test_groups_go_one_after_another():
    watch = Watch()
    schedule = Schedule("linear", begin=2, end=6, update_every=2)
    fit(pruning(spread="layers", schedule=schedule), watch)
    steps = [WIDTHS] * 3 + [{"0": 4, "4": 16}] * 2 + [HALF] * 11
    assert watch.seen == steps


def test_a_cut_comes_before_the_validation_of_its_epoch():
    seen = []

    class Look(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            seen.append(widths(pl_module)["0"])

    at_the_end = Schedule("constant", begin=1, end=1, unit="epoch")
    pl.seed_everything(1, verbose=False)
    run = trainer(
        max_epochs=2, callbacks=[Look(), pruning(schedule=at_the_end)], num_sanity_val_steps=0
    )
    run.fit(Net(), loader(), loader(16))
    assert seen == [4, 4]


def test_a_run_that_ends_too_early_says_so():
    with pytest.warns(UserWarning, match="training ended before step 99, .* not all channels"):
        fit(pruning(at=99))
    with pytest.warns(UserWarning, match="schedule ends at step 99, the run at 16"):
        fit(pruning(at=99))


# --- What is to be left ---------------------------------------------------------------------------


def cost(module):
    return {
        "macs": count_macs(module.model.eval(), torch.zeros(1, 1, 6, 6)),
        "params": sum(p.numel() for p in module.parameters()),
    }


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9, 1.0])
def test_a_ratio_of_the_cost_is_met_within_a_percent(kind, ratio, allocation):
    dense = cost(WideNet())[kind]
    target = {f"target_{kind}_ratio": ratio}
    module = fit(pruning(None, allocation=allocation, **target), module=WideNet(), max_steps=1)
    assert 0.99 * ratio * dense <= cost(module)[kind] <= ratio * dense


def test_a_size_is_met_within_a_percent():
    module = fit(pruning(None, target_size_bytes=20_000), module=WideNet(), max_steps=1)
    size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    assert 0.95 * 20_000 <= size <= 20_000


def test_a_latency_is_met_by_measuring_slim_copies(monkeypatch):
    measured = []

    def fake(network, example):
        class Result:
            median_ms = network[0].out_channels + network[4].out_channels / 2

        measured.append(Result.median_ms)
        return [Result]

    monkeypatch.setattr("lit_compress.callbacks.pruning.channel_way.measure_latency", fake)
    callback = pruning(None, target_latency_ms=50.0)
    module = fit(callback, module=WideNet(), max_steps=1)
    found = module.model[0].out_channels + module.model[4].out_channels / 2
    assert 0.95 * 50 <= found <= 50
    assert max(measured) == 112
    assert len(measured) < 20


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ([0.25, 0.75], {"0": 6, "4": 4}),
        ({"4": 0.5}, {"0": 8, "4": 8}),
        ({"0": 0.75, "*": 0.25}, {"0": 2, "4": 12}),
        (0.0, WIDTHS),
        (0, WIDTHS),
    ],
    ids=str,
)
def test_ratios_for_each_group(ratio, expected):
    assert widths(fit(pruning(ratio), max_steps=1)) == expected


def test_a_plan_from_a_file(tmp_path):
    first = pruning([0.25, 0.75])
    fit(first, max_steps=1)
    first.plan.save(tmp_path / "plan.json")
    for plan in (first.plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert widths(fit(pruning(None, plan=plan), max_steps=1)) == {"0": 6, "4": 4}


def test_channels_are_rounded_and_layers_ignored():
    assert widths(fit(ChannelPruning(0.4), max_steps=1)) == {"0": 5, "4": 8}
    assert widths(fit(pruning(0.4, round_to=4), max_steps=1)) == {"0": 4, "4": 8}
    module = fit(pruning(0.5, ignored_layers=["4"]), max_steps=1)
    assert widths(module) == {"0": 4, "4": 16}


def test_the_least_important_channels_of_the_whole_model_go():
    def scores(network, groups):
        return torch.cat([torch.arange(8.0) + 100, torch.arange(16.0)])

    callback = pruning(0.25, allocation="global", importance=scores)
    assert widths(fit(callback, max_steps=1)) == {"0": 8, "4": 10}


@pytest.mark.parametrize(
    "importance", ["l1", "l2", "bn_scale", "taylor", "fpgm", "apoz", "lamp", "random"]
)
def test_every_importance_can_choose(importance):
    watch = Watch()
    schedule = Schedule("linear", begin=0, end=4, update_every=2)
    module = fit(pruning(importance=importance, schedule=schedule), watch, max_steps=6)
    assert widths(module) == HALF
    assert watch.firsts == [8, 6, 6, 4, 4, 4]


def test_taylor_keeps_what_the_loss_needs():
    module = Net()
    with torch.no_grad():
        module.model[8].weight.view(4, 16, 4)[:, ::2] = 0  # the loss does not see every other one
    odd = module.model[4].weight[1::2].detach().clone()
    fit(pruning({"4": 0.5}, importance="taylor"), module=module, max_steps=1, seed=3)
    module.model[4].weight.data.sub_(odd)
    assert module.model[4].weight.abs().max() < 0.05  # one step away from where they were


def test_reconstruction_and_statistics_bring_the_slim_model_nearer():
    images = next(iter(loader(64, 64)))[0]

    @torch.no_grad()
    def distance(**arguments):
        pl.seed_everything(1, verbose=False)
        module = fit(module=Net(lr=0.0, weight_decay=0.0))  # only its statistics learn
        dense = module.eval().model(images)
        with torch.enable_grad():
            fit(pruning({"4": 0.5}, **arguments), module=module.train(), max_steps=1)
        return float((module.eval().model(images) - dense).square().mean())

    plain, better = distance(), distance(reconstruct=True)
    assert better < 0.5 * plain
    assert distance(recalibrate_batch_norm=True) != plain


# --- The penalty ----------------------------------------------------------------------------------


class Norms(pl.Callback):
    """How large the gradients are, and the channels that go before they do."""

    def __init__(self):
        self.norms = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        norms = pl_module.model[4].weight.flatten(1).norm(dim=1)
        if len(norms) == 16:
            self.norms.append(norms.detach().clone())


@pytest.mark.parametrize(("kind", "strength"), [("l2", 2.0), ("group_lasso", 0.5)])
def test_the_penalty_shrinks_the_channels_that_go(kind, strength):
    def scores(network, groups):
        return torch.arange(float(groups.num_channels))

    found = {}
    for penalty in (None, ChannelPenalty(strength, kind)):
        norms = Norms()
        fit(norms, pruning({"4": 0.5}, at=12, importance=scores, penalty=penalty))
        found[penalty is None] = norms.norms
    plain, pulled = found[True], found[False]
    assert torch.equal(plain[0], pulled[0])  # nothing at the very beginning
    assert (pulled[-1][:8] < 0.5 * plain[-1][:8]).all()
    assert (pulled[-1][8:] > 0.8 * plain[-1][8:]).all()


def test_the_penalty_leaves_the_other_gradients_alone():
    gradients = {}

    class Look(pl.Callback):
        def __init__(self, name):
            self.name = name

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 1:
                gradients[self.name] = {
                    n: p.grad.clone() for n, p in pl_module.named_parameters() if p.requires_grad
                }

    callback = pruning({"4": 0.5}, at=4, penalty=ChannelPenalty(0.5))
    fit(Look("before"), callback, Look("after"), max_steps=3)
    changed = {n for n, g in gradients["before"].items() if not g.equal(gradients["after"][n])}
    assert changed == {"model.4.weight", "model.4.bias"}
    difference = gradients["after"]["model.4.weight"] - gradients["before"]["model.4.weight"]
    assert int((difference.flatten(1).abs().sum(1) == 0).sum()) == 8
