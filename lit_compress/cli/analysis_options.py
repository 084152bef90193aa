"""The options of ``lit-compress analyze``."""

from __future__ import annotations

import math
from typing import Literal

from jsonargparse import Namespace

from lit_compress.cli.parsing import CommandParser

__all__ = ["analysis_parser", "checked_ratios"]


def analysis_parser() -> CommandParser:
    """The parser of ``lit-compress analyze``."""
    parser = CommandParser(
        prog="lit-compress analyze",
        description="Cut each channel group alone, evaluate what is left, and derive a plan.",
        usage="lit-compress analyze [CHECKPOINT] [--config FILE]... [options]",
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", type=str, help="A Lightning checkpoint or a state dict.")
    add(
        "-c",
        "--config",
        action="append",
        type=str,
        help="The run's configuration, as given to fit; by default the config.yaml beside the "
        "checkpoint. Without a checkpoint, the model as the configuration builds it.",
    )
    add("--input_shape", "--input-shape", type=str | None, help="Of one example, as in 3,32,32.")
    add("--assets", type=str | None, help="Folder with data/ and weights/.")
    add("--output", type=str, default="sensitivity", help="Folder for what is found.")
    add("--steps", type=int, default=8, help="Points of each group, beside the baseline.")
    add(
        "--max_ratio",
        "--max-ratio",
        type=float,
        default=0.9,
        help="Channels removed / original at the last point.",
    )
    add(
        "--tuning_steps",
        "--tuning-steps",
        type=int,
        default=0,
        help="Optimizer steps that each slim copy is tuned for, to be evaluated again.",
    )
    add(
        "--importance",
        type=Literal["l1", "l2", "bn_scale", "fpgm", "lamp"],
        default="l2",
        help="Which channels stay.",
    )
    add(
        "--ignored_layers",
        "--ignored-layers",
        type=str,
        default="",
        help="Name patterns of layers to leave whole, as in 'stem,layer1.*'. Patterns match names "
        "in the LightningModule and in its network: 'model.layer1.*' or 'layer1.*'.",
    )
    add("--tolerance", type=float, default=0.01, help="Loss of metric that the plan may cost.")
    add("--metric", type=str | None, help="What the plan goes by; by default top-1 or accuracy.")
    add(
        "--mode",
        type=Literal["max", "min"] | None,
        help="Whether more of the metric is better; by default told by its name.",
    )
    add("--round_to", "--round-to", type=int, default=8, help="Of the channels kept in the plan.")
    add(
        "--limit_val_batches",
        "--limit-val-batches",
        type=int | float | None,
        help="Validate on the first so many batches, or such a part of them; only where the data "
        "are not ordered, by class for instance.",
    )
    add("--accelerator", type=str, default="auto", help="As for the Trainer.")
    add("--wandb", type=str | None, help="Log table, plot and files to this W&B project.")
    return parser


def checked_ratios(options: Namespace) -> tuple[float, ...]:
    """The pruning ratios of the points, rising.

    Raises:
        ValueError: If a number among the options is out of range.
    """
    if options.steps < 1:
        raise ValueError(f"--steps is {options.steps}; expected at least 1.")
    if not 0 < options.max_ratio < 1:
        raise ValueError(f"--max-ratio is {options.max_ratio}; expected a number in (0, 1).")
    if options.tuning_steps < 0:
        raise ValueError(f"--tuning-steps is {options.tuning_steps}; expected at least 0.")
    if options.round_to < 1:
        raise ValueError(f"--round-to is {options.round_to}; expected at least 1.")
    if not 0 <= options.tolerance < math.inf:
        raise ValueError(f"--tolerance is {options.tolerance}; expected a number of at least 0.")
    return tuple(options.max_ratio * step / options.steps for step in range(1, options.steps + 1))
