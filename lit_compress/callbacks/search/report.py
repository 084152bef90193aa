"""Show the progress of a search; print, save and log its result."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_compress.callbacks.lightning import tracking
from lit_compress.callbacks.search.searched import found_bits, found_sparsities
from lit_compress.files import write_text
from lit_compress.plotting import plot_search
from lit_compress.search.search_result import Episode, SearchResult, episode_rows

__all__ = ["SearchProgress", "report_search", "save_solution"]

_SOLUTION_FILES = {
    "channels": "plan.json",
    "sparsity": "sparsities.json",
    "bits": "layer_bits.json",
}


class SearchProgress:
    """A bar on a terminal and a row in every logger, after each episode.

    Args:
        trainer: The Trainer, whose progress bar says whether there is to be one.
        num_episodes: Episodes altogether.
    """

    def __init__(self, trainer: pl.Trainer, num_episodes: int) -> None:
        self._trainer = trainer
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        self._bar = Tqdm(
            total=num_episodes,
            desc="RatioSearch",
            unit="episode",
            file=sys.stderr,
            disable=None if shown else True,
        )

    def __call__(self, result: SearchResult) -> None:
        """Show the last episode."""
        episode = result.episodes[-1]
        best = result.running_best()[-1]
        self._bar.n = len(result.episodes)
        self._bar.set_postfix_str(_shown(result, episode, best))
        self._bar.refresh()
        metrics = {"search/episode": float(episode.number), "search/best_reward": best}
        if episode.failure is None:
            metrics |= {"search/reward": episode.reward, "search/score": episode.score}
        for name in result.dense_costs:
            metrics[f"search/{name}_ratio"] = result.cost_ratio(episode, name)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for logger in self._trainer.loggers:
            # W&B counts rows itself; a step of ours would stand in the way of training's.
            step = None if isinstance(logger, WandbLogger) else episode.number
            logger.log_metrics(finite, step=step)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def report_search(trainer: pl.Trainer, result: SearchResult, folder: Path) -> None:
    """Print a result, write it into a folder, and log it.

    W&B gets the levels of each layer and all episodes as tables, the picture, and result and
    solution as an artifact; TensorBoard the tables as text.

    Args:
        trainer: The Trainer.
        result: With at least one finished episode.
        folder: For ``search.json``, the solution and ``search.png``.
    """
    rank_zero_info(f"RatioSearch:\n{result}")
    if not trainer.is_global_zero:
        return
    solution = save_solution(result, folder, trainer.lightning_module)
    files = [result.save(folder / "search.json"), solution]
    pictures = []
    try:
        pictures.append(plot_search(result, folder / "search.png"))
    except ModuleNotFoundError as error:
        rank_zero_warn(f"RatioSearch: no picture was drawn: {error}")
    rows = [
        (d.name, d.full, result.values[d.name], round(result.preserve_ratios[d.name], 4))
        for d in result.decisions
    ]
    tracking.log_table(trainer, "search/layers", ("layer", "full", "kept", "ratio"), rows)
    header, *episodes = episode_rows(result)
    tracking.log_table(trainer, "search/episodes", [str(name) for name in header], episodes)
    tracking.log_images(trainer, "search/result", pictures)
    metadata = {"score": result.best_episode.score, **result.best_episode.costs}
    tracking.log_artifact(trainer, "ratio-search", "search", files, metadata)


def save_solution(result: SearchResult, folder: Path, pl_module: pl.LightningModule) -> Path:
    """Write what was found as the file that later runs take.

    Args:
        result: With at least one finished episode.
        folder: Where to write it.
        pl_module: The module whose network was searched.

    Returns:
        ``plan.json`` for ``ChannelPruning(plan=...)``, or ``sparsities.json`` with the mapping for
        ``MagnitudeSparsity(final_sparsity=...)``, or ``layer_bits.json`` with that for
        quantization.
    """
    file = folder / _SOLUTION_FILES[result.space]
    if result.space == "channels":
        result.plan.save(file)
    else:
        sparse = result.space == "sparsity"
        found = found_sparsities(result, pl_module) if sparse else found_bits(result)
        write_text(file, json.dumps(found, indent=1) + "\n")
    return file


def _shown(result: SearchResult, episode: Episode, best: float) -> str:
    text = f"best {best:.4f}"
    if result.budget is not None:
        name, limit = result.budget
        text += f", {name} {episode.costs[name] / limit:.1%} of the budget"
    return text if not result.num_failed else f"{text}, {result.num_failed} failed"
