"""Distillation where the student, the teacher or both were cut."""

import pytest
import torch

from lit_compress import Distillation, load_compressed
from lit_compress.callbacks.lightning.structure_in_checkpoints import carry_structure
from tests.callbacks.nets import loader, same_weights, trainer
from tests.slim_nets import ChainModule, cut, widths

WIDTHS = [(8, 6), (3, 2), (5, 4)]


def module_of(width, seed=0):
    torch.manual_seed(seed)
    module = ChainModule()
    if width != (8, 6):
        cut(module, *width)
    carry_structure(module)
    return module


def written(module, path):
    run = trainer()
    run.strategy.connect(module)
    run.save_checkpoint(path)
    return path


def fitted(module, callback, ckpt_path=None, max_epochs=1):
    run = trainer(callbacks=[callback], max_epochs=max_epochs)
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("teacher", WIDTHS)
@pytest.mark.parametrize("student", WIDTHS[:2])
def test_a_checkpoint_gives_the_teacher_its_structure(teacher, student):
    source, module = module_of(teacher), module_of(student, seed=1)
    callback = Distillation(checkpoint=written(source, "teacher.ckpt"))
    fitted(module, callback)
    (found,) = callback._teachers
    assert widths(found.network) == teacher
    assert same_weights(found.network, source.model)
    assert widths(module) == student


@pytest.mark.parametrize("width", WIDTHS)
def test_bare_weights_are_of_the_student_as_it_is_or_as_it_was_dense(width):
    torch.save(module_of(width).model.state_dict(), "bare.pt")
    callback = Distillation(checkpoint="bare.pt")
    if width == (5, 4):
        with pytest.raises(
            ValueError, match=r"'0.weight' has shape \(5, 1, 3, 3\), expected \(8, "
        ):
            fitted(module_of((3, 2)), callback)
        return
    fitted(module_of((3, 2), seed=1), callback)
    assert same_weights(callback._teachers[0].network, module_of(width).model)


def test_a_given_teacher_gets_the_structure_too():
    source, given = module_of((3, 2)), module_of((8, 6), seed=1)
    fitted(module_of((8, 6)), Distillation(given.model, written(source, "slim.ckpt")))
    assert widths(given) == (3, 2)
    assert same_weights(given.model, source.model)


@pytest.mark.parametrize("begin", WIDTHS)
@pytest.mark.parametrize("end", WIDTHS)
def test_a_resumed_run_has_the_snapshot_of_its_beginning(begin, end):
    module, callback = module_of(begin), Distillation()
    start = module_of(begin)
    run = fitted(module, callback)
    cut(module, *(min(a, b) for a, b in zip(begin, end, strict=True)))
    run.optimizers[0].state.clear()
    run.save_checkpoint("last.ckpt")
    again, resumed = load_compressed("last.ckpt", ChainModule), Distillation()
    fitted(again, resumed, ckpt_path="last.ckpt", max_epochs=2)
    (found,) = resumed._teachers
    assert widths(found.network) == begin
    assert same_weights(found.network, start.model)
    assert widths(again) == widths(module)
