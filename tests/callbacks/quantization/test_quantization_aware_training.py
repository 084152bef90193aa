import copy
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lit_compress.compress.quantization.network import is_quantized
from tests.callbacks.channel_fits import fit
from tests.callbacks.nets import ManualNet, Net, loader, trainer
from tests.callbacks.quantized_fits import (
    DropNet,
    Inline,
    Steps,
    equal,
    float_weights,
    integers,
    qat,
    quantizers,
)

LAYERS = ["0.weight", "3.weight", "4.weight", "8.weight"]


# --- An unmodified module -------------------------------------------------------------------------


def test_the_module_stays_what_it_was_and_gets_quantizers_beside():
    module = Net()
    keys, parameters = list(module.state_dict()), list(module.parameters())
    layers = list(module.model)
    fit(qat(), module=module, max_epochs=1)
    state = module.state_dict()
    assert [key for key in state if "quantization" not in key] == keys
    assert all(key.startswith("model.quantization.") for key in state.keys() - keys)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(module.model, layers, strict=True))
    assert isinstance(module.model, nn.Sequential)
    assert len(module.model) == len(layers)
    assert sorted(quantizers(module).weights) == sorted(n.replace(".", "/") for n in LAYERS)


def test_layers_in_the_module_itself():
    module = Inline()
    fit(qat(4, ranges="learned"), module=module, max_epochs=1)
    assert isinstance(module, Inline)
    assert is_quantized(module)
    assert sorted(module.quantization.weights) == ["conv/weight", "head/weight"]
    plain = Inline()
    plain.load_state_dict(float_weights(module))
    images = loader().dataset[:8][0]
    assert not torch.allclose(module.eval()(images), plain.eval()(images), atol=1e-4)


def test_a_named_network_and_nothing_else():
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x):
            return self.extra(self.model(x))

    module = fit(qat(network="extra"), module=Two, max_epochs=1)
    assert is_quantized(module.extra)
    assert not is_quantized(module.model)
    assert not is_quantized(module)


def test_two_networks_have_a_callback_each():
    class Pair(Net):
        def __init__(self):
            super().__init__()
            self.other = copy.deepcopy(self.model)

        def forward(self, x):
            return self.model(x) + self.other(x)

    module = fit(qat(8, network="model"), qat(3, network="other"), module=Pair, max_epochs=1)
    assert module.model.quantization.least_weight_bits == 8
    assert module.other.quantization.least_weight_bits == 3
    assert module.model.quantization.quantizing
    assert module.other.quantization.quantizing


# --- Integers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", ["observed", "learned"])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_weights_and_activations_are_on_grids(bits, ranges):
    module = fit(qat(bits, activation_bits=bits, ranges=ranges), max_epochs=1).eval()
    for name in LAYERS:
        steps = integers(module, name)
        assert int(steps.abs().max()) <= 2 ** (bits - 1) - 1
        assert len(steps.unique()) > 1
    seen = []
    module.model[8].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    module(loader(64).dataset[:][0])
    assert 1 < len(seen[0].unique()) <= 2**bits


def test_first_and_last_and_ignored_layers_may_stay():
    module = fit(
        qat(quantize_first_layer=False, quantize_last_layer=False, ignored_layers=["4"]),
        max_epochs=1,
    )
    assert list(quantizers(module).weights) == ["3/weight"]


def test_bits_by_layer_and_weights_alone():
    module = fit(qat(8, activation_bits=None, layer_bits={"8": 2}), max_epochs=1)
    assert int(integers(module, "8.weight").abs().max()) == 1
    assert int(integers(module, "4.weight").abs().max()) == 127
    assert not quantizers(module).activations


@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_bits_are_lost_one_after_the_other(ranges):
    def look(module):
        now = quantizers(module)
        reached = max(int(integers(module, n).abs().max()) for n in LAYERS) if now.quantizing else 0
        return now.least_weight_bits, reached

    steps = Steps(look)
    callback = qat(3, ranges=ranges, begin=2, freeze_ranges=8, initial_weight_bits=6)
    fit(callback, steps, max_epochs=1)
    assert steps.seen == [(6, 0), (6, 31), (6, 31), (5, 15), (5, 15), (4, 7), (4, 7), (3, 3)]


# --- When -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_before_the_beginning_the_run_is_what_it_would_be_without(ranges):
    plain, ours = Steps(float_weights), Steps(float_weights)
    options = {"module": DropNet, "max_epochs": 2, "val_check_interval": 4}
    fit_validated(plain, **options)
    fit_validated(qat(4, ranges=ranges, begin=11), ours, **options)
    assert len(plain.seen) == len(ours.seen) == 16
    same = [equal(a, b) for a, b in zip(plain.seen, ours.seen, strict=True)]
    assert same == [True] * 11 + [False] * 5


def fit_validated(*callbacks, module=Net, val=None, **settings):
    """A fit with validation, the sanity check included."""
    pl.seed_everything(1, verbose=False)
    made = module()
    trainer(callbacks=list(callbacks), **settings).fit(made, loader(), val or loader(16))
    return made


def test_learned_scales_wait_for_the_beginning():
    def look(module):
        return quantizers(module).weight("4.weight").scale.detach().clone()

    steps = Steps(look)
    fit(qat(4, ranges="learned", begin=5), steps, max_epochs=1)
    moved = [not torch.equal(a, b) for a, b in pairwise(steps.seen)]
    # They are calibrated once more after step 5, and trained from the next one on.
    assert moved == [False, False, False, True, True, True, True]


def test_batch_norms_are_frozen_over_validations_and_epochs():
    def look(module):
        norm = module.model[1]
        return norm.running_mean.clone(), int(norm.num_batches_tracked)

    steps = Steps(look)
    callback = qat(begin=2, freeze_batch_norm=5)
    module = fit_validated(callback, steps, max_epochs=2, val_check_interval=3)
    assert [count for _, count in steps.seen] == [1, 2, 3, 4, *[5] * 12]
    assert not torch.equal(steps.seen[3][0], steps.seen[4][0])
    assert all(torch.equal(mean, steps.seen[4][0]) for mean, _ in steps.seen[5:])
    assert all(part.training for part in module.modules())


def test_ranges_move_in_training_until_they_are_frozen():
    def look(module):
        return [float(q.high) for q in quantizers(module).activations.values()]

    class Huge(pl.Callback):
        seen = []

        def on_validation_batch_start(self, trainer, pl_module, batch, *args):
            batch[0].mul_(1000)

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                self.seen.append(look(pl_module))

    steps, huge = Steps(look), Huge()
    fit_validated(qat(freeze_ranges=5), steps, huge, max_epochs=1, val_check_interval=2)
    highs = steps.seen
    assert all(a != b for a, b in pairwise(highs[:5]))
    assert highs[5:] == [highs[4]] * 3
    assert huge.seen == highs[1::2]  # as the step before left them
    assert max(highs[-1]) < 100


def test_rounding_begins_with_ranges_of_that_moment():
    class Grow(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 3:
                pl_module.model[8].weight.data.mul_(100)

    steps = Steps(lambda m: float(quantizers(m).weight("8.weight").scale.detach().max()))
    fit(Grow(), qat(4, ranges="learned", begin=4), steps, max_epochs=1)
    assert steps.seen[3] > 50 * steps.seen[2]


def test_training_and_evaluation_modes_are_those_of_a_plain_run():
    class Modes(pl.Callback):
        def __init__(self):
            self.seen = []

        def note(self, trainer, pl_module):
            modes = {n: m.training for n, m in pl_module.named_modules() if "quantiz" not in n}
            self.seen.append((trainer.state.stage, modes))

        def on_train_batch_start(self, trainer, pl_module, *args):
            self.note(trainer, pl_module)

        def on_validation_batch_start(self, trainer, pl_module, *args):
            self.note(trainer, pl_module)

    plain, ours = Modes(), Modes()
    options = {"module": DropNet, "max_epochs": 1, "val_check_interval": 3}
    fit_validated(plain, **options)
    fit_validated(qat(), ours, **options)
    assert plain.seen == ours.seen
    assert {str(stage.value) for stage, _ in ours.seen} == {"sanity_check", "train", "validate"}
    training = [all(modes.values()) for stage, modes in ours.seen if stage.value == "train"]
    assert len(training) == 8
    assert all(training)


def test_dropout_is_active_and_batch_norm_follows_batches():
    class Look(pl.Callback):
        dropped, tracked = [], []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.tracked.append(int(pl_module.model[1].num_batches_tracked))
            a, b = (pl_module.model(batch[0]) for _ in range(2))
            self.dropped.append(not torch.equal(a, b))

    look = Look()
    module = fit_validated(qat(), look, module=DropNet, max_epochs=1, val_check_interval=4)
    assert all(look.dropped)
    assert look.tracked == [3 * step + 1 for step in range(8)]  # and twice in Look itself
    images = loader().dataset[:8][0]
    assert torch.equal(module.eval()(images), module(images))


# --- Every Trainer --------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", ["observed", "learned"])
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"accumulate_grad_batches": 3}, 3),
        ({"gradient_clip_val": 0.1}, 8),
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, 8),
        ({"precision": "bf16-mixed"}, 8),
        ({"precision": "bf16-true"}, 8),
        ({"max_steps": 5, "max_epochs": -1}, 5),
    ],
    ids=str,
)
def test_scales_are_trained_or_observed_under_every_trainer(settings, steps, ranges):
    def look(module):
        found = [q.scale.detach().clone() for q in quantizers(module).quantizers]
        return [scale.dtype for scale in found], found

    watch = Steps(look)
    callback = qat(4, ranges=ranges, begin=1)
    fit(callback, watch, **({"max_epochs": 1} | settings))
    dtypes, last = watch.seen[-1]
    assert set(dtypes) == {torch.float32}
    assert all(bool((scale > 0).all() and scale.isfinite().all()) for scale in last)
    changed = [not torch.equal(a, b) for a, b in zip(watch.seen[-4][1], last, strict=True)]
    assert sum(changed) >= len(changed) - 1
    assert callback._training.now == steps


@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_manual_optimization_with_two_optimizers(ranges):
    steps = Steps(lambda m: quantizers(m).weight("4.weight").scale.detach().clone())
    module = fit(qat(4, ranges=ranges, begin=3), steps, module=ManualNet, max_epochs=1)
    assert quantizers(module).quantizing
    assert not torch.equal(steps.seen[-1], steps.seen[-2])


def test_learned_scales_stay_positive_whatever_the_learning_rate():
    def look(module):
        return torch.cat([s.detach().view(-1).clone() for s in quantizers(module).parameters()])

    steps = Steps(look)
    fit(qat(4, ranges="learned"), steps, module=lambda: Net(lr=50.0), max_epochs=1, max_steps=4)
    ratios = [b / a for a, b in pairwise(steps.seen)]
    assert all(bool((seen > 0).all()) for seen in steps.seen)
    assert all(bool((r >= 0.499).all() and (r <= 2.001).all()) for r in ratios)
    assert any(bool((r < 0.51).any()) for r in ratios)


@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_learned_scales_are_trained_with_the_least_weight_decay(ranges):
    class Groups(Net):
        def configure_optimizers(self):
            body, head = list(self.model[:8].parameters()), list(self.model[8].parameters())
            groups = [{"params": body}, {"params": head, "weight_decay": 0.0}]
            optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    module = Groups()
    pl.seed_everything(1, verbose=False)
    runner = trainer(max_epochs=1, callbacks=[qat(ranges=ranges)])
    runner.fit(module, loader())
    held = [{id(p) for p in g["params"]} for g in runner.optimizers[0].param_groups]
    scales = {id(p) for n, p in module.named_parameters() if "quantization." in n}
    assert bool(scales) == (ranges == "learned")
    assert [len(group) for group in held] == [7, 2 + len(scales)]
    assert scales <= held[1]


def test_the_callback_and_the_module_can_be_used_again():
    callback = qat(8)
    module = fit(callback, max_epochs=1)
    fit(callback, module=module, max_epochs=1)
    assert quantizers(module).quantizing
    fit(qat(3, ranges="learned"), module=module, max_epochs=1)  # a later stage with fewer bits
    assert quantizers(module).least_weight_bits == 3
    assert int(integers(module, "4.weight").abs().max()) == 3
    other = fit(callback, module=Net, max_epochs=1)
    assert is_quantized(other.model)


# --- Words ----------------------------------------------------------------------------------------


def test_loggers_get_bits_and_the_beginning(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = qat(6, begin=2, freeze_ranges=6, initial_weight_bits=8)
    fit(callback, max_epochs=1, logger=logger, log_every_n_steps=1)
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    found = [(r["quantization/quantizing"], r["quantization/weight_bits"]) for r in rows]
    wanted = [(0, 8), (1, 8), (1, 7), (1, 6)]
    assert [(float(a), float(b)) for a, b in found if a] == wanted


def test_a_run_that_ends_early_says_so():
    with pytest.warns(UserWarning, match="ended before step 20, where rounding begins"):
        fit(qat(begin=20), max_epochs=1)
    early = qat(4, initial_weight_bits=8, freeze_ranges=20)
    with pytest.warns(UserWarning, match="with 7 bits; 4 are reached at step 20"):
        fit(early, max_epochs=1)


def test_a_network_that_training_does_not_call_is_named():
    class Aside(Inline):
        def __init__(self):
            super().__init__()
            self.example_input_array = torch.zeros(1, 1, 6, 6)

        def training_step(self, batch, batch_idx):
            features = self.norm(self.conv(batch[0])).relu().mean((2, 3))
            return nn.functional.cross_entropy(self.head(features), batch[1])

    with pytest.warns(UserWarning, match="no training step of Aside called the forward"):
        fit(qat(), module=Aside, max_epochs=1)
