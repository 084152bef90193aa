"""A search of a minute: CPU seconds per episode, and what must hold for every search."""

from __future__ import annotations

import os
import tempfile

import lightning.pytorch as pl
import ratio_search_runs as runs
import torch
from sparsity_distillation import quiet_trainer

from lit_compress.callbacks.search.ratio_search import RatioSearch
from lit_compress.search.settings import CandidateSettings, ScoringSettings
from lit_compress.tasks import DigitsDataModule, ImageClassifier
from lit_compress.tasks.assets import ASSETS_VARIABLE

NUM_EPISODES = 24
QUICK_UNITS = 500.0  # of training steps, see machine.py; with the assets
TARGET = 0.5
VAL_PER_CLASS = 200


def report() -> list[str]:
    """Search, print what came out, and return what does not hold."""
    subject = of_mobilenet() if os.environ.get(ASSETS_VARIABLE) else of_digits()
    module, data, candidates = subject
    torch.manual_seed(0)
    before, random = runs.weights_of(module), torch.get_rng_state()
    with tempfile.TemporaryDirectory() as folder:
        search = quick_search(candidates, folder)
        result, cpu_seconds = runs.searched(module, data, search)
    broken = runs.broken_invariants(result, before, module)
    if not torch.equal(random, torch.get_rng_state()):
        broken.append("the search advanced torch's random numbers")
    print(result)
    for line in broken:
        print(f"broken: {line}")
    episodes = len(result.episodes)
    print(
        f"episodes={episodes} best_score={result.best_episode.score:.4f} "
        f"macs_ratio={runs.cost_ratio(result, result.best_episode):.4f} "
        f"broken_invariants={len(broken)} "
        f"cpu_s_per_episode={result.cpu_seconds / episodes:.3f} "
        f"cpu_s_per_episode_with_setup={cpu_seconds / episodes:.3f}"
    )
    return broken


def quick_search(candidates: CandidateSettings, folder: str) -> RatioSearch:
    """A search that gets as far as the agent's own choices."""
    return RatioSearch(
        target_macs_ratio=TARGET,
        num_episodes=NUM_EPISODES,
        candidates=candidates,
        scoring=ScoringSettings(split="val"),
        folder=folder,
        seed=1,
    )


def of_mobilenet() -> tuple[ImageClassifier, pl.LightningDataModule, CandidateSettings]:
    """The study's MobileNet-v1 on its images."""
    return (
        runs.trained_module("mobilenet_v1"),
        runs.search_data(runs.Settings(val_per_class=VAL_PER_CLASS)),
        CandidateSettings(),
    )


def of_digits() -> tuple[ImageClassifier, pl.LightningDataModule, CandidateSettings]:
    """A small network, trained for some seconds, where there are no assets."""
    pl.seed_everything(0, verbose=False)
    module = ImageClassifier("digits_cnn", lr=0.05)
    data = DigitsDataModule(batch_size=64)
    quiet_trainer(5, []).fit(module, data)
    return module, data, CandidateSettings(round_to=2, num_calibration_batches=8)
