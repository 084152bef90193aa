"""Kills runs with channel pruning at random moments, resumes them, and compares what comes out.

Each trial trains a small network on scikit-learn's digits with a schedule of cuts, and in some
trials with sparsity and distillation beside it, and writes a checkpoint every few steps. The
process is killed (SIGKILL) at random moments and started again from the newest checkpoint that can
be read, until the run has finished. Bars:

- no run is lost: once a checkpoint was written there always is one that can be read, and every
  resumed run starts (no structure mismatch);
- the weights at the end equal, bit for bit, those of the same run without interruption;
- ``load_compressed`` brings the slim module back from the last checkpoint.

    python benchmarks/kill_and_resume.py [--trials 24] [--seed 0] [--check]
    python benchmarks/kill_and_resume.py --quick --check
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from machine import machine, say_duration
from torch import Tensor

from lit_compress import (
    ChannelPenalty,
    ChannelPruning,
    Distillation,
    MagnitudeSparsity,
    Schedule,
    load_compressed,
)
from lit_compress.tasks import DigitsDataModule, ImageClassifier

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "kill_and_resume.json"
EPOCHS = 4  # of 19 steps
CHECKPOINT_EVERY = 3  # steps
MAX_STARTS = 40
KILLED_AT_STARTUP = 0.15  # of the kills
# Imported once, so that a start takes a fraction of a second.
PRELOAD = ["lit_compress", "lit_compress.tasks", "sklearn.datasets", "torch._dynamo"]
QUICK_TRIALS = 3
QUICK_UNITS = 300.0  # of training steps, see machine.py


# --- The schedules under test ---------------------------------------------------------------------


def one_shot() -> list[pl.Callback]:
    """One cut in mid-run."""
    return [
        ChannelPruning(
            0.5, schedule=Schedule("constant", begin=31, end=31, update_every=1), round_to=4
        )
    ]


def rounds() -> list[pl.Callback]:
    """Equal rounds with reconstruction, and fine-tuning between them."""
    schedule = Schedule("linear", begin=5, end=60, update_every=11)
    return [
        ChannelPruning(
            target_macs_ratio=0.4,
            schedule=schedule,
            round_to=2,
            reconstruct=True,
            num_calibration_batches=2,
        )
    ]


def progressive_with_sparsity() -> list[pl.Callback]:
    """A cubic schedule; masks are cut with the weights."""
    return [
        MagnitudeSparsity(0.7, schedule=Schedule(begin=0.1, end=0.8, update_every=4)),
        ChannelPruning(0.6, schedule=Schedule("cubic", 0.1, 0.9, update_every=5), round_to=2),
    ]


def rounds_with_distillation() -> list[pl.Callback]:
    """Global ranking, distilled from the dense network that the run began with."""
    schedule = Schedule("linear", begin=0.2, end=0.7, update_every=0.1)
    return [
        Distillation(),
        ChannelPruning(target_params_ratio=0.5, allocation="global", schedule=schedule, round_to=1),
    ]


def everything() -> list[pl.Callback]:
    """Group after group, under a growing penalty, with sparsity and distillation."""
    schedule = Schedule("linear", begin=10, end=66, update_every=8)
    return [
        Distillation(),
        MagnitudeSparsity(0.5, schedule=Schedule(begin=0.2, end=0.9, update_every=7)),
        ChannelPruning(
            0.5,
            importance="taylor",
            spread="layers",
            schedule=schedule,
            penalty=ChannelPenalty(0.01),
            recalibrate_batch_norm=True,
            num_calibration_batches=2,
        ),
    ]


KINDS: dict[str, Callable[[], list[pl.Callback]]] = {
    "one-shot": one_shot,
    "rounds, reconstruction": rounds,
    "progressive + sparsity": progressive_with_sparsity,
    "rounds + distillation": rounds_with_distillation,
    "layer by layer, penalty + sparsity + distillation": everything,
}


@dataclass(frozen=True)
class Trial:
    """One run that is killed again and again.

    Attributes:
        kind: A name in :data:`KINDS`.
        seed: Of the run and of the moments at which it is killed.
    """

    kind: str
    seed: int


# --- The process that is killed -------------------------------------------------------------------


class Announce(pl.Callback):
    """Writes the files ``started`` and ``ended``, so that others can time the steps in between."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is loaded; the first step comes."""
        (self.folder / "started").touch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last step is done."""
        (self.folder / "ended").touch()


def train(trial: Trial, folder: str, checkpoint: str | None) -> None:
    """Train in ``folder``, from a checkpoint or from the beginning; write ``final.pt``.

    What goes wrong is written to ``error.txt``.
    """
    try:
        _train(trial, Path(folder), checkpoint)
    except BaseException:
        Path(folder, "error.txt").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def _train(trial: Trial, folder: Path, checkpoint: str | None) -> None:
    be_quiet()
    pl.seed_everything(trial.seed, verbose=False)
    if trial.seed % 2:
        module = ImageClassifier("digits_cnn", lr=0.002, optimizer="adamw")
    else:
        module = ImageClassifier("digits_cnn", lr=0.05, optimizer="sgd")
    data = DigitsDataModule(batch_size=64, crop_padding=1, seed=trial.seed)
    pruning = KINDS[trial.kind]()
    saving = ModelCheckpoint(
        folder, "{step}", every_n_train_steps=CHECKPOINT_EVERY, save_top_k=2, save_last=True,
        monitor="step", mode="max",
    )  # fmt: skip
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=[Announce(folder), *pruning, saving],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    partial = folder / "final.partial"
    torch.save(module.model.state_dict(), partial)
    os.replace(partial, folder / "final.pt")


def be_quiet() -> None:
    """One thread, and no messages."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


# --- A trial --------------------------------------------------------------------------------------


def start(trial: Trial, folder: Path, checkpoint: Path | None) -> Any:
    """Start the run in a process of its own, in which everything is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    (folder / "started").unlink(missing_ok=True)
    path = None if checkpoint is None else str(checkpoint)
    process = context.Process(target=train, args=(trial, str(folder), path))
    process.start()
    return process


def wait_until_started(process: Any, folder: Path) -> None:
    """Wait for the first step, or the end of the process."""
    while process.exitcode is None and not (folder / "started").exists():
        process.join(0.01)


def is_readable(checkpoint: Path) -> bool:
    """Whether a checkpoint can be loaded."""
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception:
        return False
    return True


def newest_readable(folder: Path) -> tuple[Path | None, int]:
    """The newest checkpoint that can be loaded, and how many newer ones cannot."""
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for number, path in enumerate(found):
        if is_readable(path):
            return path, number
    return None, len(found)


def run_trial(trial: Trial, folder: Path | None = None) -> dict[str, Any]:
    """Run once in peace and once with kills; compare.

    Args:
        trial: The run.
        folder: Where checkpoints are written, in a folder that is removed afterwards; by default
            where temporary files go. Lightning writes a checkpoint there first and then moves it,
            which is atomic within one file system only.
    """
    with tempfile.TemporaryDirectory(dir=folder) as root:
        peaceful, killed = Path(root, "peaceful"), Path(root, "killed")
        peaceful.mkdir()
        killed.mkdir()
        process = start(trial, peaceful, None)
        process.join()
        if process.exitcode != 0:
            return asdict(trial) | {"finished": False, "error": _error(peaceful)}
        started, ended = ((peaceful / name).stat().st_mtime for name in ("started", "ended"))
        result = asdict(trial) | _run_with_kills(trial, killed, ended - started)
        if result["finished"]:
            result |= compare(peaceful, killed)
        return result


def _run_with_kills(trial: Trial, folder: Path, seconds: float) -> dict[str, Any]:
    """Kill and start again until the run has finished, or cannot go on.

    Args:
        trial: The run.
        folder: Where it writes.
        seconds: What its steps take without interruption.
    """
    chance = random.Random(trial.seed)
    counts = {"kills": 0, "unreadable": 0, "lost": 0}
    steps: list[int] = []
    for _ in range(MAX_STARTS):
        checkpoint, unreadable = newest_readable(folder)
        counts["unreadable"] += unreadable
        if checkpoint is not None:
            steps.append(torch.load(checkpoint, weights_only=True)["global_step"])
        elif steps:
            counts["lost"] += 1  # there was one before
        process = start(trial, folder, checkpoint)
        if chance.random() < KILLED_AT_STARTUP:
            process.join(chance.uniform(0, 1))
        else:
            wait_until_started(process, folder)
            process.join(chance.uniform(0, 0.5) * seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            counts["kills"] += 1
        elif process.exitcode == 0:
            return {"finished": True, "resumed_at": steps} | counts
        else:
            return {"finished": False, "resumed_at": steps, "error": _error(folder)} | counts
    error = f"not finished after {MAX_STARTS} starts"
    return {"finished": False, "resumed_at": steps, "error": error} | counts


def compare(peaceful: Path, killed: Path) -> dict[str, Any]:
    """Final weights of both, and what ``load_compressed`` makes of the last checkpoint."""
    expected: dict[str, Tensor] = torch.load(peaceful / "final.pt", weights_only=True)
    came: dict[str, Tensor] = torch.load(killed / "final.pt", weights_only=True)
    different = _first_difference(expected, came)
    last = load_compressed(killed / "last.ckpt", ImageClassifier)
    shapes = {name: tensor.shape for name, tensor in last.model.state_dict().items()}
    dense = ImageClassifier("digits_cnn").model.state_dict()
    return {
        "identical": different is None,
        "first_difference": different,
        "reloads": shapes == {name: tensor.shape for name, tensor in expected.items()},
        "params_ratio": sum(t.numel() for t in expected.values())
        / sum(t.numel() for t in dense.values()),
    }


def _first_difference(expected: dict[str, Tensor], came: dict[str, Tensor]) -> str | None:
    for name in dict.fromkeys([*expected, *came]):
        if name not in expected or name not in came or not torch.equal(expected[name], came[name]):
            return name
    return None


def _error(folder: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return (folder / "error.txt").read_text().strip().splitlines()[-1]
    return "the process ended without saying why"


# --- All trials -----------------------------------------------------------------------------------


def run_all(num_trials: int, seed: int, folder: Path | None = None) -> dict[str, Any]:
    """Run the trials, the kinds in turn."""
    kinds = list(KINDS)
    trials = []
    for number in range(num_trials):
        trials.append(run_trial(Trial(kinds[number % len(kinds)], seed + number), folder))
        print(json.dumps(trials[-1]), flush=True)
    return {
        "machine": machine(),
        "epochs": EPOCHS,
        "checkpoint_every": CHECKPOINT_EVERY,
        "trials": trials,
    }


def table(results: dict[str, Any]) -> str:
    """What each kind of run went through, as Markdown."""
    lines = [
        "| schedule | trials | kills | half-written files | lost | identical at the end |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        trials = [trial for trial in results["trials"] if trial["kind"] == kind]
        if trials:
            counts = [
                sum(trial.get(name, 0) for trial in trials)
                for name in ("kills", "unreadable", "lost", "identical")
            ]
            cells = [kind, str(len(trials)), *map(str, counts)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def check(results: dict[str, Any]) -> list[str]:
    """What does not hold."""
    missed = []
    for trial in results["trials"]:
        name = f"{trial['kind']}, seed {trial['seed']}"
        if not trial["finished"]:
            missed.append(f"{name}: did not finish: {trial['error']}")
            continue
        if trial["lost"]:
            missed.append(f"{name}: {trial['lost']} times no checkpoint could be read")
        if not trial["identical"]:
            missed.append(f"{name}: {trial['first_difference']} differs at the end")
        if not trial["reloads"]:
            missed.append(f"{name}: load_compressed gives another structure")
        if not trial["params_ratio"] < 1:
            missed.append(f"{name}: nothing was cut")
    kills = sum(trial.get("kills", 0) for trial in results["trials"])
    if kills < len(results["trials"]):
        missed.append(f"only {kills} kills in {len(results['trials'])} trials")
    return missed


def main() -> int:
    """Run, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_TRIALS} trials, not saved")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar does not hold")
    parser.add_argument("--trials", type=int, default=25, help="how many, the schedules in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints go; default: temporary files"
    )
    parser.add_argument("--output", type=Path, help="where to write the JSON of a run")
    arguments = parser.parse_args()
    be_quiet()
    if arguments.quick:
        say_duration(QUICK_UNITS)
    num_trials = QUICK_TRIALS if arguments.quick else arguments.trials
    results = run_all(num_trials, arguments.seed, arguments.folder)
    output = arguments.output
    if output is None and not arguments.quick:
        output = RESULTS
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    missed = check(results)
    for line in missed:
        print(line)
    kills = sum(trial.get("kills", 0) for trial in results["trials"])
    print(f"trials={len(results['trials'])} kills={kills} missed={len(missed)}")
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
