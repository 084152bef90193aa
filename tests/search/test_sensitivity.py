"""Curves from slim copies, and the plans and files that come of them."""

import copy
import json
import math
from dataclasses import replace
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.compress.channels.groups import ChannelGroup, ChannelGroups
from lit_compress.compress.channels.importance import channel_importance
from lit_compress.search.sensitivity import planned_points, point_overhead, sensitivity_curves
from lit_compress.search.sensitivity_result import SensitivityPoint, SensitivityResult
from tests.compress.channels.hand_made_groups import conv_net, cut

RATIOS = (0.25, 0.5, 0.9)


@pytest.fixture
def net():
    """A model, its groups ("0" of 6 channels, "3" of 4) and scores."""
    torch.manual_seed(0)
    model, groups = conv_net()
    return model.eval(), groups, channel_importance(model, groups, "l2")


def params(model):
    return {"params": float(sum(p.numel() for p in model.parameters()))}


def curves(net, ratios=RATIOS, **kwargs):
    model, groups, scores = net
    kwargs.setdefault("evaluate", params)
    return sensitivity_curves(model, groups, scores, ratios=ratios, **kwargs)


def made(values, channels=64, baseline=0.9, tuned=None, tuned_baseline=None, blocks=1):
    """One group's result from a mapping of kept channels to accuracy."""
    points = tuple(
        SensitivityPoint("g", kept, {"acc": v}, None if tuned is None else {"acc": tuned[kept]})
        for kept, v in values.items()
    )
    after = None if tuned is None else {"acc": tuned_baseline}
    base = SensitivityPoint("", channels, {"acc": baseline}, after)
    group = ChannelGroup("g", channels, blocks)
    return SensitivityResult((group,), (0.5,), base, points, {})


# --- The curves -----------------------------------------------------------------------------------


def test_each_group_is_cut_alone_and_for_real(net):
    seen = []

    def evaluate(model):
        seen.append((model[0].out_channels, model[3].in_channels, model[3].out_channels))
        return params(model)

    result = curves(net, evaluate=evaluate)
    assert seen == [(6, 6, 4), (5, 5, 4), (3, 3, 4), (1, 1, 4), (6, 6, 3), (6, 6, 2), (6, 6, 1)]
    assert [(p.group, p.kept) for p in result.points] == planned_points(net[1], RATIOS)
    sizes = [p.metrics["params"] for p in result.points]
    assert result.baseline.metrics == params(net[0])
    assert all(size < result.baseline.metrics["params"] for size in sizes)
    assert list(result.curve("3", "params")) == [0.0, 0.25, 0.5, 0.75]


def test_the_channels_of_least_score_go_and_the_outputs_say_so(net):
    model, groups, scores = net
    images = torch.randn(2, 1, 6, 6)

    def evaluate(slim):
        with torch.no_grad():
            return {"out": float(slim(images).sum())}

    result = curves(net, evaluate=evaluate)
    keep = torch.ones(10, dtype=torch.bool)
    keep[scores[:6].argsort()[:3]] = False
    with torch.no_grad():
        expected = float(cut(model, groups, keep)(images).sum())
    assert result.curve("0", "out")[0.5] == pytest.approx(expected, abs=1e-6)


def test_the_model_is_neither_run_nor_changed(net):
    model = net[0]
    before = copy.deepcopy(model.state_dict())
    ran = []
    model.register_forward_hook(lambda *_: ran.append(True))

    def spoil(slim):
        assert slim is not model
        with torch.no_grad():
            for parameter in slim.parameters():
                parameter.fill_(7.0)

    curves(net, tune=spoil)
    assert not ran
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model[0].out_channels == 6


def test_tuning_is_evaluated_before_and_after_on_the_same_copy(net):
    def evaluate(slim):
        return {"bias": float(slim[6].bias.detach().sum())}

    def tune(slim):
        with torch.no_grad():
            slim[6].bias.add_(1.0)

    result = curves(net, evaluate=evaluate, tune=tune)
    for point in (result.baseline, *result.points):
        assert point.tuned_metrics["bias"] == pytest.approx(point.metrics["bias"] + 3)
    assert result.is_tuned


def test_a_killed_run_goes_on_where_it_was(net):
    class Killed(Exception):
        pass

    saved, evaluated = [], []

    def on_point(result):
        saved.append(result)
        if len(saved) == 4:
            raise Killed

    def evaluate(slim):
        evaluated.append(slim)
        return params(slim)

    with pytest.raises(Killed):
        curves(net, evaluate=evaluate, on_point=on_point, setting={"weights": "a"})
    done = SensitivityResult.from_json(saved[-1].to_json())
    assert len(done.points) == 3
    again = curves(net, evaluate=evaluate, done=done, setting={"weights": "a"})
    assert len(evaluated) == 7  # nothing twice
    assert again == curves(net, setting={"weights": "a"})


def test_a_finer_grid_only_adds_points(net):
    evaluated = []

    def evaluate(slim):
        evaluated.append(slim)
        return params(slim)

    coarse = curves(net, (0.5,))
    fine = curves(net, RATIOS, evaluate=evaluate, done=coarse)
    assert len(evaluated) == 4
    assert fine == curves(net)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=4),
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=8),
)
def test_planned_points_are_cuts_that_groups_can_have(sizes, ratios):
    groups = ChannelGroups(
        tuple(ChannelGroup(f"g{i}", a * blocks, blocks) for i, (a, blocks) in enumerate(sizes)), ()
    )
    planned = planned_points(groups, ratios)
    assert len(set(planned)) == len(planned)
    for name, kept in planned:
        group = groups[name]
        assert group.num_blocks <= kept < group.num_channels
        assert kept % group.num_blocks == 0
        nearest = min(abs(group.num_channels * (1 - ratio) - kept) for ratio in ratios)
        assert nearest <= group.num_blocks / 2 + 1e-9 or kept == group.num_blocks


def test_overhead_is_less_where_evaluation_takes_long(net):
    model, groups, scores = net

    def slow(slim):
        torch.ones(1200, 1200) @ torch.ones(1200, 1200)
        return params(slim)

    of_nothing = point_overhead(model, groups, scores, lambda slim: {"x": 0.0}, repeats=3)
    assert median(point_overhead(model, groups, scores, slow, repeats=3)) < min(of_nothing)
    with pytest.raises(ValueError, match="repeats is 0; expected at least 1"):
        point_overhead(model, groups, scores, slow, repeats=0)


# --- The plan -------------------------------------------------------------------------------------


def test_the_plan_takes_what_the_tolerance_allows():
    result = made({48: 0.895, 32: 0.89, 16: 0.85})
    assert result.derive_plan(0.01, "acc").kept == {"g": 32}
    assert result.derive_plan(0.005, "acc").kept == {"g": 48}
    assert result.derive_plan(0.06, "acc").kept == {"g": 16}
    assert result.derive_plan(0.0, "acc").kept == {"g": 64}


def test_the_plan_stops_at_the_first_point_that_is_too_bad():
    assert made({48: 0.5, 32: 0.9}).derive_plan(0.01, "acc").kept == {"g": 64}
    assert made({48: 0.9, 32: math.nan, 16: 0.9}).derive_plan(0.01, "acc").kept == {"g": 48}


def test_less_may_be_better():
    result = made({48: 0.91, 32: 2.0})
    assert result.derive_plan(0.02, "acc", "min").kept == {"g": 48}
    assert made({48: 0.1}).derive_plan(0.0, "acc", "min").kept == {"g": 48}


def test_the_plan_is_rounded_towards_more_channels():
    assert made({33: 0.9}).derive_plan(0.01, "acc").kept == {"g": 40}
    assert made({33: 0.9}).derive_plan(0.01, "acc", round_to=1).kept == {"g": 33}
    assert made({5: 0.9}, channels=6).derive_plan(0.01, "acc").kept == {"g": 5}
    assert made({57: 0.9}, channels=60).derive_plan(0.01, "acc").kept == {"g": 60}
    assert made({30: 0.9}, channels=60, blocks=3).derive_plan(0.01, "acc").kept == {"g": 48}


def test_after_tuning_points_are_held_against_the_better_baseline():
    values = {48: 0.7, 32: 0.6}
    good = made(values, tuned={48: 0.915, 32: 0.9}, tuned_baseline=0.92)
    assert good.derive_plan(0.01, "acc").kept == {"g": 48}
    assert good.derive_plan(0.01, "acc", tuned=False).kept == {"g": 64}
    # A tuning that ruins every model alike is no reason to cut.
    ruined = made(values, tuned={48: 0.1, 32: 0.1}, tuned_baseline=0.1)
    assert ruined.derive_plan(0.01, "acc").kept == {"g": 64}
    with pytest.raises(ValueError, match="not a number after tuning.*learning rate"):
        made(values, tuned={48: 0.9, 32: 0.9}, tuned_baseline=math.nan).derive_plan(0.01, "acc")


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.integers(1, 63), st.floats(0, 1), min_size=1, max_size=8),
    st.floats(0, 1),
    st.sampled_from([1, 4, 8]),
)
def test_plans_fit_and_shrink_with_the_tolerance(values, tolerance, round_to):
    result = made(values)
    groups = ChannelGroups(result.groups, ())
    plan = result.derive_plan(tolerance, "acc", round_to=round_to)
    plan.check(groups)
    assert plan.kept["g"] % round_to == 0
    wider = result.derive_plan(tolerance + 0.1, "acc", round_to=round_to)
    assert wider.kept["g"] <= plan.kept["g"]
    for kept, value in values.items():
        if kept >= plan.kept["g"]:
            assert value >= 0.9 - tolerance - 1e-9


# --- Text, files, picture -------------------------------------------------------------------------


def test_the_table_shows_every_group_and_a_dash_where_nothing_is(net):
    full = curves(net)
    lines = full.table("params").splitlines()
    total = 6 * 9 + 2 * 6 + 4 * 6 * 9 + 3 * 36 + 3
    assert lines[0] == f"params, one group cut at a time; {total}.0000 with none"
    assert lines[1].split() == ["group", "channels", "-25%", "-50%", "-90%"]
    assert [line.split()[:2] for line in lines[3:]] == [["0", "6"], ["3", "4"]]
    assert lines[3].split()[2] == f"{full.points[0].metrics['params']:.4f}"
    partial = replace(full, points=full.points[:1])
    assert [line.split()[2:] for line in partial.table("params").splitlines()[3:]] == [
        [f"{full.points[0].metrics['params']:.4f}", "–", "–"],
        ["–", "–", "–"],
    ]
    assert str(full) == full.table("params")


def test_files_come_back_and_are_whole_or_not_there(net, tmp_path, monkeypatch):
    result = curves(net, tune=lambda slim: None, setting={"weights": "abc"})
    odd = replace(result.points[0], metrics={"params": math.inf})
    result = replace(result, points=(odd, *result.points[1:]))
    path = result.save(tmp_path / "deep" / "curves.json")
    assert SensitivityResult.load(path) == result
    before = path.read_text()

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        result.save(path)
    assert path.read_text() == before


def test_other_files_are_refused(net, tmp_path):
    text = curves(net).to_json()
    for content, said in {
        text[: len(text) // 2]: "is no JSON",
        '{"format": "other"}': "has format 'other'; expected 'lit-compress sensitivity 1'",
        json.dumps({**json.loads(text), "points": 3}): "SensitivityResult.points is 3",
        "[]": "has format None",
    }.items():
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match="cannot be read as a sensitivity analysis") as caught:
            SensitivityResult.load(tmp_path / "x.json")
        assert said in str(caught.value)


# --- Refusals -------------------------------------------------------------------------------------


def test_nothing_to_cut_is_refused():
    empty = ChannelGroups((), ())
    with pytest.raises(ValueError, match="no channels that can be cut"):
        sensitivity_curves(nn.Linear(2, 2), empty, torch.zeros(0), params, RATIOS)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, math.nan])
def test_ratios_out_of_range_are_refused(net, ratio):
    with pytest.raises(ValueError, match=f"hold {ratio}, expected numbers between 0 and 1"):
        curves(net, (0.5, ratio))
    with pytest.raises(ValueError, match="are empty"):
        curves(net, ())


def test_an_evaluation_without_metrics_is_refused(net):
    with pytest.raises(ValueError, match="the evaluation gave no metrics"):
        curves(net, evaluate=lambda slim: {})


def test_bad_questions_are_refused(net):
    result = curves(net)
    with pytest.raises(ValueError, match="'parms' is not logged; those that are: 'params'. Did"):
        result.derive_plan(0.1, "parms")
    with pytest.raises(ValueError, match="tolerance is -1; expected a finite number"):
        result.derive_plan(-1, "params")
    with pytest.raises(ValueError, match="mode is 'more'; expected 'max' or 'min'"):
        result.derive_plan(0.1, "params", "more")
    with pytest.raises(ValueError, match="nothing was tuned"):
        result.derive_plan(0.1, "params", tuned=True)
    with pytest.raises(ValueError, match="no group 'x'; the groups are '0', '3'"):
        result.curve("x", "params")


def test_an_analysis_of_another_model_or_setting_is_refused(net):
    done = curves(net, (0.5,), setting={"weights": "a"})
    with pytest.raises(ValueError, match="'weights' was 'a' and is 'b'"):
        curves(net, done=done, setting={"weights": "b"})
    other = replace(done, groups=(ChannelGroup("0", 8), done.groups[1]))
    with pytest.raises(ValueError, match="another model: it has 8 channels in group '0'"):
        curves(net, done=other, setting={"weights": "a"})
    fewer = replace(done, groups=done.groups[:1])
    with pytest.raises(ValueError, match="another model: it has 1 groups, this one 2"):
        curves(net, done=fewer, setting={"weights": "a"})
