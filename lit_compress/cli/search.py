"""``lit-compress search``: find how much of each layer to keep, at once or in stages."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger

from lit_compress.callbacks.magnitude_sparsity import MagnitudeSparsity
from lit_compress.callbacks.pruning.channel_pruning import ChannelPruning
from lit_compress.callbacks.search.searched import found_sparsities
from lit_compress.cli.inspection import fill
from lit_compress.cli.search_options import SearchOptions, search_options
from lit_compress.cli.short_fits import filled_subject, traceless_trainer, tune
from lit_compress.cli.subject import Subject, quiet
from lit_compress.compress.schedules import Schedule
from lit_compress.files import write_text
from lit_compress.plotting import plot_search
from lit_compress.search.search_result import SearchResult
from lit_compress.search.settings import SearchTarget
from lit_compress.search.staged import plan_of_stages, search_in_stages

__all__ = ["search"]

_FILES = (
    "search.json", "plan.json", "sparsities.json", "layer_bits.json", "search.png", "tuned.ckpt",
)  # fmt: skip
_AT_ONCE = Schedule("constant", begin=0, end=0, update_every=1)


def search(args: Sequence[str]) -> None:
    """Search, print what was found, and write result, solution and picture into a folder.

    An interrupted search goes on exactly where it stopped, when it is started again.

    Args:
        args: The command's arguments; see ``lit-compress search --help``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or does not fit the model, an option is out of range, the
            model is not known, nothing can be searched, the target cannot be reached, the metric
            is not logged, or the folder holds another search.
        MisconfigurationException: If the module has no ``validation_step`` or no data.
    """
    options = search_options(args)
    given = options.given
    logger = None
    if given.wandb is not None:
        logger = WandbLogger(project=given.wandb, save_dir=given.output)
    subject = filled_subject(given, "search")
    folder = Path(given.output)
    if options.is_staged:
        _StagedSearch(options, subject, folder, logger).run()
    else:
        result = _search(options, subject, options.targets[0], folder, logger)
        print(result)
        _tell_files(result, folder)
    if logger is not None:
        logger.experiment.finish()


def _search(
    options: SearchOptions,
    subject: Subject,
    target: SearchTarget,
    folder: Path,
    logger: WandbLogger | None,
) -> SearchResult:
    """A fit of no epochs, at whose begin the callback searches."""
    callback = options.callback(target, folder)
    trainer = traceless_trainer(
        options.given.accelerator,
        max_epochs=0,
        num_sanity_val_steps=0,
        logger=logger or False,
        enable_progress_bar=True,
        callbacks=[callback],
    )
    with quiet():
        trainer.fit(subject.module, subject.data)
    assert callback.result is not None, "the fit has begun"
    return callback.result


def _tell_files(result: SearchResult, folder: Path) -> None:
    picture = folder / "search.png"
    if not picture.is_file():
        try:
            plot_search(result, picture)
        except ModuleNotFoundError as error:
            print(f"lit-compress search: warning: {error}", file=sys.stderr)
    files = [folder / name for name in _FILES]
    print(f"\nWritten: {', '.join(str(file) for file in files if file.is_file())}")


class _StagedSearch:
    """Searches, cuts or prunes, and trains, stage by stage, each in a folder of its own.

    A stage that was finished by an earlier run is not trained again.

    Args:
        options: What to search.
        subject: The model and its data; in the end it is the network that the last stage left.
        folder: Of the folders.
        logger: For the searches.
    """

    def __init__(
        self, options: SearchOptions, subject: Subject, folder: Path, logger: WandbLogger | None
    ) -> None:
        self._options = options
        self._subject = subject
        self._folder = folder
        self._logger = logger
        self._stage = 0

    def run(self) -> None:
        """Search all stages."""
        search_in_stages(self._options.targets, self._search, self._leave)

    @property
    def _stage_folder(self) -> Path:
        return self._folder / f"stage-{self._stage}"

    def _search(self, target: SearchTarget) -> SearchResult:
        self._stage += 1
        declared = self._options.targets[self._stage - 1]
        (name,) = declared.given
        of = f"stage {self._stage} of {len(self._options.targets)}"
        print(f"{of}, {name} {getattr(declared, name):g}", flush=True)
        return _search(self._options, self._subject, target, self._stage_folder, self._logger)

    def _leave(self, results: Sequence[SearchResult]) -> None:
        """Bring the network to what was found, and train it, unless that was done before."""
        steps = self._options.given.tuning_steps
        checkpoint, note = (self._stage_folder / name for name in ("tuned.ckpt", "tuned.json"))
        done = {"tuning_steps": steps, "found": results[-1].values}
        if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == done:
            fill(self._subject.network, str(checkpoint))
        else:
            note.unlink(missing_ok=True)
            module, accelerator = self._subject.module, self._options.given.accelerator
            to_it = self._to_it(results)
            trainer = tune(module, self._subject, accelerator, steps, [to_it])
            trainer.save_checkpoint(checkpoint, weights_only=True)
            write_text(note, json.dumps(done, indent=1) + "\n")
        if results[-1].space == "channels":
            # What the search itself has written is for a network that was cut before.
            plan_of_stages(results).save(self._stage_folder / "plan.json")
        print(results[-1])
        _tell_files(results[-1], self._stage_folder)
        print(flush=True)

    def _to_it(self, results: Sequence[SearchResult]) -> Callback:
        """What brings the network to what was found."""
        candidates = self._options.candidates
        if results[-1].space == "sparsity":
            sparsities = found_sparsities(results[-1], self._subject.module)
            return MagnitudeSparsity(sparsities, schedule=_AT_ONCE)
        batches = candidates.num_calibration_batches
        return ChannelPruning(
            plan=plan_of_stages(results),
            importance=candidates.importance,  # type: ignore[arg-type]
            reconstruct=batches > 0,
            num_calibration_batches=max(batches, 1),
            ignored_layers=candidates.ignored_layers,
        )
