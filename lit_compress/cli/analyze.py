"""``lit-compress analyze``: how much each channel group matters, and a plan from it."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import WandbLogger
from torch import nn

from lit_compress.callbacks.lightning import tracking
from lit_compress.callbacks.lightning.network_calls import name_of_network
from lit_compress.callbacks.lightning.resident_validation import (
    ResidentValidation,
    record_validation,
)
from lit_compress.callbacks.search.scoring import chosen_metric
from lit_compress.cli.analysis_options import analysis_parser, checked_ratios
from lit_compress.cli.inspection import numbers
from lit_compress.cli.short_fits import filled_subject, traceless_trainer, tune
from lit_compress.cli.subject import Subject, quiet
from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.channels.importance import channel_importance
from lit_compress.compress.channels.plan import ChannelPlan
from lit_compress.compress.channels.tracing import find_channel_groups
from lit_compress.measure.inputs import as_call, with_batch_size
from lit_compress.plotting import plot_sensitivity
from lit_compress.search.evaluation import Mode
from lit_compress.search.sensitivity import planned_points, sensitivity_curves
from lit_compress.search.sensitivity_result import SensitivityResult

__all__ = ["analyze"]

_MOST_PANELS = 4


def analyze(args: Sequence[str]) -> None:
    """Cut each channel group alone, evaluate, and write curves, plot and plan into a folder.

    An interrupted analysis goes on where it stopped, when it is started again.

    Args:
        args: The command's arguments; see ``lit-compress analyze --help``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or does not fit the model, an option is out of range, the
            model or its data are not known, nothing can be cut, the metric is not logged, or the
            folder holds the analysis of another model or setting.
        MisconfigurationException: If the module has no ``validation_step`` or no data for it.
    """
    options = analysis_parser().parse_args(list(args))
    ratios = checked_ratios(options)
    logger = None
    if options.wandb is not None:
        logger = WandbLogger(project=options.wandb, save_dir=options.output)
    shape = numbers(options.input_shape, "--input-shape") if options.input_shape else None
    subject = filled_subject(options, "analyze", shape)
    network = subject.network
    ignored = [glob.strip() for glob in options.ignored_layers.split(",") if glob.strip()]
    groups = _channel_groups(subject, ignored)
    planned_points(groups, ratios)  # refuses what cannot be, before validation runs

    trainer = traceless_trainer(options.accelerator, limit_val_batches=options.limit_val_batches)
    with quiet():
        batches, dense = record_validation(trainer, subject.module, subject.data)
    device = trainer.strategy.root_device
    subject.module.to(device)
    validation = ResidentValidation(subject.module, network, batches, trainer)
    metric, mode = chosen_metric(options.metric, options.mode, tuple(dense), option="--metric")
    setting = _setting(options, subject, len(batches))
    file = Path(options.output) / "sensitivity.json"
    done = _interrupted(file, groups, setting, dense) if file.is_file() else None

    scores = channel_importance(network, groups, options.importance)
    tune_copy = _tuning(options, subject, validation, device) if options.tuning_steps else None

    def look_at_baseline(result: SensitivityResult) -> None:
        _warn_of_other_numbers(result, dense)
        result.derive_plan(options.tolerance, metric, mode)  # refuses what no plan can come of
        _warn_of_harmful_tuning(result, metric, mode, options.tolerance)

    if done is not None:
        look_at_baseline(done)
    total = len(planned_points(groups, ratios))
    with _Progress(total, file, look_at_baseline) as progress, quiet():
        result = sensitivity_curves(
            network, groups, scores, validation, ratios, tune_copy, done, progress, setting
        )
    plan = result.derive_plan(options.tolerance, metric, mode, round_to=options.round_to)
    _hand_over(result, plan, metric, Path(options.output), options.tolerance, logger)


# --- The model and its data -----------------------------------------------------------------------


def _channel_groups(subject: Subject, ignored_layers: Sequence[str]) -> ChannelGroups:
    inputs = subject.example_inputs()
    if inputs is None:
        raise ValueError(
            "nothing says what input the model takes; give a configuration with data, or the shape "
            "of one example, as in --input-shape 3,32,32."
        )
    args, kwargs = as_call(with_batch_size(inputs, 2))
    return find_channel_groups(
        subject.network,
        lambda model: model(*args, **kwargs),
        ignored_layers,
        name_of_network(subject.module),
    )


def _tuning(
    options: Namespace, subject: Subject, validation: ResidentValidation, device: torch.device
) -> Callable[[nn.Module], None]:
    """Trains as the module says, each copy with the same seed."""

    def tune_copy(network: nn.Module) -> None:
        module = validation.module_with(network)
        tune(module, subject, options.accelerator, options.tuning_steps)
        module.to(device)

    return tune_copy


# --- What it depends on ---------------------------------------------------------------------------


def _setting(options: Namespace, subject: Subject, num_batches: int) -> dict[str, str]:
    """What the points of an analysis depend on, so that no other is continued."""
    setting = {
        "model": f"{type(subject.module).__name__}, {type(subject.network).__name__}",
        "weights": _digest(subject.network),
        "importance": options.importance,
        "validation_batches": str(num_batches),
        "tuning_steps": str(options.tuning_steps),
    }
    if options.tuning_steps:
        setting["hyperparameters"] = _shown_hyperparameters(subject.module)
    return setting


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _shown_hyperparameters(module: LightningModule) -> str:
    return ", ".join(
        f"{key}={value!r}" for key, value in sorted(module.hparams.items()) if key[0] != "_"
    )


def _interrupted(
    file: Path, groups: ChannelGroups, setting: Mapping[str, str], dense: Mapping[str, float]
) -> SensitivityResult:
    """The analysis in the file, if it is one to be continued."""
    fix = "Give another folder as --output, or remove the file to begin again."
    try:
        done = SensitivityResult.load(file)
        done.check(groups, setting)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} holds another analysis: {error} {fix}") from error
    for name in _differing(done.baseline.metrics, dense):
        raise ValueError(
            f"{str(file)!r} holds an analysis on other data: {name!r} of the whole model was "
            f"{done.baseline.metrics.get(name)} and is {dense.get(name)}. {fix}"
        )
    return done


def _differing(one: Mapping[str, float], other: Mapping[str, float]) -> list[str]:
    """Metrics that are more apart than rounding explains."""
    return [
        name
        for name in dict.fromkeys((*one, *other))
        if not math.isclose(
            one.get(name, math.nan), other.get(name, math.nan), rel_tol=1e-3, abs_tol=1e-5
        )
        and not (math.isnan(one.get(name, 0.0)) and math.isnan(other.get(name, 0.0)))
    ]


# --- On the way and at the end --------------------------------------------------------------------


class _Progress:
    """Saves after every point, and moves a bar on a terminal.

    Args:
        total: Points that there will be.
        file: Where they are saved.
        on_baseline: Called before the baseline is saved; may raise.
    """

    def __init__(
        self, total: int, file: Path, on_baseline: Callable[[SensitivityResult], None]
    ) -> None:
        self._bar = Tqdm(total=total, desc="analyze", unit="point", file=sys.stderr, disable=None)
        self._file = file
        self._on_baseline = on_baseline

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __call__(self, result: SensitivityResult) -> None:
        if not result.points:
            self._on_baseline(result)
        result.save(self._file)
        self._bar.n = min(len(result.points), self._bar.total)
        self._bar.refresh()


def _warn_of_other_numbers(result: SensitivityResult, dense: Mapping[str, float]) -> None:
    baseline = result.baseline.metrics
    for name in _differing(baseline, dense):
        print(
            f"lit-compress analyze: warning: {name!r} is {baseline.get(name)} here and was "
            f"{dense.get(name)} in Trainer.validate. Does the validation use random numbers, "
            "change its batches in place, or log in a way of its own?",
            file=sys.stderr,
        )


def _warn_of_harmful_tuning(
    result: SensitivityResult, metric: str, mode: Mode, tolerance: float
) -> None:
    if not result.is_tuned:
        return
    before, after = (result.baseline.value(metric, tuned) for tuned in (False, True))
    if (before - after if mode == "max" else after - before) > tolerance:
        print(
            f"lit-compress analyze: warning: the tuning alone takes {metric!r} of the whole model "
            f"from {before:.4f} to {after:.4f}; its learning rate is too high for a trained model, "
            "or the steps too few. The plan holds the points against the former.",
            file=sys.stderr,
        )


def _hand_over(
    result: SensitivityResult,
    plan: ChannelPlan,
    metric: str,
    folder: Path,
    tolerance: float,
    logger: WandbLogger | None,
) -> None:
    """Print, write and log what was found."""
    files = [folder / "sensitivity.json", folder / "plan.json"]
    plan.save(files[1])
    ways = (False, True) if result.is_tuned else (False,)
    print("\n\n".join(result.table(metric, tuned) for tuned in ways))
    print(f"\nPlan at a tolerance of {tolerance:g} in {metric}, each group by itself:\n{plan}")
    others = [name for name in result.metrics if name != metric]
    shown = (metric, *others)[:_MOST_PANELS]
    pictures = []
    try:
        pictures.append(plot_sensitivity(result, folder / "sensitivity.png", shown))
    except ModuleNotFoundError as error:
        print(f"lit-compress analyze: warning: {error}", file=sys.stderr)
    print(f"\nWritten: {', '.join(map(str, [*files, *pictures]))}")
    if logger is not None:
        with quiet():
            trainer = Trainer(accelerator="cpu", logger=logger, enable_checkpointing=False)
        for tuned in ways:
            header, *rows = result.rows(metric, tuned)
            key = "sensitivity/tuned" if tuned else "sensitivity/curves"
            tracking.log_table(trainer, key, header, rows)
        tracking.log_images(trainer, "sensitivity/plot", pictures)
        metadata = {"metric": metric, "tolerance": tolerance}
        tracking.log_artifact(trainer, "sensitivity", "analysis", [*files, *pictures], metadata)
        logger.experiment.finish()
