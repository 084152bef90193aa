import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lit_compress.callbacks.lightning.structure_in_checkpoints import carry_structure
from lit_compress.compress.structure import describe, record_of
from lit_compress.compress.structure_record import STRUCTURE_KEY, StructureRecord
from tests.callbacks.nets import loader, same_weights, trainer
from tests.slim_nets import ChainModule, cut, widths


class CutEachEpoch(pl.Callback):
    """Cuts by hand at the start of epochs; the optimizer begins again."""

    def __init__(self, plan: dict[int, tuple[int, int]]) -> None:
        self.plan = plan

    def setup(self, trainer, pl_module, stage):
        carry_structure(pl_module)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in self.plan:
            cut(pl_module, *self.plan[trainer.current_epoch])
            trainer.optimizers[0].state.clear()


PLAN = {1: (5, 4), 2: (3, 2)}
WIDTHS = {0: (8, 6), **PLAN}


def fitted(**settings):
    """A run with two cuts, and the checkpoints of its three epochs."""
    keep = ModelCheckpoint(save_top_k=-1, filename="{epoch}", monitor="loss", **settings)
    run = trainer(max_epochs=3, callbacks=[CutEachEpoch(PLAN), keep], enable_checkpointing=True)
    torch.manual_seed(0)
    module = ChainModule()
    run.fit(module, loader(), loader(16))
    paths = {epoch: f"{keep.dirpath}/epoch={epoch}.ckpt" for epoch in range(3)}
    return run, module, paths


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "weights_only"])
def run(request, tmp_path_factory):
    return fitted(save_weights_only=request.param, dirpath=tmp_path_factory.mktemp("checkpoints"))


def weights_in(path):
    return torch.load(path, weights_only=True)["state_dict"]


def holds(module, path):
    stored, own = weights_in(path), module.state_dict()
    return stored.keys() == own.keys() and all(torch.equal(stored[n], own[n]) for n in stored)


def test_every_checkpoint_holds_the_structure_of_its_time(run):
    _, _, paths = run
    for epoch, path in paths.items():
        checkpoint = torch.load(path, weights_only=True)
        record = StructureRecord.in_checkpoint(checkpoint) or StructureRecord()
        assert len(record) == epoch
        assert (STRUCTURE_KEY in checkpoint) == (epoch > 0)
        if epoch:
            assert record.values()["model.0.out_channels"] == (8, WIDTHS[epoch][0])
        assert checkpoint["state_dict"]["model.3.weight"].shape[:2] == WIDTHS[epoch][::-1]
        assert set(checkpoint["state_dict"]) == set(ChainModule().state_dict())


@pytest.mark.parametrize("function", ["validate", "test", "predict"])
@pytest.mark.parametrize("same_run", [True, False])
def test_any_checkpoint_is_evaluated(run, function, same_run):
    made, module, paths = run
    runs = made if same_run else trainer(callbacks=[CutEachEpoch({})])
    module = module if same_run else ChainModule()
    for epoch in (2, 0, 1, 2):
        getattr(runs, function)(module, loader(16), ckpt_path=paths[epoch])
        assert widths(module) == WIDTHS[epoch]
        assert holds(module, paths[epoch])
        assert len(record_of(module)) == epoch


def test_the_best_is_tested_right_after_the_fit(run):
    made, module, paths = run
    best = made.checkpoint_callback.best_model_path
    made.test(module, loader(16), ckpt_path="best")
    assert holds(module, best)
    assert best in [str(path) for path in paths.values()]


@pytest.mark.parametrize("slim", [False, True])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_run_is_resumed_as_if_it_had_not_been_interrupted(epoch, slim):
    _, expected, paths = fitted()
    again = ChainModule()
    if slim:  # an instance that another run cut elsewhere
        cut(again, 2, 5)
    trainer(max_epochs=3, callbacks=[CutEachEpoch(PLAN)]).fit(
        again, loader(), loader(16), ckpt_path=paths[epoch]
    )
    assert widths(again) == (3, 2)
    assert same_weights(again, expected)
    assert record_of(again) == record_of(expected)


def test_a_checkpoint_after_the_fit_and_by_another_trainer():
    made, module, _ = fitted()
    other = trainer()
    other.strategy.connect(module)
    for runs in (made, other):
        runs.save_checkpoint("after.ckpt", weights_only=True)
        checkpoint = torch.load("after.ckpt", weights_only=True)
        assert StructureRecord.in_checkpoint(checkpoint) == record_of(module)
        assert len(record_of(module)) == 2


def test_foreign_checkpoints_say_by_their_shapes_what_they_are_of():
    dense, slim = ChainModule(), ChainModule()
    cut(slim, 3, 2)
    for module, name in ((dense, "dense.ckpt"), (slim, "slim.ckpt")):
        other = trainer()  # nobody has it carry its structure
        other.strategy.connect(module)
        other.save_checkpoint(name)
        assert STRUCTURE_KEY not in torch.load(name, weights_only=True)
    module = ChainModule()
    cut(module, 3, 2)
    for name, expected in (("slim.ckpt", (3, 2)), ("dense.ckpt", (8, 6))):
        trainer(callbacks=[CutEachEpoch({})]).test(module, loader(16), ckpt_path=name)
        assert widths(module) == expected
        assert holds(module, name)


def test_another_model_is_refused_and_left_alone(run):
    _, _, paths = run
    module = ChainModule(first=7)
    before = describe(module), copy.deepcopy(module.state_dict())
    message = r"in '.*epoch=2.ckpt' does not fit ChainModule: 'out_channels' of module 'model.0'"
    with pytest.raises(ValueError, match=f"{message} is 7, expected 8"):
        trainer(callbacks=[CutEachEpoch({})]).test(module, loader(16), ckpt_path=paths[2])
    assert describe(module) == before[0]
    assert all(torch.equal(before[1][n], value) for n, value in module.state_dict().items())


class Noting(ChainModule):
    """Has checkpoint hooks of its own."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = 1

    def on_load_checkpoint(self, checkpoint):
        self.seen = checkpoint["mine"], widths(self)


def test_the_modules_own_hooks_are_called_in_the_structure_of_the_checkpoint():
    module = Noting()
    carry_structure(module)
    cut(module, 3, 2)
    written = trainer()
    written.strategy.connect(module)
    written.save_checkpoint("own.ckpt")
    other = Noting()
    trainer(callbacks=[CutEachEpoch({})]).test(other, loader(16), ckpt_path="own.ckpt")
    assert other.seen == (1, (3, 2))


class CutAverageToo(CutEachEpoch):
    def __init__(self, average):
        super().__init__(PLAN)
        self.average = average

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in self.plan:
            cut(self.average._average_model.module, *self.plan[trainer.current_epoch])
        super().on_train_epoch_start(trainer, pl_module)


def averaged_fit(ckpt_path=None):
    torch.manual_seed(0)
    average, module = EMAWeightAveraging(decay=0.5), ChainModule()
    keep = ModelCheckpoint(filename="{epoch}", save_top_k=-1, dirpath="averaged")
    callbacks = [CutAverageToo(average), average, keep]
    run = trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
    run.fit(module, loader(), loader(16), ckpt_path=ckpt_path)
    return run, module, average._average_model.module


@pytest.mark.parametrize("epoch", [0, 1])
def test_averages_get_the_structure_too(epoch):
    _, expected, _ = averaged_fit()
    run, module, average = averaged_fit(f"averaged/epoch={epoch}.ckpt")
    assert widths(module) == widths(average) == (3, 2)
    assert same_weights(module, expected)
    run.validate(module, loader(16), ckpt_path="averaged/epoch=0.ckpt")
    assert widths(module) == widths(average) == (8, 6)


# --- The hooks ------------------------------------------------------------------------------------


def test_a_module_carries_its_structure_once_and_until_it_is_removed():
    module = ChainModule()
    names = set(vars(module))
    carried = carry_structure(module)
    assert carry_structure(module) is carried
    cut(module, 3, 2)
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert StructureRecord.in_checkpoint(checkpoint) == record_of(module)
    carried.remove()
    assert set(vars(module)) == names
    module.on_save_checkpoint(left := {})
    assert left == {}
    assert carry_structure(module) is not carried


def test_copies_and_pickles_are_whole():
    module = ChainModule()
    carry_structure(module)
    cut(module, 3, 2)
    copied, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for other in (copied, pickled):
        carry_structure(other)
        cut(other, 2, 1)
        other.on_save_checkpoint(checkpoint := {})
        assert StructureRecord.in_checkpoint(checkpoint) == record_of(other)
        assert widths(other) == (2, 1)
    module.on_save_checkpoint(checkpoint := {})
    assert len(StructureRecord.in_checkpoint(checkpoint)) == 1
    assert widths(module) == (3, 2)
