import pytest
import torch
from torch import nn

from lit_compress.compress.channels.goal import ChannelGoal
from lit_compress.compress.channels.plan import ChannelPlan
from tests.compress.channels.hand_made_groups import conv_net, groups_of

SCORES = torch.arange(10.0)  # group "0" has the lower ones


def wide():
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU())
    model.append(nn.Linear(96, 3))
    groups = groups_of(
        {"0": 64, "2": 96},
        ("0.weight", 0, range(64), "out"),
        ("0.bias", 0, range(64), "out"),
        ("2.weight", 1, range(64), "in"),
        ("2.weight", 0, range(64, 160), "out"),
        ("2.bias", 0, range(64, 160), "out"),
        ("4.weight", 1, range(64, 160), "in"),
    )
    return model, groups


WIDE_MACS = {"0": 640, "2": 64 * 96, "4": 288}


def never(plan):
    raise AssertionError("latency is measured only where it is the target")


def resolve(goal, latency=never):
    model, groups = wide()
    return goal.resolve(groups, model, torch.arange(160.0), WIDE_MACS, latency)


def macs(plan):
    first, second = plan.kept["0"], plan.kept["2"]
    return 10 * first + first * second + 3 * second


def params(plan):
    return macs(plan) + plan.kept["0"] + plan.kept["2"] + 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"pruning_ratio": 0.5, "round_to": 1}, {"0": 3, "3": 2}),
        ({"pruning_ratio": 0.0}, {"0": 6, "3": 4}),
        ({"pruning_ratio": 0}, {"0": 6, "3": 4}),
        ({"pruning_ratio": 0, "allocation": "global"}, {"0": 6, "3": 4}),
        ({"pruning_ratio": [0.5, 0.25], "round_to": 1}, {"0": 3, "3": 3}),
        ({"pruning_ratio": {"3": 0.5}, "round_to": 1}, {"0": 6, "3": 2}),
        ({"pruning_ratio": 0.3, "allocation": "global", "round_to": 1}, {"0": 3, "3": 4}),
        ({"plan": ChannelPlan({"0": 2}, {"0": 6})}, {"0": 2}),
    ],
    ids=str,
)
def test_numbers_and_ratios(arguments, expected):
    model, groups = conv_net()
    plan = ChannelGoal(**arguments).resolve(groups, model, SCORES, {}, never)
    assert plan.kept == expected


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.85, 1.0, 1])
def test_targets_are_met_within_a_percent(ratio, allocation):
    goal = ChannelGoal(target_macs_ratio=ratio, allocation=allocation)
    assert 0.99 * ratio * 7072 <= macs(resolve(goal)) <= ratio * 7072
    goal = ChannelGoal(target_params_ratio=ratio, allocation=allocation)
    assert 0.99 * ratio * 7235 <= params(resolve(goal)) <= ratio * 7235
    size = int(ratio * 4 * 7235)
    goal = ChannelGoal(target_size_bytes=size, allocation=allocation)
    assert 0.99 * size <= 4 * params(resolve(goal)) <= size


def test_a_latency_is_met_within_five_percent():
    asked = []

    def latency(plan):
        asked.append(plan)
        return macs(plan) / 1000

    plan = resolve(ChannelGoal(target_latency_ms=3.0), latency)
    assert 0.95 * 3 <= latency(plan) <= 3
    assert len(asked) < 20
    assert ChannelGoal(target_latency_ms=3.0).needs_latency
    assert not ChannelGoal(target_macs_ratio=0.5).needs_latency


def test_ratios_beside_a_target_are_its_proportions():
    half_of_first = 10 * 32 + 32 * 96 + 3 * 96
    only_first = resolve(ChannelGoal({"0": 0.1}, target_macs_ratio=half_of_first / 7072))
    assert only_first.kept == {"0": 32, "2": 96}
    mostly_second = resolve(ChannelGoal([0.1, 0.8], target_macs_ratio=0.5))
    assert mostly_second.pruning_ratios["2"] > 3 * mostly_second.pruning_ratios["0"]


def test_a_plan_in_a_file(tmp_path):
    plan = ChannelPlan({"0": 8}, {"0": 64})
    plan.save(tmp_path / "plan.json")
    for path in (tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert resolve(ChannelGoal(plan=path)) == plan


def test_plans_and_names_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="the plan is for 32 channels in group '0' and the model"):
        resolve(ChannelGoal(plan=ChannelPlan({"0": 8}, {"0": 32})))
    with pytest.raises(ValueError, match="pattern 'fc', which matches none"):
        resolve(ChannelGoal({"fc": 0.5}))
    with pytest.raises(ValueError, match="lowest cost that can be reached is"):
        resolve(ChannelGoal(target_macs_ratio=1e-6))
    (tmp_path / "plan.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="plan.json cannot be read as a channel plan"):
        resolve(ChannelGoal(plan=tmp_path / "plan.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing was given to say how many"),
        ({"target_macs_ratio": 0.5, "target_params_ratio": 0.5}, "target_macs_ratio and target_pa"),
        ({"plan": ChannelPlan({}, {}), "pruning_ratio": [0.5]}, "pruning_ratio and plan was given"),
        ({"pruning_ratio": 0.5, "target_macs_ratio": 0.5}, "by list or mapping gives the propor"),
        ({"pruning_ratio": 0.5, "allocation": "layers"}, "expected 'uniform' or 'global'"),
        (
            {"pruning_ratio": {"0": 0.1}, "target_macs_ratio": 0.5, "allocation": "global"},
            "finds out how much each group loses",
        ),
        ({"pruning_ratio": 0.5, "round_to": True}, "round_to is True, expected a whole number"),
        ({"target_macs_ratio": 0}, "target_macs_ratio is 0, expected a positive number"),
        ({"target_macs_ratio": True}, "target_macs_ratio is True, expected a positive number"),
        ({"target_params_ratio": 1.5}, r"expected what is kept ÷ dense, in \(0, 1\]"),
        ({"target_latency_ms": float("inf")}, "target_latency_ms is inf, expected a positive"),
        ({"pruning_ratio": 1.0}, "A layer without channels computes nothing"),
        ({"plan": "no.json"}, "there is no such file"),
    ],
    ids=str,
)
def test_goals_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChannelGoal(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pruning_ratio": "0.5"}, "pruning_ratio is '0.5', expected a number"),
        ({"pruning_ratio": [0.5, "a"]}, r"pruning_ratio\[1\] is 'a', expected a number"),
        ({"pruning_ratio": {"conv*": 1.0}}, r"pruning_ratio\['conv\*'\] is 1.0, expected"),
        ({"pruning_ratio": 0.5, "round_to": 2.5}, "round_to is 2.5, expected a whole number"),
        ({"pruning_ratio": 0.5, "round_to": "8"}, "round_to is '8', expected a whole number"),
        ({"plan": 5}, "plan is 5, expected a ChannelPlan or the path"),
    ],
)
def test_values_of_another_kind_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChannelGoal(**arguments)
