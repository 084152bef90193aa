"""Runs whose files lie beside this module: make.py began them, test_golden.py goes on with them.

What a run declares is part of its checkpoints: nothing here may change as long as these are kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_compress import (
    CandidateSettings,
    ChannelPenalty,
    ChannelPruning,
    CompressionSummary,
    DDPGSettings,
    Distillation,
    FeatureMatching,
    MagnitudeSparsity,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RatioSearch,
    Schedule,
    ScoringSettings,
    load_compressed,
)
from lit_compress import WeightClustering as Clustering

FOLDER = Path(__file__).parent


class GoldenNet(pl.LightningModule):
    """A small network with its own data, which are exact in every arithmetic, in fixed order."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 1, bias=False),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.model(x)
        return answer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        answer = self(batch[0])
        self.log("val_acc", (answer.argmax(1) == batch[1]).float().mean())
        self.log("val_loss", nn.functional.cross_entropy(answer, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A large eps, lest the noise of small gradients tell processors apart.
        return torch.optim.AdamW(self.parameters(), lr=0.02, eps=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        """Four batches."""
        return DataLoader(examples(64, seed=0), batch_size=16)

    def val_dataloader(self) -> DataLoader[Any]:
        """Two batches."""
        return DataLoader(examples(32, seed=1), batch_size=16)


def examples(num: int, seed: int) -> TensorDataset:
    """Four patterns in noise, in eighths."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(-8, 9, (4, 1, 6, 6), generator=torch.Generator().manual_seed(9))
    y = torch.randint(0, 4, (num,), generator=generator)
    noise = torch.randint(-12, 13, (num, 1, 6, 6), generator=generator)
    return TensorDataset((patterns[y] + noise) / 8, y)


def steps(kind: Any, end: float) -> Schedule:
    """A schedule in fractions, whose steps are known by the checkpoint only."""
    return Schedule(kind, begin=0.125, end=end, update_every=0.125)


def sparsify(end: float = 0.75, final: Any = 0.7, initial: float = 0.0) -> MagnitudeSparsity:
    """To 70 % zeros."""
    return MagnitudeSparsity(final, initial, steps("cubic", end))


def prune(end: float = 0.75, **arguments: Any) -> ChannelPruning:
    """In rounds, Adam's state with it."""
    return ChannelPruning(round_to=1, schedule=steps("linear", end), **arguments)


def quantize(bits: int = 8, **arguments: Any) -> QuantizationAwareTraining:
    """Calibrated on two batches."""
    return QuantizationAwareTraining(bits, num_calibration_batches=2, **arguments)


def search(space: Any, num_episodes: int = 3, **target: float) -> RatioSearch:
    """A few episodes, with files in a folder named as the space."""
    return RatioSearch(
        space,
        num_episodes=num_episodes,
        agent=DDPGSettings(hidden_size=4, batch_size=4, buffer_size=16, learning_starts=1),
        candidates=CandidateSettings(round_to=1, num_calibration_batches=2),
        scoring=ScoringSettings(num_examples=32, precision="trainer"),
        folder=space,
        **target,  # type: ignore[arg-type]
    )


summary = functools.partial(CompressionSummary, dirpath="summary", latency=False, plots=False)
after = functools.partial(PostTrainingQuantization, num_calibration_batches=2, dirpath=".")

RUNS: dict[str, Callable[[], list[pl.Callback]]] = {
    "sparsity": lambda: [sparsify(initial=0.65)],  # so that weights come back
    "clustering_before": lambda: [Clustering(4, begin=0.75)],
    "clustering_after": lambda: [Clustering(4, begin=0.25)],
    "pruning": lambda: [prune(pruning_ratio=0.5, penalty=ChannelPenalty(0.01))],
    "pruning_layers": lambda: [
        prune(target_macs_ratio=0.505, allocation="global", spread="layers")
    ],
    "qat_observed": lambda: [quantize(4, initial_weight_bits=8, freeze_batch_norm=0.75)],
    "qat_learned": lambda: [quantize(4, ranges="learned", begin=0.125, freeze_batch_norm=0.75)],
    "ptq_to_come": lambda: [after(save=False)],
    "search_channels": lambda: [
        search("channels", target_macs_ratio=0.5),
        prune(plan="searched"),
    ],
    "search_sparsity": lambda: [
        search("sparsity", final_sparsity=0.5),
        sparsify(final="searched"),
    ],
    "search_bits": lambda: [
        search("bits", mean_weight_bits=4.0),
        quantize(layer_bits="searched"),
    ],
    "distillation_file": lambda: [
        Distillation(checkpoint="dense.ckpt", begin=0.6, features=FeatureMatching({"3": "3"}))
    ],
    "distill_sparsify": lambda: [Distillation(), sparsify()],
    "prune_quantize": lambda: [prune(0.25, pruning_ratio=0.5), quantize(begin=0.375), summary()],
    "sparsify_cluster": lambda: [sparsify(0.25), Clustering(4, begin=0.375), summary()],
}
"""Runs of 16 steps by name, each with a checkpoint of the same name after the eighth.

They go on for :data:`LONGER`, under the moments of the shorter run, and in double precision, in
which no processor rounds a weight or an activation to another integer.
"""

LONGER = 5

METHODS: dict[str, dict[str, Any]] = {
    "ptq_static": {"weight_bits": 6, "corrections": ["bias_correction"]},
    "ptq_dynamic": {"method": "dynamic"},
    "ptq_float16": {"method": "float16"},
    "ptq_fixed_point": {"method": "fixed_point"},
}
"""What ``PostTrainingQuantization`` wrote, in a checkpoint for each."""


def trainer(callbacks: list[pl.Callback], max_epochs: int = 4) -> pl.Trainer:
    """A quiet Trainer on one CPU."""
    return pl.Trainer(
        precision="64-true" if max_epochs == LONGER else "32-true",
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(
    callbacks: list[pl.Callback], ckpt_path: str | None = None, max_epochs: int = 4
) -> GoldenNet:
    """Train from the weights of ``dense.ckpt``, or go on with a checkpoint."""
    pl.seed_everything(0, verbose=False)
    module = load_compressed("dense.ckpt", GoldenNet) if Path("dense.ckpt").is_file() else None
    module = module or GoldenNet()
    trainer(callbacks, max_epochs).fit(module, ckpt_path=ckpt_path, weights_only=True)
    return module


@torch.no_grad()
def outputs(module: nn.Module) -> list[list[float]]:
    """What a module says of four examples."""
    images = examples(4, seed=2).tensors[0].to(next(module.parameters()).dtype)
    answer: list[list[float]] = module.eval()(images).tolist()
    return answer


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that the module of the user has, without what was attached to it."""
    state = module.state_dict()
    return {name: state[name] for name in GoldenNet().state_dict()}


def digest(module: nn.Module) -> str:
    """Of its own weights, to the bit."""
    found = hashlib.sha256()
    for name, value in own_weights(module).items():
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def kept(module: nn.Module) -> dict[str, list[int]]:
    """Sizes of each weight, its zeros, and its different values where these are few."""
    weights = {name: value for name, value in own_weights(module).items() if value.dim() > 1}
    return {
        name: [*value.shape, int((value == 0).sum()), min(len(set(value.flatten().tolist())), 9)]
        for name, value in weights.items()
    }


def episodes(search: RatioSearch) -> list[list[Any]]:
    """What was tried; of the first three, which a file has, also when."""
    assert search.result is not None
    tried = search.result.episodes
    return [[e.source, list(e.choice), e.seconds if e.number < 3 else None] for e in tried]


def analysis() -> list[str]:
    """Arguments of ``lit-compress`` for an analysis in a folder named ``sensitivity``."""
    Path("config.yaml").write_text(json.dumps({"model": f"{__name__}.GoldenNet"}))
    settings = ["--config=config.yaml", "--input-shape=1,6,6", "--steps=2", "--tolerance=0.2"]
    return ["analyze", "dense.ckpt", *settings]
