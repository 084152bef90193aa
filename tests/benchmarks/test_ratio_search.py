"""The study judges what it should, goes on where it stopped, and trains what was found."""

import json
import math
from dataclasses import asdict, replace

import pytest
import ratio_search
import ratio_search_bars as judged
import ratio_search_runs as runs
import ratio_search_training as training
import sparsity_distillation
import torch
from ratio_search_runs import Search

from lit_compress import MagnitudeSparsity
from lit_compress.search.ddpg import DDPGAgent
from lit_compress.search.problem import Budget, Decision, RatioProblem
from lit_compress.search.search_result import Episode, SearchResult
from lit_compress.search.searchers import DDPGSearcher, rules_of_thumb

RULES = {"uniform": 0.86, "shallow": 0.87, "deep": 0.901}


def made_up(search, score=0.906, ratio=0.499, cpu=0.4, rules=RULES):
    of_rules = {
        rule: {"score": value, "episode": 0, "cost_ratio": 0.499, "found": [8.0, 32.0]}
        for rule, value in rules.items()
    }
    return asdict(search) | {
        "dense_score": 0.91,
        "best_score": score,
        "best_episode": 250,
        "best_source": "ddpg",
        "cost_ratio": min(ratio, search.target),
        "found": {"conv1": 8.0, "conv2": 32.0},
        "full": {"conv1": 16.0, "conv2": 64.0},
        "best_by_source": of_rules,
        "num_given_up": 200,
        "num_failed": 0,
        "num_episodes": 300,
        "cpu_seconds_per_episode": cpu,
        "rewards": [0.9, None],
    }


def results(tuned=(0.85, 0.84), sparse=(0.87, 0.86, 0.85, 0.84), seeds=(1, 2, 3), **changes):
    searches = [made_up(s, **changes) for s in runs.channel_searches() if s.seed in seeds]
    sparsities = [made_up(s, 0.8, 0.2) for s in runs.sparsity_searches()]
    tops = dict(zip(training.TUNED_METHODS, tuned, strict=True))
    shares = dict(zip(training.SPARSE_METHODS, sparse, strict=False))
    return {
        "settings": asdict(ratio_search.Settings()),
        "searches": searches + sparsities,
        "tuned": [
            asdict(p) | {"macs_ratio": 0.5, "top1_after_cut": 0.5, "test_top1": tops[p.method]}
            for p in training.tunings()
        ],
        "sparse": [
            asdict(p) | {"test_top1": shares[p.method] + p.seed / 1000}
            for p in training.sparse_runs()
            if p.method in shares
        ],
    }


def missed(**changes):
    return [str(bar) for bar in judged.bars(results(**changes)) if not bar.holds]


# --- The bars -------------------------------------------------------------------------------------


def test_all_bars_hold():
    assert missed() == []
    assert ratio_search.check(results(), say=lambda line: None) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": 0.904}, "mobilenet_v1 at 0.5, seed 2: best reward, the original's: 0.9040"),
        ({"ratio": 0.51, "rules": {**RULES, "deep": 0.907}}, "best deep: 0.9060 (at least 0.9070)"),
        ({"rules": {**RULES, "shallow": 0.907}}, "plain20 at 0.5, seed 3: best reward, best shal"),
        ({"rules": {**RULES, "uniform": 0.87}}, "at 0.35, seed 1: best reward, uniform + 0.04"),
        ({"seeds": (1, 2)}, "not measured mobilenet_v1 at 0.5, seed 3: best reward"),
        ({"seeds": (2, 3)}, "not measured plain20 at 0.5, seed 2: best reward, best deep"),
        ({"tuned": (0.83, 0.84)}, "plain20 at 0.5, tuned: mean test top-1 of searched, uniform"),
        ({"sparse": (0.85, 0.86, 0.84)}, "searched + distillation, uniform + distillation: 85.20"),
        ({"sparse": (0.87, 0.86, 0.87)}, "uniform + distillation, uniform: 86.20 (at least 87.20)"),
        ({"sparse": (0.5,)}, "not measured resnet20 at 90 % zeros: mean test top-1 of uniform"),
    ],
)
def test_a_missed_bar_is_named(changes, message):
    assert any(message in line for line in missed(**changes)), missed(**changes)


def test_more_than_the_budget_is_a_miss():
    spent = results()
    spent["searches"][3]["cost_ratio"] = 0.5001
    (miss,) = [bar for bar in judged.bars(spent) if not bar.holds]
    assert "MACs kept / dense: 0.5001 (at most 0.5000)" in str(miss)


def test_a_study_that_has_not_begun_holds_nothing():
    found = judged.bars(ratio_search.empty(ratio_search.Settings()))
    assert {bar.verdict for bar in found} == {"not measured"}
    assert len(found) == len(judged.bars(results()))


# --- The file -------------------------------------------------------------------------------------


def test_results_are_saved_as_they_come_and_not_run_again(tmp_path):
    file, settings = tmp_path / "results.json", ratio_search.Settings()
    first, second, *_ = ratio_search.missing("search", settings, file)
    ratio_search.add(second, made_up(second, 0.7), settings, file)
    ratio_search.add(first, made_up(first, 0.8), settings, file)
    left = ratio_search.missing("search", settings, file)
    assert left == [p for p in ratio_search.points("search") if p not in (first, second)]
    ratio_search.add(second, made_up(second, 0.9), settings, file)
    stored = ratio_search.read_results(file)["searches"]
    assert sorted(one["best_score"] for one in stored) == [0.8, 0.9]
    assert all(one["machine"].keys() >= {"processor", "vnni"} for one in stored)
    assert '"rewards": [ 0.9, null ]' in file.read_text()


def test_results_of_other_settings_are_not_mixed(tmp_path):
    file = tmp_path / "results.json"
    other = ratio_search.Settings(search=runs.Settings(num_episodes=5))
    file.write_text(json.dumps(ratio_search.empty(other)))
    with pytest.raises(SystemExit, match="made with other settings"):
        ratio_search.missing("search", ratio_search.Settings(), file)


def test_training_waits_for_its_search(tmp_path):
    file = tmp_path / "results.json"
    tuned = next(p for p in training.tunings() if p.method == "searched")
    with pytest.raises(LookupError, match=r"Search\(model='mobilenet_v1'.*is not in results"):
        ratio_search.search_wanted(tuned, file)
    file.write_text(json.dumps(results()))
    found = ratio_search.search_wanted(tuned, file)
    assert (found["model"], found["method"], found["seed"]) == (tuned.model, "ddpg", tuned.seed)
    sparse = training.Sparse("searched+distillation", 0.9, 3)
    assert ratio_search.search_wanted(sparse, file)["target"] == 0.9
    assert ratio_search.search_wanted(replace(tuned, method="uniform"), file) is None


def test_every_bar_has_its_runs():
    channels = {(s.model, s.target, s.seed) for s in runs.channel_searches() if s.method == "ddpg"}
    assert channels == {(*case, seed) for case in judged.CASES for seed in judged.SEEDS}
    assert {(s.model, s.target) for s in runs.channel_searches() if s.method == "rules"} == {
        *judged.CASES
    }
    everything = [point for part in ratio_search.PARTS for point in ratio_search.points(part)]
    assert len(everything) == len(set(everything)) == 18 + 12 + 12 + 27


# --- The runs -------------------------------------------------------------------------------------


def search_result(best=1, scores=(0.8, 0.9, 0.7), costs=(100.0, 90.0, 80.0)):
    decisions = (Decision("conv1", (8.0, 16.0), 16.0), Decision("conv2", (8.0, 32.0), 32.0))
    episodes = tuple(
        Episode(
            n,
            ("uniform", "ddpg", "ddpg")[n],
            (0, 1),
            score,
            score,
            {"macs": cost},
            n < 2,
            None,
            1.0,
        )
        for n, (score, cost) in enumerate(zip(scores, costs, strict=True))
    )
    dense = {"macs": 200.0}
    limit = ("macs", 100.0)
    return SearchResult(
        "channels", decisions, "acc", "max", 0.95, dense, limit, "score", episodes, best, {}
    )


def test_what_is_kept_of_a_search():
    kept = runs.compact(search_result(), cpu_seconds=6.0)
    assert json.loads(json.dumps(kept, allow_nan=False)) == kept
    assert kept["best_score"] == 0.9
    assert kept["cost_ratio"] == pytest.approx(0.45)
    assert kept["cpu_seconds_per_episode"] == 2.0
    assert kept["found"] == {"conv1": 8.0, "conv2": 32.0}
    assert kept["best_by_source"]["uniform"]["score"] == 0.8
    assert (kept["num_given_up"], kept["num_by_source"]) == (1, {"uniform": 1, "ddpg": 2})
    assert runs.compact(search_result(scores=(0.8, 0.9, math.nan)), 1.0)["rewards"][2] is None


def test_broken_invariants_are_named():
    module = torch.nn.Linear(2, 2)
    before = runs.weights_of(module)
    assert runs.broken_invariants(search_result(), before, module) == []
    over = search_result(costs=(100.0, 101.0, 80.0))
    assert "episode 1 costs 101 macs of 100" in runs.broken_invariants(over, before, module)
    worse = search_result(best=0)
    (line,) = runs.broken_invariants(worse, before, module)
    assert line == "the best reward, 0.8000, is below ddpg's 0.9000"
    with torch.no_grad():
        module.bias[0] += 1e-6
    assert runs.broken_invariants(search_result(), before, module) == [
        "bias was changed by the search"
    ]


def test_the_arms_of_a_search(tmp_path):
    settings = runs.Settings(num_episodes=30, num_sparsity_episodes=20)
    by_method = {s.method: s for s in runs.channel_searches()}
    ours = runs.callback(by_method["ddpg"], settings, str(tmp_path))
    assert (ours.num_episodes, ours.searcher, ours.scoring.race) == (30, "ddpg", True)
    assert (ours.scoring.split, ours.scoring.num_examples) == ("val", 5000)
    rules = runs.callback(by_method["rules"], settings, str(tmp_path))
    assert (rules.num_episodes, rules.searcher, rules.scoring.race) == (43, "rules", False)
    assert [
        runs.callback(Search(model, "channels", 0.5, "ddpg", 1), settings, "").candidates.round_to
        for model in ("mobilenet_v1", "plain20")
    ] == [8, 1]
    sparse = runs.callback(runs.sparsity_searches()[1], settings, str(tmp_path))
    assert (sparse.space, sparse.num_episodes) == ("sparsity", 20)
    assert sparse.target.final_sparsity == 0.9


def test_the_agent_alone_has_nothing_to_begin_from(tmp_path):
    decisions = tuple(Decision(n, (0.25, 0.5, 0.75, 1.0), 1.0, (0.5,)) for n in "abc")
    problem = RatioProblem(decisions, {"sum": lambda v: v.sum(1)}, Budget("sum", 2.0))
    point = Search("mobilenet_v1", "channels", 0.5, "agent alone", 1)
    alone = runs.callback(point, runs.Settings(num_episodes=30), str(tmp_path))
    searcher = alone._make_searcher(problem, [], None, "max")
    assert isinstance(searcher, DDPGSearcher)
    sources = []
    for number in range(12):
        proposal = searcher.ask()
        searcher.tell(proposal, float(number))
        sources.append(proposal.source)
    assert sources == ["random"] * 10 + ["ddpg"] * 2


def test_tries_alone_begin_as_the_search_does_and_never_ask_the_agent(tmp_path, monkeypatch):
    decisions = tuple(Decision(n, (0.25, 0.5, 0.75, 1.0), 1.0, (0.5,)) for n in "abc")
    problem = RatioProblem(decisions, {"sum": lambda v: v.sum(1)}, Budget("sum", 2.0))
    rules = rules_of_thumb(problem, num_each=2)

    def asked(method):
        point = Search("mobilenet_v1", "channels", 0.5, method, 1)
        search = runs.callback(point, runs.Settings(num_episodes=30), str(tmp_path))
        searcher = search._make_searcher(problem, rules, None, "max")
        proposals = []
        for number in range(30):
            proposals.append(searcher.ask())
            searcher.tell(proposals[-1], -abs(number - 5.0))
        return proposals, searcher.state_dict()

    whole, _ = asked("ddpg")
    monkeypatch.setattr(DDPGAgent, "explore", None)
    monkeypatch.setattr(DDPGAgent, "_update", None)
    alone, state = asked("tries alone")
    assert alone[:10] == whole[:10]
    assert [p.source for p in alone[10:]] == ["ddpg"] * 20
    assert state["best"][0] == 0.0
    assert state["agent"]["num_episodes"] == 30


def test_arms_of_tuning_differ_in_the_plan_only():
    settings = training.Settings()
    search = made_up(runs.channel_searches()[3])
    searched, uniform = training.tunings()[:2]
    theirs = training.pruning_callback(searched, settings, search).declared
    ours = training.pruning_callback(uniform, settings, None).declared
    assert {name for name, value in theirs.items() if value != ours[name]} == {"goal"}
    assert theirs["goal"].plan.kept == {"conv1": 8, "conv2": 32}
    assert theirs["goal"].target_macs_ratio is None
    assert (ours["goal"].plan, ours["goal"].target_macs_ratio) == (None, 0.5)


def test_searched_densities_are_trained_as_the_other_study_trains(monkeypatch):
    seen = []

    def train(point, settings, sparsities):
        seen.append(sparsity_distillation.callbacks(point, settings, sparsities))
        return asdict(point) | {"test_top1": 0.5}

    monkeypatch.setattr(sparsity_distillation, "train", train)
    search = {"found": {"conv1": 0.5, "layer1.0.conv1": 0.1}}
    trained = training.train_sparse(training.Sparse("searched+distillation", 0.9, 2), search)
    assert (trained["method"], trained["seed"]) == ("searched+distillation", 2)
    distillation, sparsity = seen[0]
    assert isinstance(sparsity, MagnitudeSparsity)
    assert sparsity.target.final == pytest.approx({"model.conv1": 0.5, "model.layer1.0.conv1": 0.9})
    training.train_sparse(training.Sparse("uniform", 0.9, 2), None)
    (uniform,) = seen[1]
    assert (uniform.target.final, uniform.target.allocation) == (0.9, "uniform")
    assert uniform.schedule == sparsity.schedule
    training.train_sparse(training.Sparse("global+distillation", 0.9, 2), None)
    _, by_threshold = seen[2]
    assert (by_threshold.target.final, by_threshold.target.allocation) == (0.9, "global")
    assert by_threshold.schedule == sparsity.schedule
    assert type(distillation).__name__ == "Distillation"
