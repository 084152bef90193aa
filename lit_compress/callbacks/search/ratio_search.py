"""RatioSearch, the callback that finds how much of each layer to keep, before training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_compress.callbacks.base import CompressionCallback
from lit_compress.callbacks.distillation.teacher import copy_network, digest
from lit_compress.callbacks.lightning.loader_states import fresh_loaders
from lit_compress.callbacks.lightning.network_calls import find_uncompiled_network
from lit_compress.callbacks.lightning.processes import agreed, agreed_interrupts, in_first_process
from lit_compress.callbacks.lightning.requirements import check_strategy
from lit_compress.callbacks.lightning.resident_validation import ResidentValidation, ValidationBatch
from lit_compress.callbacks.lightning.training_sample import TrainingSample
from lit_compress.callbacks.search.candidates import (
    CandidateSpace,
    candidate_space,
    latency_file,
    measured_latency_ms,
)
from lit_compress.callbacks.search.report import SearchProgress, report_search
from lit_compress.callbacks.search.scoring import ResidentScore, chosen_metric, scoring_batches
from lit_compress.callbacks.search.searched import hand_over
from lit_compress.callbacks.stage_order import check_not_quantized
from lit_compress.compress.channels.goal import check_count
from lit_compress.files import write_text
from lit_compress.search.ddpg import DDPGSettings
from lit_compress.search.evaluation import Evaluator, Mode
from lit_compress.search.problem import RatioProblem
from lit_compress.search.rewards import Reward, reward_function
from lit_compress.search.run import SearchTask, search_ratios
from lit_compress.search.search_result import SearchResult, Space
from lit_compress.search.searchers import (
    DDPGSearcher,
    Proposal,
    RandomSearcher,
    RulesSearcher,
    Searcher,
    rules_of_thumb,
    sensitivity_proposals,
)
from lit_compress.search.settings import CandidateSettings, ScoringSettings, SearchTarget

__all__ = ["RatioSearch", "SearcherKind"]

SearcherKind: TypeAlias = Literal["ddpg", "random", "rules", "sensitivity"]


class RatioSearch(CompressionCallback):
    """Finds how much of each layer to keep under a budget, when ``Trainer.fit`` begins.

    A tuner in the manner of Lightning's ``LearningRateFinder``: it works in ``on_fit_start`` on
    copies, and leaves module, random state, loggers, progress and data loaders as they were. With
    ``max_epochs=0`` only the search is run. It starts from trained weights: candidates are
    evaluated as they are cut, with weights by least squares and no training (He et al. 2018,
    "AMC"). What it finds goes to the callback behind it that says ``"searched"``, is in
    :attr:`result`, and lies in the folder as a file for later runs.

    The score is the module's own validation metric, on examples split from the training data.
    Every episode meets the budget by construction. The search is saved after each episode and goes
    on exactly where it was killed; Ctrl-C ends it with the best so far, in all processes.

    Args:
        space: ``"channels"`` of each group of coupled layers, ``"sparsity"`` of each layer, or
            ``"bits"`` of each layer's weights.
        target_macs_ratio: MACs kept ÷ dense, in (0, 1); for channels.
        target_params_ratio: Parameters kept ÷ dense, in (0, 1); for channels.
        target_size_bytes: Bytes of the weights; for channels and bits.
        target_latency_ms: Milliseconds of one example, by a table of layers that is measured on
            this machine and kept in the folder; for channels.
        final_sparsity: Zeros ÷ weights of all layers together, in (0, 1); for sparsity.
        mean_weight_bits: Bits of a weight on average, in (2, 8); for bits.
        reward: ``"score"`` under a target; ``"error_log_macs"`` or ``"error_log_params"`` without
            one; or a function of the metric and the costs.
        tolerance: Loss of metric that is accepted: the cheapest candidate within it wins.
        metric: Name of the metric; by default top-1 or accuracy.
        mode: Whether more of it is better; by default told by its name.
        num_episodes: Candidates that are tried, at least 1.
        searcher: ``"ddpg"``, which begins with the heuristics; ``"random"``; ``"rules"``
            (uniform, shallow, deep, and for sparsity one threshold of magnitude, alone); or
            ``"sensitivity"`` (ratios derived from what each layer alone does to the score).
        agent: What the DDPG agent learns with.
        candidates: How candidates are made.
        scoring: What they are scored on.
        folder: For files; by default ``ratio_search`` in ``trainer.default_root_dir``, and there
            one for each different search.
        seed: Of the search, whose random numbers are its own.

    Raises:
        ValueError: At construction, if an argument is out of range or two of them disagree. When
            the fit begins, if nothing can be searched, the target cannot be reached (the lowest
            that can is given), or the metric is not logged (those that are, are named).
        MisconfigurationException: When the fit begins, if there is no ``validation_step`` or no
            data to score on, the network is quantized already, or the strategy shards parameters
            or spawns processes.

    Example::

        search = RatioSearch(target_macs_ratio=0.5)
        pruning = ChannelPruning(plan="searched")
        Trainer(max_epochs=6, callbacks=[search, pruning]).fit(model, datamodule)
    """

    changes_weights = False

    def __init__(
        self,
        space: Space = "channels",
        target_macs_ratio: float | None = None,
        target_params_ratio: float | None = None,
        target_size_bytes: int | None = None,
        target_latency_ms: float | None = None,
        final_sparsity: float | None = None,
        mean_weight_bits: float | None = None,
        reward: Reward = "score",
        tolerance: float | None = None,
        metric: str | None = None,
        mode: Mode | None = None,
        num_episodes: int = 300,
        searcher: SearcherKind = "ddpg",
        agent: DDPGSettings = DDPGSettings(),  # noqa: B008 (frozen)
        candidates: CandidateSettings = CandidateSettings(),  # noqa: B008 (frozen)
        scoring: ScoringSettings = ScoringSettings(),  # noqa: B008 (frozen)
        folder: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("space", space, Space),
            ("searcher", searcher, SearcherKind),
        ):
            if value not in get_args(known):
                choices = ", ".join(map(repr, get_args(known)))
                raise ValueError(f"{name} is {value!r}, expected one of {choices}.")
        self.target = SearchTarget(
            target_macs_ratio, target_params_ratio, target_size_bytes, target_latency_ms,
            final_sparsity, mean_weight_bits,
        )  # fmt: skip
        self.target.check(space, reward_needs_budget=reward == "score")
        reward_function(reward, mode or "max")
        if space == "bits" and isinstance(reward, str) and reward != "score":
            raise ValueError(
                f"reward is {reward!r}, and bits of weights change neither MACs nor "
                "parameters; give reward='score' with mean_weight_bits or target_size_bytes, or a "
                "function."
            )
        check_count("num_episodes", num_episodes)
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"tolerance is {tolerance}, expected a loss of metric of at least 0.")
        self.space = space
        self.reward = reward
        self.tolerance = tolerance
        self.metric = metric
        self.mode = mode
        self.num_episodes = num_episodes
        self.searcher = searcher
        self.agent = agent
        self.candidates = candidates
        self.scoring = scoring
        self.folder = None if folder is None else Path(folder)
        self.seed = seed
        self.result: SearchResult | None = None

    # --- The run ----------------------------------------------------------------------------------

    def check_run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse strategies under which processes could not cut as it says."""
        check_strategy(trainer, type(self).__name__, changes_structure=True)

    def start_or_resume(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: dict[str, Any] | None
    ) -> None:
        """Search, or take what the run that is resumed had found; hand it over."""
        if state is not None:
            self.result = SearchResult.from_json(state["result"])
            then = "what it found stays. To search again, start a new run from its weights."
            self.is_same_run(state, then, warn=True)
        else:
            # As it would be in a moment; random numbers of the user's own loader count as ever.
            fresh_loaders(trainer)
            with _undisturbed(pl_module):
                self.result = self._search(trainer, pl_module)
        takers = hand_over(trainer, self.result, self.candidates)
        if takers:
            rank_zero_info(f"{type(self).__name__}: {' and '.join(takers)} take what was found.")

    # --- Checkpoints ------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Tells searches over different spaces in one Trainer apart."""
        return self._generate_state_key(space=self.space)

    @property
    def declared(self) -> dict[str, Any]:
        """What is searched for."""
        return {
            "space": self.space,
            "target": self.target,
            "reward": self.reward,
            "tolerance": self.tolerance,
            "metric": self.metric,
            "candidates": self.candidates,
        }

    def fit_state(self) -> dict[str, Any] | None:
        """The result, so that a run that is resumed does not search again."""
        return None if self.result is None else {"result": self.result.to_json()}

    # --- The search -------------------------------------------------------------------------------

    def _search(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> SearchResult:
        check_not_quantized(pl_module, self)  # type: ignore[arg-type]
        network = find_uncompiled_network(pl_module)
        # Where training data are few, at least as many are left to score on.
        half = int(min(trainer.num_training_batches, 2**31)) // 2
        num_sample = max(min(self.candidates.num_calibration_batches, half), 1)
        batches = scoring_batches(trainer, self.scoring, num_sample)
        validation = ResidentValidation(pl_module, network, batches, trainer)
        copied = copy_network(network)  # a score may change the memory format
        metric, mode = chosen_metric(self.metric, self.mode, tuple(validation(copied)))
        score = ResidentScore(trainer, validation, metric, len(batches))
        dense = score(copied)

        sample = TrainingSample(trainer, pl_module, network, num_sample)
        setting = agreed(trainer, self._setting(network, batches))
        folder = self._folder(trainer, setting)
        space = candidate_space(
            trainer, network, self.space, self.target, self.candidates, sample,
            latency_file(folder if self.folder is not None else folder.parent),
        )  # fmt: skip
        problem = space.problem(self.target.budget(_full_costs(space)))
        task = SearchTask(
            self.space, problem, metric, mode, dense.value, self.reward, self.tolerance, setting
        )
        rules = rules_of_thumb(problem, worth=space.worth)
        score.in_bf16 = self._in_bf16(trainer, score, space, rules, folder)
        exact = ResidentScore(trainer, validation, metric, len(batches))
        evaluate = Evaluator(
            space.network, score, mode, race=self.scoring.race and self.reward == "score"
        )
        with (
            closing(SearchProgress(trainer, self.num_episodes)) as progress,
            agreed_interrupts(trainer) as raise_if_interrupted,
        ):

            def after_episode(so_far: SearchResult) -> None:
                progress(so_far)
                raise_if_interrupted()

            result = search_ratios(
                task,
                self._make_searcher(problem, rules, evaluate, mode),
                evaluate,
                1 if trainer.fast_dev_run else self.num_episodes,  # type: ignore[attr-defined]
                state_file=folder / "state.pt",
                saves=trainer.is_global_zero,
                on_episode=after_episode,
                agree=partial(agreed, trainer),
                settle=lambda choice: exact(space.network(choice)).value,
            )
        winner = result.best_episode  # raises where none finished, with the last failure
        if self.target.target_latency_ms is not None:
            chosen = space.network(winner.choice)
            found = in_first_process(trainer, lambda: measured_latency_ms(chosen, sample))
            result = replace(
                result, setting={**result.setting, "winner measured": f"{found:.4g} ms"}
            )
        report_search(trainer, result, folder)
        return result

    def _make_searcher(
        self, problem: RatioProblem, rules: list[Proposal], evaluate: Evaluator, mode: Mode
    ) -> Searcher:
        if self.searcher == "random":
            return RandomSearcher(problem, self.seed)
        if self.searcher == "rules":
            return RulesSearcher(rules)
        if self.searcher == "sensitivity":
            return RulesSearcher(sensitivity_proposals(problem, evaluate.probe, mode))
        starts = min(self.agent.learning_starts, self.num_episodes // 3)
        settings = replace(self.agent, learning_starts=starts)
        return DDPGSearcher(problem, settings, self.seed, rules[: max(starts, 1)])

    def _in_bf16(
        self,
        trainer: pl.Trainer,
        score: ResidentScore,
        space: CandidateSpace,
        rules: list[Proposal],
        folder: Path,
    ) -> bool:
        """Decided once for a search: scores of one that goes on must compare with those it has."""
        if self.scoring.precision != "auto":
            return self.scoring.precision == "bf16"
        file = folder / "precision.txt"
        decided = agreed(trainer, file.read_text() if file.is_file() else "")
        if decided not in ("bf16", "trainer"):
            few = [rules[0], rules[len(rules) // 2], rules[-1]]
            agrees = score.agrees_in_bf16([space.network(proposal.choice) for proposal in few])
            decided = "bf16" if agrees else "trainer"
            if trainer.is_global_zero:
                write_text(file, decided)
        return bool(decided == "bf16")

    def _setting(self, network: nn.Module, batches: Sequence[ValidationBatch]) -> dict[str, str]:
        """What the result depends on beside the problem, in words."""
        leaves = [leaf for batch in batches for leaf in tree_leaves(batch.content)]
        data = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        return {
            "network": type(network).__name__,
            "weights": digest(network.state_dict())[:16],
            "target": str(self.target),
            "tolerance": str(self.tolerance),
            "searcher": f"{self.searcher}, seed {self.seed}",
            "agent": str(self.agent),
            "candidates": str(self.candidates),
            "scoring": f"{self.scoring}, {len(batches)} batches",
            "examples": digest(data)[:16],
        }

    def _folder(self, trainer: pl.Trainer, setting: dict[str, str]) -> Path:
        if self.folder is not None:
            return self.folder
        words = f"{self.space} {self.metric} {self.mode} {self.reward} {setting}"
        name = hashlib.sha256(words.encode()).hexdigest()[:8]
        return Path(trainer.default_root_dir) / "ratio_search" / f"{self.space}-{name}"


@contextmanager
def _undisturbed(pl_module: pl.LightningModule) -> Iterator[None]:
    """Random state and modes of the run as they were, whatever happens."""
    modes = [(module, module.training) for module in pl_module.modules()]
    try:
        with isolate_rng():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _full_costs(space: CandidateSpace) -> dict[str, float]:
    return space.problem(None).full_costs
