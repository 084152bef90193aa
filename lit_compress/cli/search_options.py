"""The options of ``lit-compress search``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lit_compress.callbacks.search.ratio_search import RatioSearch
from lit_compress.cli.parsing import CommandParser
from lit_compress.search.settings import CandidateSettings, ScoringSettings, SearchTarget
from lit_compress.search.staged import stage_targets

__all__ = ["SearchOptions", "search_options"]

# What the callback gets from options that have other names or kinds here.
_COMPOSED = {"candidates", "scoring", "folder"}
_LISTED = {"ignored_layers"}


@dataclass(frozen=True)
class SearchOptions:
    """The options, checked.

    Attributes:
        given: All of them, by name.
        targets: One for each stage, the last one being that of the whole search; without stages
            the only one, in which no target may be given.
        candidates: How candidates are made.
        scoring: What they are scored on.
    """

    given: Namespace
    targets: tuple[SearchTarget, ...]
    candidates: CandidateSettings
    scoring: ScoringSettings

    @property
    def is_staged(self) -> bool:
        """Whether the search comes in several stages."""
        return len(self.targets) > 1

    def callback(self, target: SearchTarget, folder: Path) -> RatioSearch:
        """The search under a target.

        Raises:
            ValueError: If options are out of range or disagree.
        """
        names = {"space", "reward", "tolerance", "metric", "mode", "num_episodes", "searcher"}
        return RatioSearch(
            **vars(target),
            **{name: self.given[name] for name in (*names, "agent", "seed")},
            candidates=self.candidates,
            scoring=self.scoring,
            folder=folder,
        )


def search_options(args: Sequence[str]) -> SearchOptions:
    """Parse and check.

    Args:
        args: The command's arguments.

    Raises:
        ValueError: If a number is out of range, or options disagree.
    """
    parser = _parser()
    given = parser.instantiate_classes(parser.parse_args(_with_underscores(args)))
    target = SearchTarget(**_fields_of(SearchTarget, given))
    layers = [glob.strip() for glob in given.ignored_layers.split(",") if glob.strip()]
    settings = {**_fields_of(CandidateSettings, given), "ignored_layers": layers}
    options = SearchOptions(
        given,
        _targets(given, target),
        CandidateSettings(**settings),
        ScoringSettings(**_fields_of(ScoringSettings, given)),
    )
    for stage in options.targets:
        options.callback(stage, Path(given.output))  # refuses what cannot be
    return options


def _targets(given: Namespace, target: SearchTarget) -> tuple[SearchTarget, ...]:
    if given.stages is None:
        if given.tuning_steps is not None:
            raise ValueError("--tuning-steps is given and --stages is not; stages are tuned.")
        return (target,)
    if given.tuning_steps is None or given.tuning_steps < 1:
        raise ValueError(
            f"--tuning-steps is {given.tuning_steps}; expected at least 1 with --stages, each of "
            "which searches from what the one before it left, trained again."
        )
    try:
        on_the_way = [float(number) for number in given.stages.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--stages is {given.stages!r}; expected the targets on the way, as in 0.5,0.75."
        ) from error
    return stage_targets(target, on_the_way)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="lit-compress search",
        description="Find how much of each layer to keep under a budget, and write it as a plan.",
        usage="lit-compress search [CHECKPOINT] [--config FILE]... --target_macs_ratio=0.5 "
        "[options]",
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
    add("--output", type=str, default="ratio_search", help="Folder for what is found.")
    add(
        "--stages",
        type=str | None,
        help="Targets of the stages before the last, as in 0.5,0.75 before --final_sparsity=0.9. "
        "Each stage searches from the network that the one before it left, trained again.",
    )
    add("--tuning_steps", type=int | None, help="Optimizer steps that each stage is trained for.")
    parser.add_class_arguments(RatioSearch, as_group=False, skip=_COMPOSED)
    parser.add_class_arguments(CandidateSettings, as_group=False, skip=_LISTED)
    add(
        "--ignored_layers",
        type=str,
        default="",
        help="Name patterns of layers to leave whole, as in 'stem,layer1.*'. Patterns match names "
        "in the LightningModule and in its network: 'model.layer1.*' or 'layer1.*'.",
    )
    parser.add_class_arguments(ScoringSettings, as_group=False)
    add("--accelerator", type=str, default="auto", help="As for the Trainer.")
    add("--assets", type=str | None, help="Folder with data/ and weights/.")
    add("--wandb", type=str | None, help="Log episodes, table, plot and files to this W&B project.")
    return parser


def _with_underscores(args: Sequence[str]) -> list[str]:
    """``--target-macs-ratio=0.5`` as ``--target_macs_ratio=0.5``."""
    words = []
    for word in args:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            word = f"--{name[2:].replace('-', '_')}{equals}{value}"
        words.append(word)
    return words


def _fields_of(settings: type, given: Namespace) -> dict[str, Any]:
    return {field.name: given[field.name] for field in fields(settings)}
