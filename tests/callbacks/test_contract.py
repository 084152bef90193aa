"""What every callback, and every chain of them, promises: one suite for all."""

import copy
import random
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from lit_compress import load_compressed
from lit_compress.callbacks.base import CompressionCallback
from tests.callbacks.contract import (
    BATCHES,
    CHAINS,
    STEPS,
    Copies,
    Raises,
    Scored,
    every_step,
    fit,
    hooks,
    module,
)
from tests.callbacks.nets import same_weights, trainer
from tests.distributed.launch import report, run_in_two_processes

MOMENTS = ["on_train_batch_start", "on_before_backward", "on_before_optimizer_step"]
MOMENTS += ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"]


@pytest.fixture(scope="module", params=CHAINS)
def whole(request, tmp_path_factory):
    """One uninterrupted run of each chain: its name, folder and module."""
    folder = tmp_path_factory.mktemp("whole")
    trained = fit(*CHAINS[request.param](), every_step(folder), folder=folder)
    assert not same_weights(trained, fit(folder=folder))
    return request.param, folder, trained


def draws(name):
    """Random numbers, the same for a chain in each run of the tests."""
    return random.Random(f"{name} of 2")


def is_released(callbacks):
    ours = [c for c in callbacks if isinstance(c, CompressionCallback)]
    return bool(ours) and not any(c.bindings for c in ours)


def test_a_run_resumed_at_any_step_ends_in_the_same_bits(whole, tmp_path):
    name, folder, trained = whole
    for step in draws(name).sample(range(1, STEPS), 4):
        path = folder / f"step={step}.ckpt"
        resumed = fit(*CHAINS[name](), folder=tmp_path, ckpt_path=path)
        assert same_weights(trained, resumed), step


def test_checkpoints_open_without_pickles_and_come_back_in_one_line(whole):
    name, folder, trained = whole
    path = folder / f"step={STEPS}.ckpt"
    assert torch.load(path, weights_only=True)["state_dict"]
    if name == "after training":
        return  # it quantizes after the last checkpoint
    x = torch.randn(4, 1, 6, 6)
    loaded = load_compressed(path, Scored)
    assert torch.equal(loaded.eval()(x), trained.eval()(x))


def test_state_of_a_newer_version_is_left_alone(whole, tmp_path):
    name, folder, trained = whole
    saved = torch.load(folder / f"step={STEPS // 2}.ckpt", weights_only=True)
    for key, state in saved["callbacks"].items():
        if "ModelCheckpoint" not in key and state:
            state["of_a_newer_version"] = [1, {"a": torch.zeros(2)}]
    torch.save(saved, tmp_path / "newer.ckpt")
    resumed = fit(*CHAINS[name](), folder=tmp_path, ckpt_path=tmp_path / "newer.ckpt")
    assert same_weights(trained, resumed)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_is_interrupted_leaves_no_trace_and_goes_on(whole, error, tmp_path):
    name, _, trained = whole
    draw = draws(f"{name} {error}")
    callbacks, start = CHAINS[name](), module()
    hook, step = (
        draw.choice(MOMENTS * (error is ValueError) or MOMENTS[-3:]),
        draw.randrange(1, STEPS),
    )
    if hook in ("on_validation_end", "on_train_epoch_end"):
        step = BATCHES * draw.randrange(1, STEPS // BATCHES)
    broken, keep = Raises(hook, step, error), OnExceptionCheckpoint(tmp_path, filename="broken")
    with pytest.raises((error, SystemExit)):
        fit(*callbacks, broken, keep, folder=tmp_path, start=start)
    assert is_released(callbacks), (hook, step)
    assert hooks(start) == hooks(module()), (hook, step)
    if hook == "on_train_batch_end":  # elsewhere a loader is a batch ahead of the weights
        resumed = fit(*CHAINS[name](), folder=tmp_path, ckpt_path=tmp_path / "broken.ckpt")
        assert same_weights(trained, resumed), step
    again = fit(*callbacks, folder=tmp_path / "again")
    assert same_weights(trained, again), (hook, step)


def test_a_finished_run_leaves_no_trace_and_the_callbacks_train_another(whole, tmp_path):
    name, _, trained = whole
    callbacks, start = CHAINS[name](), module()
    first = fit(*callbacks, folder=tmp_path, start=start)
    assert is_released(callbacks)
    assert same_weights(trained, first)
    assert hooks(first) == hooks(module())
    assert same_weights(trained, fit(*callbacks, folder=tmp_path / "again"))


def test_validation_before_the_fit_changes_nothing(whole, tmp_path):
    name, folder, trained = whole
    callbacks = CHAINS[name]()
    runner = trainer(callbacks=callbacks, default_root_dir=tmp_path)
    runner.validate(module(), verbose=False)
    runner.validate(module(), ckpt_path=folder / f"step={STEPS // 2}.ckpt", verbose=False)
    assert same_weights(trained, fit(*callbacks, folder=tmp_path))


@pytest.mark.parametrize(
    "settings", [{"fast_dev_run": 2}, {"overfit_batches": 2}, {"limit_train_batches": 3}]
)
def test_short_runs_end(whole, settings, tmp_path):
    trained = fit(*CHAINS[whole[0]](), folder=tmp_path, max_epochs=STEPS, **settings)
    assert all(bool(p.isfinite().all()) for p in trained.parameters())
    assert hooks(trained) == hooks(module())


def test_copies_in_mid_fit_are_free_of_the_run(whole, tmp_path):
    name, _, trained = whole
    copies, callbacks = Copies(draws(name).randrange(1, STEPS)), CHAINS[name]()
    copied = fit(*copy.deepcopy(callbacks), copies, folder=tmp_path)
    assert same_weights(trained, copied)
    assert copies.network is not None
    assert copies.network(torch.randn(2, 1, 6, 6)).shape == (2, 4)


def test_two_processes_end_in_the_same_weights(tmp_path):
    results = run_in_two_processes(__file__, tmp_path)
    assert results == [str(dict.fromkeys(CHAINS, True))] * 2


def in_two_processes(folder):
    found = {}
    for name, chain in CHAINS.items():
        settings = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        trained = fit(*chain(), folder=folder / name, **settings)
        flat = torch.cat([p.detach().flatten() for p in trained.parameters()])
        theirs = [torch.empty_like(flat) for _ in range(2)]
        torch.distributed.all_gather(theirs, flat)
        found[name] = torch.equal(*theirs)
    report(folder, found)


if __name__ == "__main__":
    in_two_processes(Path(sys.argv[1]))
