import copy
import csv
import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpointed
from torch.utils.data import DataLoader

from lit_compress.callbacks.distillation.distillation import Distillation, FeatureMatching
from lit_compress.callbacks.magnitude_sparsity import MagnitudeSparsity
from lit_compress.compress.distillation import (
    attention_transfer,
    feature_mse,
    soft_cross_entropy,
    soft_target_kl,
)
from tests.callbacks.nets import ManualNet, Net, loader, same_weights, trainer

cross_entropy = nn.functional.cross_entropy


def seeded(kind=Net, seed=1, **kwargs):
    torch.manual_seed(seed)
    return kind(**kwargs)


def teacher_net():
    """A teacher that has seen some data, so that its batch norms know something."""
    net = seeded(seed=7).model
    for x, _ in loader():
        net(x)
    return net


def fit(module, callbacks=(), data=None, ckpt_path=None, **kwargs):
    torch.manual_seed(3)
    runner = trainer(**({"max_epochs": 2} | kwargs), callbacks=list(callbacks))
    runner.fit(module, data or loader(), ckpt_path=ckpt_path)
    return runner


class ByHand:
    """Mixed into a module to write the distillation into its ``training_step``."""

    def distil(self, task_loss, x, logits):
        with torch.no_grad():
            target = self.teachers[0](x)
        return task_loss + soft_target_kl(logits, target, 4.0)

    def with_teacher(self, teacher):
        self.teachers = [copy.deepcopy(teacher).eval().requires_grad_(False)]
        return self


class NetByHand(ByHand, Net):
    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        return self.distil(cross_entropy(logits, y), x, logits)


class DictNet(Net):
    def training_step(self, batch):
        x, y = batch
        loss = cross_entropy(self(x), y)
        self.returned = {"loss": loss, "seen": loss.detach()}
        return self.returned


class ManualByHand(ByHand, ManualNet):
    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = self.distil(cross_entropy(logits, y), x, logits)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


class InlineNet(pl.LightningModule):
    """Layers on the LightningModule itself; dropout, so that the order of random numbers counts."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(36, 8)
        self.second = nn.Linear(8, 4)

    def forward(self, x, scale=1.0):
        hidden = nn.functional.dropout(self.first(x.flatten(1)).relu(), training=self.training)
        return {"logits": self.second(hidden) * scale}

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(x, scale=2.0)["logits"], y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class InlineByHand(ByHand, InlineNet):
    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x, scale=2.0)["logits"]
        with torch.no_grad():
            target = self.teachers[0](x, scale=2.0)["logits"]
        return cross_entropy(logits, y) + soft_target_kl(logits, target, 4.0)


def scaled():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return [MixedPrecision("16-mixed", "cpu", scaler)]


# --- The same weights as a module with the loss written into it ---------------------------------


@pytest.mark.parametrize(
    ("kind", "by_hand", "kwargs"),
    [
        (Net, NetByHand, {}),
        (Net, NetByHand, {"accumulate_grad_batches": 4}),
        (Net, NetByHand, {"gradient_clip_val": 0.1}),
        (Net, NetByHand, {"precision": "bf16-mixed"}),
        (Net, NetByHand, {"plugins": scaled}),
        (DictNet, NetByHand, {}),
        (ManualNet, ManualByHand, {}),
        (ManualNet, ManualByHand, {"plugins": scaled}),
        (ManualNet, ManualByHand, {"precision": "bf16-mixed"}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or " ".join(value) or "plain",
)
def test_trains_as_if_written_by_hand(kind, by_hand, kwargs):
    teacher = teacher_net()
    kwargs = {key: value() if callable(value) else value for key, value in kwargs.items()}
    expected = seeded(by_hand).with_teacher(teacher)
    fit(expected, **copy.deepcopy(kwargs))
    module = seeded(kind)
    fit(module, [Distillation(teacher)], **kwargs)
    assert same_weights(module, expected)

    alone = seeded(kind)
    fit(alone)
    assert not same_weights(module, alone)


def test_a_network_without_a_child_of_its_own_is_distilled_through_forward():
    teacher = seeded(InlineNet, seed=8)
    expected = seeded(InlineByHand).with_teacher(teacher)
    fit(expected)
    module = seeded(InlineNet)
    fit(module, [Distillation(teacher)])
    assert same_weights(module, expected)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_the_teacher_takes_on_true_precision(precision):
    callback = Distillation(teacher_net())
    module = seeded()
    fit(module, [callback], precision=precision)
    assert next(callback._teachers[0].network.parameters()).dtype == module.dtype


@pytest.mark.parametrize("loss", ["kl", "soft_cross_entropy"])
def test_weights_temperature_and_loss_are_those_of_the_arguments(loss):
    function = {"kl": soft_target_kl, "soft_cross_entropy": soft_cross_entropy}[loss]

    class Weighted(NetByHand):
        def distil(self, task_loss, x, logits):
            with torch.no_grad():
                target = self.teachers[0](x)
            return 0.25 * task_loss + 3.0 * function(logits, target, 2.0)

    teacher = teacher_net()
    expected = seeded(Weighted).with_teacher(teacher)
    fit(expected)
    module = seeded()
    options = {"temperature": 2.0, "task_loss_weight": 0.25, "distill_loss_weight": 3.0}
    fit(module, [Distillation(teacher, loss=loss, **options)])
    assert same_weights(module, expected)


@pytest.mark.parametrize("loss", ["mse", "attention_transfer"])
def test_features_are_matched_layer_by_layer(loss):
    function = {"mse": feature_mse, "attention_transfer": attention_transfer}[loss]

    def early(net, x):
        return net[:1](x), net[:5](x)

    class WithFeatures(NetByHand):
        def training_step(self, batch, batch_idx):
            x, y = batch
            first = self.model[0](x)
            second = self.model[1:5](first)
            logits = self.model[5:](second)
            with torch.no_grad():
                theirs = early(self.teachers[0], x)
            pairs = function(first, theirs[0]) + function(second, theirs[1])
            return self.distil(cross_entropy(logits, y), x, logits) + 5.0 * pairs

    teacher = teacher_net()
    expected = seeded(WithFeatures).with_teacher(teacher)
    fit(expected)
    module = seeded()
    features = FeatureMatching({"0": "0", "4": "4"}, loss, weight=5.0)
    fit(module, [Distillation(teacher, features=features)])
    assert same_weights(module, expected)


def test_features_alone_let_the_classes_differ():
    teacher = nn.Sequential(*teacher_net()[:-1], nn.Linear(64, 9))
    module = seeded()
    callback = Distillation(teacher, distill_loss_weight=0, features=FeatureMatching({"4": "4"}))
    fit(module, [callback])
    alone = seeded()
    fit(alone)
    assert not same_weights(module, alone)


def test_several_calls_in_a_step_are_averaged():
    class TwoViews(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return cross_entropy(self(x), y) + cross_entropy(self(-x), y)

    class TwoViewsByHand(ByHand, Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            a, b = self(x), self(-x)
            with torch.no_grad():
                targets = self.teachers[0](x), self.teachers[0](-x)
            terms = [soft_target_kl(z, t, 4.0) for z, t in zip((a, b), targets, strict=True)]
            return cross_entropy(a, y) + cross_entropy(b, y) + torch.stack(terms).mean()

    teacher = teacher_net()
    expected = seeded(TwoViewsByHand).with_teacher(teacher)
    fit(expected)
    module = seeded(TwoViews)
    fit(module, [Distillation(teacher)])
    assert same_weights(module, expected)


class Recomputing(Net):
    def forward(self, x):
        return checkpointed(self.model, x, use_reentrant=False)


class TwoBackwards(Recomputing, ManualNet):
    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        for view in (x, -x):
            self.manual_backward(cross_entropy(self(view), y))
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.mark.parametrize(("kind", "calls_per_step"), [(Recomputing, 1), (TwoBackwards, 2)])
def test_recomputed_calls_do_not_count_twice(kind, calls_per_step):
    teacher, calls = teacher_net(), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    callback = Distillation(teacher, features=FeatureMatching({"4": "4"}))
    fit(seeded(kind), [callback], limit_train_batches=3, max_epochs=1)
    assert len(calls) == 3 * calls_per_step


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("features", [None, FeatureMatching({"4": "4"})])
def test_a_compiled_lightning_module_trains_alike(backend, features):
    teacher = teacher_net()
    expected = seeded()
    fit(expected, [Distillation(teacher, features=features)], limit_train_batches=3)
    module = seeded()
    compiled = torch.compile(module, backend=backend)
    fit(compiled, [Distillation(teacher, features=features)], limit_train_batches=3)
    assert same_weights(module, expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_trains_alike_also_when_it_ran_before(in_place):
    teacher, features = teacher_net(), FeatureMatching({"4": "4"})
    expected = seeded()
    fit(expected, [Distillation(teacher, features=features)], limit_train_batches=3)
    module = seeded()
    if in_place:
        module.model.compile(backend="eager")
    else:
        module.model = torch.compile(module.model, backend="eager")
    before = copy.deepcopy(module.state_dict())
    module(torch.randn(8, 1, 6, 6))
    module.load_state_dict(before)
    fit(module, [Distillation(teacher, features=features)], limit_train_batches=3)
    trained = {k.replace("_orig_mod.", ""): v for k, v in module.state_dict().items()}
    assert all(torch.equal(trained[k], v) for k, v in expected.state_dict().items())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_snapshot_of_a_compiled_module_is_no_longer_tied_to_it(compiled):
    module = seeded(InlineNet)
    callback = Distillation(begin=2)
    given = torch.compile(module, backend="eager") if compiled else module
    fit(given, [callback], limit_train_batches=4, max_epochs=1)
    x = torch.randn(3, 1, 6, 6)
    answer = callback._teachers[0].network(x)["logits"]
    with torch.no_grad():
        module.second.weight.zero_()
    assert torch.equal(callback._teachers[0].network(x)["logits"], answer)


# --- The output of the network ------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: (z, "auxiliary"),
        lambda z: [z],
        lambda z: {"logits": z, "other": 1},
        lambda z: SimpleNamespace(logits=z),
    ],
    ids=["tuple", "list", "dict", "object"],
)
def test_the_logits_are_found_in_structured_outputs(wrap):
    class Wrapped(Net):
        def __init__(self):
            super().__init__()
            self.model.register_forward_hook(lambda module, args, output: wrap(output))

        def forward(self, x):
            out = self.model(x)
            if isinstance(out, (tuple, list)):
                return out[0]
            return out["logits"] if isinstance(out, dict) else out.logits

    teacher = teacher_net()
    expected = seeded()
    fit(expected, [Distillation(teacher)], limit_train_batches=2)
    module = seeded(Wrapped)
    fit(module, [Distillation(teacher)], limit_train_batches=2)
    assert same_weights(module, expected)


def test_an_output_without_logits_is_refused():
    class Odd(Net):
        def forward(self, x):
            return self.model(x)["out"]

    module = seeded(Odd)
    module.model.register_forward_hook(lambda module, args, output: {"out": output})
    with pytest.raises(ValueError, match=r"returned a dict with the keys \['out'\]"):
        fit(module, [Distillation(teacher_net())])


# --- A guest that leaves no trace ---------------------------------------------------------------


def traces(module):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    return hooks, sorted(set(vars(module)) & {"training_step", "backward", "forward"})


@pytest.mark.parametrize("kind", [Net, ManualNet, InlineNet])
def test_the_module_is_as_before_after_a_fit_and_after_an_exception(kind):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            assert traces(pl_module) != (0, [])
            raise RuntimeError("stop")

    module = seeded(kind)
    layer = "first" if kind is InlineNet else "4"
    callback = Distillation(features=FeatureMatching({layer: layer}))
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, [callback, Stop()])
    assert traces(module) == (0, [])
    assert traces(callback._teachers[0].network) == (0, [])
    fit(module, [callback])
    assert traces(module) == (0, [])


def test_a_second_fit_begins_with_a_new_snapshot():
    callback, module = Distillation(), seeded()
    fit(module, [callback])
    trained = copy.deepcopy(module.model)
    fit(module, [callback])
    assert same_weights(callback._teachers[0].network, trained)


def test_two_distillations_add_up_and_both_leave():
    class TwoTeachers(NetByHand):
        def distil(self, task_loss, x, logits):
            with torch.no_grad():
                targets = [teacher(x) for teacher in self.teachers]
            for target in targets:
                task_loss = task_loss + soft_target_kl(logits, target, 4.0)
            return task_loss

    first, second = teacher_net(), seeded(seed=9).model
    expected = seeded(TwoTeachers).with_teacher(first)
    expected.teachers.append(copy.deepcopy(second).eval())
    fit(expected)
    module = seeded()
    second = nn.ModuleList([second])  # another class, another state key
    second.forward = second[0].forward
    fit(module, [Distillation(first), Distillation(second)])
    assert same_weights(module, expected)
    assert traces(module) == (0, [])


def test_the_teacher_is_frozen_and_in_no_checkpoint_optimizer_or_count(tmp_path):
    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.num_params = sum(p.numel() for p in pl_module.parameters())
            ours = {id(p) for p in callback._teachers[0].network.parameters()}
            optimized = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
            assert not ours & optimized

    teacher = teacher_net().requires_grad_(True).train()
    before = copy.deepcopy(teacher.state_dict())
    callback, watch, module = Distillation(teacher), Watch(), seeded()
    runner = fit(module, [callback, watch], enable_model_summary=True)
    runner.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == seeded().state_dict().keys()
    assert watch.num_params == sum(p.numel() for p in seeded().parameters())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["end.ckpt"]


def test_weight_averaging_does_not_copy_the_teacher():
    class Uncopied(nn.Sequential):
        def __deepcopy__(self, memo):
            raise AssertionError("the teacher was copied")

    teacher = Uncopied(*teacher_net())
    fit(seeded(), [EMAWeightAveraging(decay=0.9), Distillation(teacher)])
    fit(seeded(), [Distillation(teacher), EMAWeightAveraging(decay=0.9)])
    fit(seeded(), [Distillation(teacher), StochasticWeightAveraging(0.1, 0.5)], max_epochs=4)


@pytest.mark.parametrize("kind", [Net, InlineNet])
def test_a_copy_taken_in_mid_fit_is_free_of_the_callback(kind):
    class Copying(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            asked, copied = len(calls), copy.deepcopy(pl_module)
            pl_module.zero_grad()
            copied.training_step(batch, 0).backward()
            assert all(p.grad is not None for p in copied.parameters())
            assert all(p.grad is None for p in pl_module.parameters())
            assert len(calls) == asked

    teacher, calls = seeded(kind, seed=7), []
    teacher = teacher.model if kind is Net else teacher
    teacher.register_forward_hook(lambda *_: calls.append(1))
    fit(seeded(kind), [Distillation(teacher), Copying()], limit_train_batches=2)
    assert len(calls) == 4


def test_the_teacher_leaves_the_accelerator_when_the_fit_is_torn_down():
    class Noting(nn.Sequential):
        moved = 0

        def cpu(self):
            self.moved += 1
            return super().cpu()

    teacher = Noting(*teacher_net())
    fit(seeded(), [Distillation(teacher)])
    assert teacher.moved == 1


def test_validation_costs_no_teacher():
    teacher, calls = teacher_net(), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    runner = trainer(max_epochs=1, limit_train_batches=2, callbacks=[Distillation(teacher)])
    runner.fit(seeded(), loader(), loader())
    runner.validate(seeded(), loader(), verbose=False)
    assert len(calls) == 2


def test_a_step_that_is_skipped_stays_skipped():
    class Skipping(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx % 2 else None

    module = seeded(Skipping)
    runner = fit(module, [Distillation(teacher_net())], max_epochs=1)
    assert runner.global_step == 8
    assert all(p.isfinite().all() for p in module.parameters())


def test_what_a_dict_step_returned_is_neither_lost_nor_changed():
    seen = []

    class Outputs(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert torch.equal(pl_module.returned["loss"].detach(), outputs["seen"])
            seen.append(outputs["loss"] > outputs["seen"])

    fit(seeded(DictNet), [Distillation(teacher_net()), Outputs()])
    assert len(seen) == 16
    assert all(seen)


# --- Logging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Net, ManualNet])
@pytest.mark.parametrize("plugins", [None, scaled])
def test_losses_are_logged_unweighted_and_unscaled(tmp_path, kind, plugins):
    logger = CSVLogger(tmp_path)
    features = FeatureMatching({"4": "4"}, weight=7.0)
    callback = Distillation(teacher_net(), distill_loss_weight=3.0, features=features)
    plugins = plugins() if plugins else None
    fit(seeded(kind), [callback], logger=logger, log_every_n_steps=4, plugins=plugins)
    with open(logger.experiment.metrics_file_path) as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == [3, 7, 11, 15]
    for row in rows:
        assert 0.5 < row["distillation/task_loss"] < 3.0  # about log(4)
        assert 0 < row["distillation/logits_loss"] < 3.0
        assert 0 < row["distillation/feature_loss"] < 3.0


def test_nothing_is_logged_without_a_logger():
    class Loud(Net):
        def log(self, name, *args, **kwargs):
            raise AssertionError(f"logged {name}")

    fit(seeded(Loud), [Distillation(teacher_net())])


# --- When distillation begins -------------------------------------------------------------------


@pytest.mark.parametrize(("begin", "first"), [(0, 0), (5, 5), (0.5, 8), (0.0, 0), (1.0, 16)])
@pytest.mark.parametrize("kind", [Net, ManualNet])
def test_begin_counts_steps_or_a_fraction_of_the_run(begin, first, kind):
    teacher, calls = teacher_net(), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    fit(seeded(kind), [Distillation(teacher, begin=begin)])
    assert len(calls) == 16 - first


def test_begin_counts_optimizer_steps_under_accumulation():
    teacher, calls = teacher_net(), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    fit(seeded(), [Distillation(teacher, begin=1)], accumulate_grad_batches=4)
    assert len(calls) == 12


def test_the_module_trains_as_if_alone_until_begin():
    module, alone = seeded(), seeded()
    fit(alone)
    fit(module, [Distillation(teacher_net(), task_loss_weight=0.5, begin=1.0)])
    assert same_weights(module, alone)


def test_a_snapshot_is_the_network_as_it_was_at_begin():
    half = seeded()
    fit(half, max_steps=5)
    callback, module = Distillation(begin=5), seeded()
    fit(module, [callback])
    assert same_weights(callback._teachers[0].network, half.model)

    expected = seeded(NetByHand).with_teacher(half.model)
    distil = expected.distil
    expected.distil = lambda loss, *args: (
        distil(loss, *args) if expected.trainer.global_step >= 5 else loss
    )
    fit(expected)
    assert same_weights(module, expected)


def test_a_fraction_of_an_endless_run_is_refused():
    with pytest.raises(
        MisconfigurationException, match=r"begin is 0.5.*no known length.*max_epochs"
    ):
        fit(seeded(), [Distillation(begin=0.5)], max_epochs=-1)


def test_a_snapshot_must_come_before_callbacks_that_change_weights():
    sparsity = MagnitudeSparsity(0.5)
    with pytest.raises(MisconfigurationException, match=r"MagnitudeSparsity.*Put Distillation fir"):
        fit(seeded(), [sparsity, Distillation(begin=3)])
    callback = Distillation(begin=3)
    fit(seeded(), [callback, MagnitudeSparsity(0.5)])
    assert all((p != 0).any() for p in callback._teachers[0].network.parameters())


# --- Resuming -----------------------------------------------------------------------------------


def run(folder, ckpt_path=None, begin=0, kind=Net, **kwargs):
    module, callback = seeded(kind), Distillation(begin=begin)
    keeper = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    options = {"enable_checkpointing": True, "max_epochs": 4} | kwargs
    fit(module, [callback, keeper], ckpt_path=ckpt_path, **options)
    return module, callback


@pytest.mark.parametrize("begin", [0, 8, 10, 0.25, 0.75])
@pytest.mark.parametrize("kind", [Net, InlineNet])
def test_a_resumed_run_ends_in_the_same_weights(tmp_path, begin, kind):
    class Undropped(kind):
        def forward(self, x, **kwargs):
            with torch.random.fork_rng():  # the same dropout, wherever a run begins
                torch.manual_seed(int(x[0, 0, 0, 0] * 1000) % 97)
                return super().forward(x, **kwargs)

    whole, whole_callback = run(tmp_path / "whole", begin=begin, kind=Undropped)
    path = tmp_path / "whole" / "epoch=1.ckpt"
    for name in tmp_path.glob("whole/epoch=[23].ckpt"):
        name.unlink()
    resumed, callback = run(tmp_path / "resumed", path, begin, Undropped)
    assert same_weights(resumed, whole)
    assert same_weights(callback._teachers[0].network, whole_callback._teachers[0].network)
    files = [p.name for p in (tmp_path / "resumed").glob("distillation-teacher-*.pt")]
    assert files == [p.name for p in (tmp_path / "whole").glob("distillation-teacher-*.pt")]


def test_the_side_file_is_a_plain_state_dict_and_the_checkpoint_holds_no_teacher(tmp_path):
    start = seeded()
    module, _ = run(tmp_path)
    (side,) = tmp_path.glob("distillation-teacher-*.pt")
    weights = torch.load(side, weights_only=True)
    start.model.load_state_dict(weights)
    assert same_weights(start, seeded())
    saved = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == module.state_dict().keys()
    (state,) = [v for k, v in saved["callbacks"].items() if k.startswith("Distillation")]
    assert state["snapshot"]["sha256"][:12] in side.name
    assert not any(isinstance(v, torch.Tensor) for v in state.values())
    seeded().load_state_dict(saved["state_dict"])


def test_the_moment_stays_when_a_resumed_run_is_longer(tmp_path):
    run(tmp_path / "short", begin=0.75, max_epochs=2)  # begins at step 12
    _, callback = run(tmp_path / "long", tmp_path / "short" / "epoch=0.ckpt", begin=0.75)
    assert callback._clock.ramp.begin == 12


def test_a_moved_checkpoint_finds_its_snapshot_beside_it_or_where_it_was_written(tmp_path):
    whole, _ = run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "epoch=1.ckpt").rename(tmp_path / "b" / "moved.ckpt")
    resumed, _ = run(tmp_path / "c", tmp_path / "b" / "moved.ckpt")
    assert same_weights(resumed, whole)
    (side,) = (tmp_path / "a").glob("distillation-teacher-*.pt")
    side.rename(tmp_path / "b" / side.name)
    (tmp_path / "c" / side.name).unlink()
    resumed, _ = run(tmp_path / "c", tmp_path / "b" / "moved.ckpt")
    assert same_weights(resumed, whole)


def test_a_missing_or_damaged_snapshot_is_refused_and_nothing_is_written(tmp_path):
    run(tmp_path / "a")
    path = tmp_path / "a" / "epoch=1.ckpt"
    (side,) = tmp_path.glob("a/distillation-teacher-*.pt")
    content, saved = side.read_bytes(), path.read_bytes()

    side.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{side.name}.*truncated"):
        run(tmp_path / "b", path)

    side.write_bytes(content)
    weights = torch.load(side, weights_only=True)
    weights["0.weight"][0] += 1
    torch.save(weights, side)
    with pytest.raises(ValueError, match=r"not those that the checkpoint.*Restore the file"):
        run(tmp_path / "b", path)

    side.unlink()
    with pytest.raises(FileNotFoundError, match=r"snapshot as its teacher.*Copy it beside"):
        run(tmp_path / "b", path)
    assert path.read_bytes() == saved
    assert not list(tmp_path.glob("b/*"))


def test_a_checkpoint_saved_after_the_fit_has_its_snapshot_too(tmp_path):
    module, callback = seeded(), Distillation()
    runner = fit(module, [callback], default_root_dir=tmp_path, max_epochs=1)
    runner.save_checkpoint(tmp_path / "end.ckpt")
    assert len(list(tmp_path.glob("distillation-teacher-*.pt"))) == 1
    fit(seeded(), [Distillation()], ckpt_path=tmp_path / "end.ckpt", default_root_dir=tmp_path)


def test_a_continued_fit_keeps_its_teacher():
    module, callback, start = seeded(), Distillation(), seeded()
    runner = fit(module, [callback], max_epochs=1)
    runner.fit_loop.max_epochs = 2
    runner.fit(module, loader())
    assert same_weights(callback._teachers[0].network, start.model)


def test_the_learning_rate_finder_may_come_before_and_after(tmp_path):
    for order in (1, -1):
        module = seeded()
        finder = LearningRateFinder(num_training_steps=5, update_attr=False)
        callback = Distillation()
        fit(
            module,
            [callback, finder][::order],
            default_root_dir=tmp_path,
            enable_checkpointing=False,
        )
        assert same_weights(callback._teachers[0].network, seeded().model)


# --- Weights from a file ------------------------------------------------------------------------


def write(folder, content, name="teacher.pt"):
    torch.save(content, folder / name)
    return folder / name


def test_a_checkpoint_gives_the_teacher_its_weights_whatever_the_prefix(tmp_path):
    weights = teacher_net().state_dict()
    forms = [
        weights,
        {"state_dict": weights, "epoch": 3},
        {"state_dict": {f"model.{k}": v for k, v in weights.items()} | {"loss.w": torch.ones(1)}},
        {f"net.model._orig_mod.{k}": v for k, v in weights.items()},
    ]
    expected = seeded()
    fit(expected, [Distillation(teacher_net())], max_epochs=1)
    for form in forms:
        module = seeded()
        fit(module, [Distillation(checkpoint=write(tmp_path, form))], max_epochs=1)
        assert same_weights(module, expected)


def test_a_lightning_checkpoint_gives_a_teacher_of_another_architecture_its_weights(tmp_path):
    run(tmp_path, kind=InlineNet, max_epochs=1)
    trained = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    teacher = seeded(InlineNet, seed=11)
    fit(seeded(), [Distillation(teacher, str(tmp_path / "epoch=0.ckpt"))], max_epochs=1)
    assert all(torch.equal(v, trained[k]) for k, v in teacher.state_dict().items())


def test_files_that_do_not_fit_are_refused(tmp_path):
    weights = teacher_net().state_dict()

    def refused(content, error, match):
        before = seeded()
        path = content if not isinstance(content, (dict, list)) else write(tmp_path, content)
        module = seeded()
        with pytest.raises(error, match=match):
            fit(module, [Distillation(checkpoint=path)])
        assert same_weights(module, before)

    refused(tmp_path / "none.pt", FileNotFoundError, "no file .*none.pt")
    refused(dict(list(weights.items())[1:]), ValueError, "'0.weight' is missing.*teacher=")
    other = weights | {"8.weight": torch.zeros(10, 64)}
    refused(other, ValueError, r"'8.weight' has shape \(10, 64\), expected \(4, 64\)")
    refused(weights | {"9.weight": torch.zeros(1)}, ValueError, "'9.weight' is unknown")
    refused({"epoch": 1}, ValueError, r"no weights but the keys \['epoch'\]")
    refused([1, 2], ValueError, "holds a list, expected")
    whole = write(tmp_path, weights).read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "half.pt", ValueError, "half.pt.*cannot be read.*truncated")
    (tmp_path / "text.pt").write_text("weights")
    refused(tmp_path / "text.pt", ValueError, "text.pt.*cannot be read")
    torch.save(seeded().model, tmp_path / "pickle.pt")
    refused(tmp_path / "pickle.pt", ValueError, "pickle.pt.*state_dict")


# --- What cannot work is refused ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"temperature": 0}, "temperature is 0, expected a positive"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": True}, "temperature is True"),
        ({"loss": "mse"}, "loss is 'mse', expected 'kl' or 'soft_cross_entropy'"),
        ({"task_loss_weight": -0.1}, "task_loss_weight is -0.1, expected"),
        ({"distill_loss_weight": math.nan}, "distill_loss_weight is nan"),
        ({"task_loss_weight": 0, "distill_loss_weight": 0}, "are both 0.*nothing to train"),
        ({"begin": -1}, "begin is -1, expected a number of steps"),
        ({"begin": 1.5}, r"begin is 1.5.*\[0, 1\]"),
        ({"begin": math.nan}, "begin is nan"),
        ({"begin": True}, "begin is True"),
        ({"begin": "half"}, "begin is 'half'"),
        ({"teacher": "resnet18"}, "teacher is a str.*checkpoint="),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        Distillation(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"pairs": {}}, "features.pairs is empty"),
        ({"pairs": {"0": "0"}, "loss": "kl"}, "features.loss is 'kl', expected 'mse' or 'att"),
        ({"pairs": {"0": "0"}, "weight": -1.0}, "features.weight is -1.0"),
    ],
    ids=str,
)
def test_bad_features_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        FeatureMatching(**kwargs)


def test_unknown_names_are_refused_with_the_nearest():
    teacher = nn.Sequential()
    teacher.add_module("layer3", nn.Linear(1, 1))
    for features in ({"0": "layer2"}, {"O": "layer3"}):
        with pytest.raises(ValueError, match=r"is no module of Sequential; (the nearest|it has)"):
            fit(seeded(), [Distillation(teacher, features=FeatureMatching(features))])
    with pytest.raises(ValueError, match="'modle' is no module of Net; the nearest are 'model'"):
        fit(seeded(), [Distillation(teacher, student="modle")])


def unchanged_by(error, match, module, callback, **kwargs):
    before = copy.deepcopy(dict(module.named_parameters()))
    with pytest.raises(error, match=match):
        fit(module, [callback], **kwargs)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert traces(module) == (0, [])


@pytest.mark.parametrize("kind", [Net, ManualNet])
def test_a_teacher_with_other_classes_is_refused_before_any_weight_changes(kind):
    teacher = nn.Sequential(*teacher_net()[:-1], nn.Linear(64, 9))
    match = r"student's logits have shape \(8, 4\), the teacher's \(8, 9\)"
    unchanged_by(ValueError, match, seeded(kind), Distillation(teacher))


def test_features_of_another_shape_are_refused_by_name():
    features = FeatureMatching({"4": "0"})
    match = r"features.pairs, '4' -> '0': .*\(8, 16, 6, 6\).*\(8, 8, 6, 6\)"
    unchanged_by(ValueError, match, seeded(), Distillation(teacher_net(), features=features))


def test_features_of_a_layer_that_does_not_run_are_refused():
    module, teacher = seeded(), teacher_net()
    module.model[0].unused = nn.Linear(1, 1)
    features = FeatureMatching({"0.unused": "0"})
    match = r"'0.unused' ran 0 times and the teacher's '0' 1 times"
    callback = Distillation(teacher, features=features)
    unchanged_by(MisconfigurationException, match, module, callback)


@pytest.mark.parametrize("kind", [Net, ManualNet])
def test_nan_is_refused_before_any_weight_changes(kind, tmp_path):
    def nan_data():
        batches = [[x.clone(), y] for x, y in loader()]
        batches[3][0][0] = math.nan
        return DataLoader(batches, batch_size=None)

    class Last(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.weights = copy.deepcopy(dict(pl_module.named_parameters()))

    module, last = seeded(kind), Last()
    keeper = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(ValueError, match=r"after \d optimizer steps task_loss and logits_loss is"):
        fit(
            module,
            [Distillation(teacher_net()), last, keeper],
            nan_data(),
            enable_checkpointing=True,
        )
    assert all(torch.equal(p, last.weights[n]) for n, p in module.named_parameters())
    for path in tmp_path.glob("*.ckpt"):
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(v.isfinite().all() for v in saved.values())


def test_a_teacher_that_answers_nan_is_refused():
    teacher = teacher_net()
    teacher[8].bias.data.fill_(math.nan)
    match = "after 0 optimizer steps logits_loss is NaN.*teacher's weights"
    unchanged_by(ValueError, match, seeded(), Distillation(teacher))


@pytest.mark.parametrize("kind", [Net, ManualNet])
def test_a_network_that_is_never_called_is_refused_with_the_candidates(kind):
    class Elsewhere(kind):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(36, 4)

        def forward(self, x):
            return self.other(x.flatten(1)) + 0 * self.model[:9](x)

    with pytest.raises(
        MisconfigurationException, match=r"did not call its network.*student=.*'model', 'other'"
    ):
        fit(seeded(Elsewhere), [Distillation(teacher_net(), student="model")])


def test_manual_optimization_without_manual_backward_is_refused():
    class Direct(ManualNet):
        def training_step(self, batch, batch_idx):
            x, y = batch
            cross_entropy(self(x), y).backward()

    with pytest.raises(MisconfigurationException, match=r"did not call manual_backward.*instead"):
        fit(seeded(Direct), [Distillation(teacher_net())])


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_weights_are_refused(strategy):
    stub = SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(MisconfigurationException, match=f"{strategy.__name__}.*strategy='ddp'"):
        Distillation().setup(stub, seeded(), "fit")


def test_a_teacher_that_is_part_of_the_module_is_refused():
    module = seeded()
    for teacher in (module.model, nn.Sequential(*module.model), module):
        with pytest.raises(MisconfigurationException, match="same memory as 'model.0.weight'"):
            fit(module, [Distillation(teacher)])


def test_a_foreign_checkpoint_is_refused_on_resuming(tmp_path):
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(ValueError, match=r"broken.ckpt cannot be read as a checkpoint"):
        fit(seeded(), [Distillation()], ckpt_path=tmp_path / "broken.ckpt")
