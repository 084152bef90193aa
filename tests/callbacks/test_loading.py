import copy
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lit_compress import load_compressed
from lit_compress.callbacks.lightning.structure_in_checkpoints import carry_structure
from lit_compress.compress.structure import describe, record_of
from lit_compress.compress.structure_record import STRUCTURE_KEY, StructureRecord
from tests.callbacks.nets import loader, same_weights, trainer
from tests.slim_nets import ChainModule, chain, cut, widths


def written(module, path="slim.ckpt", carried=True):
    """A checkpoint of a module, as a Trainer writes it."""
    if carried:
        carry_structure(module)
    run = trainer()
    run.strategy.connect(module)
    run.save_checkpoint(path)
    return path


def slim(first=3, second=2, width=8):
    """A module that was cut twice."""
    module = ChainModule(width)
    cut(module, first + 1, second)
    cut(module, first, second)
    return module


def state(module):
    return describe(module), copy.deepcopy(module.state_dict()), record_of(module)


def same_state(a, b):
    return (a[0], a[2]) == (b[0], b[2]) and all(torch.equal(a[1][n], b[1][n]) for n in a[1])


# --- What comes back ------------------------------------------------------------------------------


def as_class(path, **arguments):
    return load_compressed(path, ChainModule, **arguments)


def as_instance(path, **arguments):
    return load_compressed(path, ChainModule(), **arguments)


def as_slim_instance(path, **arguments):
    return load_compressed(path, slim(2, 5), **arguments)


@pytest.mark.parametrize("load", [as_class, as_instance, as_slim_instance])
@pytest.mark.parametrize("carried", [True, False])
def test_modules_come_back(load, carried):
    module = slim() if carried else ChainModule()
    loaded = load(written(module, carried=carried))
    assert type(loaded) is ChainModule
    assert same_weights(loaded, module)
    assert widths(loaded) == widths(module)
    assert record_of(loaded) == record_of(module)
    assert loaded.training
    assert "on_load_checkpoint" not in vars(ChainModule)


@pytest.mark.parametrize("cuts", [False, True])
def test_the_network_inside_comes_back(cuts):
    module = slim()
    network = chain()
    if cuts:
        cut(network, 7, 1)
    assert load_compressed(written(module), network) is network
    assert same_weights(network, module.model)
    assert record_of(network) == record_of(module).under("model.")
    assert load_compressed(written(ChainModule(), "dense.ckpt"), network)[0].out_channels == 8
    assert record_of(network) == StructureRecord()


def test_bare_weights_come_back():
    network, source = chain(), chain()
    torch.save(source.state_dict(), "bare.pt")
    assert same_weights(load_compressed("bare.pt", network), source)
    module = ChainModule()
    torch.save(module.state_dict(), "bare.pt")
    assert same_weights(load_compressed("bare.pt", ChainModule()), module)


def test_compiled_networks_take_and_give():
    module = slim()
    module.model = torch.compile(module.model, backend="eager")
    path = written(module)
    assert "model._orig_mod.0.weight" in torch.load(path, weights_only=True)["state_dict"]
    network = load_compressed(path, chain())
    assert same_weights(network, module.model._orig_mod)
    compiled = torch.compile(chain(), backend="eager")
    load_compressed(path, compiled)
    assert widths(compiled) == (3, 2)


def test_hyper_parameters_come_from_the_checkpoint_or_the_call():
    path = written(slim(first=3, second=2), "hyper.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["first"] = 9
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="'out_channels' of module 'model.0' is 9, expected 8"):
        load_compressed(path, ChainModule)
    assert widths(load_compressed(path, ChainModule, first=8)) == (3, 2)
    assert load_compressed(path, ChainModule, first=8).hparams["first"] == 8


@pytest.mark.parametrize("target", [ChainModule, None])
def test_strictness(target):
    path = written(slim())
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["state_dict"]["model.6.bias"]
    torch.save(checkpoint, path)
    with pytest.raises((ValueError, RuntimeError), match="6.bias"):
        load_compressed(path, target or chain())
    loaded = load_compressed(path, target or chain(), strict=False)
    assert widths(loaded) == (3, 2)


def test_built_modules_stay_where_they_are_and_classes_go_where_they_should():
    module = slim()
    path = written(module)
    network = load_compressed(path, chain().double())
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert torch.equal(network[3].weight, module.model[3].weight.double())
    asked = []
    load_compressed(path, ChainModule, map_location=lambda storage, place: asked.append(place))
    assert set(asked) == {"cpu"}


def test_what_is_loaded_can_be_trained_and_written_and_loaded():
    loaded = load_compressed(written(slim()), ChainModule)
    run = trainer(max_epochs=1, enable_checkpointing=True, default_root_dir="again")
    run.fit(loaded, loader(), loader(16))
    path = run.checkpoint_callback.best_model_path
    again = load_compressed(path, ChainModule)
    assert same_weights(again, loaded)
    assert widths(again) == (3, 2)
    trainer().test(again, loader(16), ckpt_path=path)
    trainer(max_epochs=2).fit(again, loader(), loader(16), ckpt_path=path)
    assert widths(again) == (3, 2)


class LateModule(pl.LightningModule):
    """Builds its layers in configure_model and has hooks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = None
        self.seen = []

    def configure_model(self):
        if self.model is None:
            self.model = chain()

    def on_load_checkpoint(self, checkpoint):
        self.seen.append((checkpoint["epoch"], self.model[0].out_channels))


@pytest.mark.parametrize("given", [LateModule, LateModule()], ids=["class", "instance"])
def test_layers_that_are_built_late_and_hooks_of_the_module(given):
    module = LateModule()
    module.configure_model()
    cut(module, 3, 2)
    loaded = load_compressed(written(module), given)
    assert widths(loaded) == (3, 2)
    assert same_weights(loaded, module)
    assert loaded.seen == [(0, 3)]
    assert vars(LateModule)["on_load_checkpoint"].__qualname__ == "LateModule.on_load_checkpoint"


class WithTeacher(ChainModule):
    """Loads another checkpoint of its own class while it is built."""

    def __init__(self, teacher: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.teacher = [] if teacher is None else [load_compressed(teacher, WithTeacher)]


def test_modules_that_load_others_while_they_are_built():
    teacher = WithTeacher()
    cut(teacher, 5, 5)
    module = WithTeacher(written(teacher, "teacher.ckpt"))
    cut(module, 3, 2)
    loaded = load_compressed(written(module), WithTeacher)
    assert widths(loaded) == (3, 2)
    assert widths(loaded.teacher[0]) == (5, 5)
    assert "on_load_checkpoint" not in vars(WithTeacher)


class Saved(pl.Callback):
    def setup(self, trainer, pl_module, stage):
        carry_structure(pl_module)

    def on_train_end(self, trainer, pl_module):
        cut(pl_module, 3, 2)
        trainer.save_checkpoint("cli.ckpt")


@pytest.mark.parametrize("subclass_mode", [False, True])
def test_checkpoints_of_the_command_line(subclass_mode):
    options = {"save_config_callback": None, "trainer_defaults": {"callbacks": [Saved()]}}
    name = f"{__name__}.ChainModule"
    sys.modules[__name__].ChainModule = ChainModule
    model = [f"--model={name}"] if subclass_mode else []
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    cli = LightningCLI(
        pl.LightningModule if subclass_mode else ChainModule,
        subclass_mode_model=subclass_mode,
        args=[*model, "--model.first=7", "--trainer.max_steps=1"]
        + [f"--trainer.{option}=false" for option in quiet],
        run=False,
        **options,
    )
    cli.trainer.fit(cli.model, loader())
    for given in (pl.LightningModule, ChainModule) if subclass_mode else (ChainModule,):
        loaded = load_compressed("cli.ckpt", given)
        assert type(loaded) is ChainModule
        assert same_weights(loaded, cli.model)
        assert widths(loaded) == (3, 2)
    assert "on_load_checkpoint" not in vars(ChainModule)


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [ChainModule(7), chain(7), slim(2, 5, width=7)])
def test_a_record_of_another_model_changes_nothing(target):
    path, before = written(ChainModule()), state(target)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[STRUCTURE_KEY] = record_of(slim()).to_plain()
    torch.save(checkpoint, path)
    message = "the structure record in 'slim.ckpt' does not fit .*: 'out_channels' of module "
    with pytest.raises(ValueError, match=f"{message}'(model.)?0' is 7, expected 8"):
        load_compressed(path, target)
    assert same_state(state(target), before)


def test_a_damaged_record_is_refused():
    path = written(slim())
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, STRUCTURE_KEY: {"changes": [3]}}, path)
    for target in (ChainModule, ChainModule(), chain()):
        with pytest.raises(ValueError, match=r"\[3\].* is no structure record"):
            load_compressed(path, target)


@pytest.mark.parametrize("target", [ChainModule(), chain()])
def test_weights_that_do_not_fit_are_named(target):
    path = written(slim())
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["model.6.bias"] = torch.zeros(9)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"6.bias' has shape \(9,\), expected \(4,\). Build it"):
        load_compressed(path, target)


def test_a_plain_network_is_loaded_whole_or_not_at_all():
    path, network = written(slim()), chain()
    checkpoint, before = torch.load(path, weights_only=True), state(network)
    del checkpoint["state_dict"]["model.6.bias"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="'6.bias' is missing"):
        load_compressed(path, network)
    assert same_state(state(network), before)


@pytest.mark.parametrize("keep", [0, 100, 4000])
@pytest.mark.parametrize("target", [ChainModule, ChainModule(), chain()])
def test_truncated_files_are_refused(keep, target):
    written(slim())
    with open("slim.ckpt", "rb") as whole, open("cut.ckpt", "wb") as part:
        part.write(whole.read()[:keep])
    with pytest.raises(ValueError, match=r"'cut.ckpt' cannot be read as a checkpoint"):
        load_compressed("cut.ckpt", target)


def test_other_files_and_targets_are_refused():
    torch.save(chain().state_dict(), "bare.pt")
    torch.save(chain(), "module.pt")
    path = written(slim())
    for arguments, error, message in (
        (("gone.ckpt", ChainModule), FileNotFoundError, "There is no file 'gone.ckpt'"),
        (("module.pt", ChainModule), ValueError, "pickled objects, which are never loaded"),
        (("bare.pt", ChainModule), ValueError, "no Lightning checkpoint, so it does not say how"),
        ((path, nn.Linear), ValueError, "expected a LightningModule class, or a LightningModule"),
        ((path, "ChainModule"), ValueError, "module is 'ChainModule', expected a LightningModule"),
    ):
        with pytest.raises(error, match=message):
            load_compressed(*arguments)
    with pytest.raises(ValueError, match="first given for a ChainModule that is built already"):
        load_compressed(path, ChainModule(), first=3)
