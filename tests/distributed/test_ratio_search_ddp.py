"""A search in two gloo processes; this file is also the script that they run."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, DistributedSampler

from lit_compress import ChannelPruning, MagnitudeSparsity
from lit_compress.callbacks.search import candidates as _search_candidates
from lit_compress.callbacks.search import report as search_report
from lit_compress.search.search_result import SearchResult
from lit_compress.search.settings import CandidateSettings
from tests.callbacks.search_fits import Small, episodes, fit, images, loader, search
from tests.distributed.launch import report, run_in_two_processes

CHECKS = [
    "one result",
    "one network",
    "work is shared",
    "one failure of all",
    "sparsity",
    "again",
    "latency",
    "interrupted",
]
PLAIN = CandidateSettings(round_to=2, num_calibration_batches=0)


class Counting(Small):
    """Counts the images that it validates."""

    seen = 0

    def validation_step(self, batch, batch_idx):
        Counting.seen += len(batch[0])
        super().validation_step(batch, batch_idx)


class FailsInOne(Small):
    """Raises in one of the processes, once before and once after it logged."""

    calls = 0

    def validation_step(self, batch, batch_idx):
        FailsInOne.calls += 1
        if FailsInOne.calls == 3 + int(os.environ["RANK"]):
            raise RuntimeError("in one process")
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        if FailsInOne.calls == 6 + int(os.environ["RANK"]):
            raise RuntimeError("at the end")


class InterruptedInOne(Small):
    """Ctrl-C comes to one of the processes only, in the middle of an evaluation."""

    calls = 0

    def validation_step(self, batch, batch_idx):
        InterruptedInOne.calls += 1
        if InterruptedInOne.calls == 8 and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGINT)
        super().validation_step(batch, batch_idx)


def one_ms_a_channel(kept):
    """In the place of a table of latencies."""
    return kept.sum(1).double()


def in_place_of_timing(groups, network, run, cache):
    assert os.environ["RANK"] == "0", "another process measures"
    return one_ms_a_channel


def in_two(*callbacks, **settings):
    every_other = DistributedSampler(images(), 2, int(os.environ["RANK"]), shuffle=False)
    data = DataLoader(images(), 8, sampler=every_other)
    settings |= {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    return fit(*callbacks, data=data, **settings)


def alike(run, value):
    """Whether both processes have it."""
    found = [None, None]
    torch.distributed.all_gather_object(found, value)
    return found[0] == found[1]


def of(result):
    """What has to be the same everywhere."""
    return [{**e, "failure": bool(e["failure"])} for e in episodes(result)], result.best


def main(folder: Path) -> None:
    os.chdir(folder)
    search_report.plot_search = lambda result, path: path
    found, pruning = search(), ChannelPruning(plan="searched", reconstruct=True)
    module, run = in_two(found, pruning)
    weights = [p.tolist() for p in module.parameters()]
    checks = [alike(run, of(found.result)), alike(run, weights) and not found.result.num_failed]

    shared = search(candidates=PLAIN, folder=folder / "two")
    in_two(shared, module=Counting, max_epochs=0)
    counts = [None, None]
    torch.distributed.all_gather_object(counts, Counting.seen)
    checks.append(counts[0] == counts[1] and counts[0] % 32 == 0)

    fails = search(num_episodes=12, searcher="random", candidates=replace(PLAIN, round_to=1))
    _, run = in_two(fails, module=FailsInOne, max_epochs=0)
    failed = list({e.choice: bool(e.failure) for e in fails.result.episodes}.values())
    checks.append(
        alike(run, of(fails.result)) and failed[:6] == [True, True, False, True, True, False]
    )

    sparse = search(None, space="sparsity", final_sparsity=0.8)
    masks = MagnitudeSparsity("searched")
    module, run = in_two(sparse, masks)
    zeros = sum(int((p == 0).sum()) for p in module.parameters() if p.dim() > 1)
    checks.append(alike(run, of(sparse.result)) and zeros == round(0.8 * 2092))

    again = search(candidates=PLAIN, folder=folder / "two")
    in_two(again, max_epochs=0, module=Counting)
    checks.append(of(again.result) == of(shared.result) and alike(run, of(again.result)))

    _search_candidates.LatencyTable.measure = in_place_of_timing
    in_ms = search(None, target_latency_ms=15.0, candidates=PLAIN)
    _, run = in_two(in_ms, max_epochs=0)
    setting = in_ms.result.setting["winner measured"]
    checks.append(
        alike(run, (of(in_ms.result), setting)) and sum(in_ms.result.values.values()) <= 15
    )

    stopped = search(
        num_episodes=100,
        searcher="random",
        candidates=replace(PLAIN, round_to=1),
        folder=folder / "stopped",
    )
    before = signal.getsignal(signal.SIGINT)
    _, run = in_two(stopped, module=InterruptedInOne, max_epochs=0)
    handler_is_back = signal.getsignal(signal.SIGINT) is before
    some = 2 < len(stopped.result.episodes) < 50
    checks.append(alike(run, of(stopped.result)) and some and handler_is_back)
    report(folder, dict(zip(CHECKS, checks, strict=True)))


def test_both_processes_find_one_result_and_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(search_report, "plot_search", lambda result, path: path)
    for text in run_in_two_processes(__file__, tmp_path):
        assert text == str(dict.fromkeys(CHECKS, True))
    one = search(candidates=PLAIN)
    fit(one, data=loader(batch_size=16, shuffle=False), max_epochs=0)
    two = SearchResult.load(tmp_path / "two" / "search.json")
    assert [e.choice for e in two.episodes] == [e.choice for e in one.result.episodes]
    for ours, theirs in zip(two.episodes, one.result.episodes, strict=True):
        assert abs(ours.score - theirs.score) < 1e-6
    assert two.plan == one.result.plan


if __name__ == "__main__":
    main(Path(sys.argv[1]))
