import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.compress.channels.budget import meet_target
from lit_compress.compress.channels.costs import PlanCost
from lit_compress.compress.channels.groups import ChannelAxis, ChannelGroup, ChannelGroups, take
from lit_compress.compress.channels.order import (
    RemovalOrder,
    plan_from_ratios,
    plan_from_scores,
    uniform_plan,
)
from lit_compress.compress.channels.plan import ChannelPlan, choose_channels, rounding_step

# --- Models and groups ----------------------------------------------------------------------------


def tied(*groups):
    """Groups without axes, each given as ``(name, channels)`` or ``(name, channels, blocks)``."""
    return ChannelGroups(tuple(ChannelGroup(*group) for group in groups), ())


def chain(widths, *, num_classes=10, kernel=3):
    """conv-bn-relu for each width, then a linear layer on 2 x 2 pixels, and its groups."""
    layers, axes, start, previous = [], [], 0, None
    for index, width in enumerate(widths):
        name = str(3 * index)
        layers += [
            nn.Conv2d(widths[index - 1] if index else 3, width, kernel, padding=kernel // 2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        own = torch.arange(start, start + width)
        axes += [ChannelAxis(f"{name}.{t}", 0, own, "out") for t in ("weight", "bias")]
        if previous is not None:
            axes.append(ChannelAxis(f"{name}.weight", 1, previous, "in"))
        axes += [
            ChannelAxis(f"{3 * index + 1}.{t}", 0, own, "scale")
            for t in ("weight", "bias", "running_mean", "running_var")
        ]
        previous, start = own, start + width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model.append(nn.Linear(4 * widths[-1], num_classes))
    flat = previous.repeat_interleave(4)
    axes.append(ChannelAxis(f"{len(model) - 1}.weight", 1, flat, "in"))
    groups = tuple(ChannelGroup(str(3 * i), width) for i, width in enumerate(widths))
    return model, ChannelGroups(groups, tuple(axes))


def cut(model, groups, keep):
    """The model without the channels; only its tensors, which is all that is measured here."""
    slim = copy.deepcopy(model)
    tensors = {**dict(slim.named_parameters()), **dict(slim.named_buffers())}
    for name, kept in groups.kept_indices(keep).items():
        tensors[name].data = take(tensors[name], kept)
    return slim


def macs_of(model, pixels=64):
    """MACs of each layer of a chain on 8 x 8 images, by its weight's present shape."""
    return {
        name: module.weight.numel() * (pixels if isinstance(module, nn.Conv2d) else 1)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


def file_bytes(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return len(buffer.getvalue())


@st.composite
def group_tables(draw):
    """Groups of up to 96 channels, some with blocks."""
    drawn = draw(
        st.lists(st.tuples(st.integers(1, 24), st.sampled_from([1, 1, 2, 4])), min_size=1)
        .filter(bool)
        .map(lambda table: table[:8])
    )
    return tied(*((f"g{i}", size * blocks, blocks) for i, (size, blocks) in enumerate(drawn)))


round_tos = st.sampled_from([1, 2, 4, 8, 12])
ratios = st.floats(0, 0.99)
tables = settings(max_examples=60, deadline=None)


def fits(groups, plan, round_to):
    """No group lost everything, and all is as round as it can be."""
    plan.check(groups)
    for group in groups.groups:
        step = rounding_step(group, round_to)
        assert plan.kept[group.name] % step == 0 or plan.kept[group.name] == group.num_channels


# --- The plan as data -----------------------------------------------------------------------------


@tables
@given(group_tables(), ratios)
def test_json_gives_the_plan_back(groups, ratio):
    plan = uniform_plan(groups, ratio)
    again = ChannelPlan.from_json(plan.to_json())
    assert again == plan
    assert list(again.kept) == [group.name for group in groups.groups]


def test_files_give_the_plan_back(tmp_path):
    plan = ChannelPlan({"schicht.ä": 3}, {"schicht.ä": 4})
    plan.save(tmp_path / "plan.json")
    assert ChannelPlan.load(tmp_path / "plan.json") == plan
    with pytest.raises(FileNotFoundError):
        ChannelPlan.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"conv1": {"channels": 8', "is no JSON"),
        ("[1, 2]", "holds a list, expected a channel plan"),
        ('{"conv1": 4}', "group 'conv1' of the channel plan is 4"),
        ('{"conv1": {"kept": 4}}', "expected an object with two numbers"),
        ('{"conv1": {"channels": 8, "kept": 0}}', "keeps 0 channels of group 'conv1'.*from 1 to 8"),
        ('{"conv1": {"channels": 8, "kept": 9}}', "keeps 9 channels"),
        ('{"conv1": {"channels": 8, "kept": 4.5}}', "keeps 4.5 channels"),
        ('{"conv1": {"channels": 8, "kept": true}}', "keeps True channels"),
        ('{"conv1": {"channels": 0, "kept": 0}}', "gives group 'conv1' 0 channels"),
    ],
    ids=str,
)
def test_texts_that_are_no_plan_are_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ChannelPlan.from_json(text)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=f"plan.json cannot be read.*{message}"):
        ChannelPlan.load(tmp_path / "plan.json")


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\x80\x02\xff")
    with pytest.raises(ValueError, match="cannot be read as a channel plan"):
        ChannelPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("kept", "channels", "where"), [({"a": 1}, {}, "kept"), ({}, {"a": 1}, "channels")]
)
def test_kept_and_channels_must_name_the_same_groups(kept, channels, where):
    with pytest.raises(ValueError, match=f"'a' in {where} only"):
        ChannelPlan(kept, channels)


def test_a_plan_prints_as_a_table_and_tells_ratios():
    plan = ChannelPlan({"stem": 8, "layer1.conv": 3}, {"stem": 16, "layer1.conv": 4})
    assert str(plan).splitlines() == [
        "group        channels  kept  pruning ratio",
        "stem               16     8          50.0%",
        "layer1.conv         4     3          25.0%",
        "total              20    11          45.0%",
    ]
    assert plan.pruning_ratios == {"stem": 0.5, "layer1.conv": 0.25}
    assert "0.0%" in str(ChannelPlan({}, {}))


def test_a_plan_does_not_change_with_the_dicts_it_came_from():
    kept = {"a": 1}
    plan = ChannelPlan(kept, {"a": 2})
    kept["a"] = 2
    assert plan.kept == {"a": 1}


# --- Plans and models -----------------------------------------------------------------------------


def test_groups_that_a_plan_does_not_name_keep_everything():
    groups = tied(("a", 8), ("b", 16))
    assert ChannelPlan({"b": 4}, {"b": 16}).kept_in(groups) == {"a": 8, "b": 4}


@pytest.mark.parametrize(
    ("kept", "channels", "message"),
    [
        ({"c": 1}, {"c": 8}, "a group 'c' and the model has none.*'a', 'b'"),
        ({"a": 4, "b": 4}, {"a": 8, "b": 8}, "8 channels in group 'b' and the model has 16"),
        ({"b": 6}, {"b": 16}, "6 channels of group 'b', whose 4 blocks.* 4 or 8"),
        ({"b": 3}, {"b": 16}, "keep 4\\."),
    ],
    ids=str,
)
def test_plans_for_other_models_are_refused(kept, channels, message):
    groups = tied(("a", 8), ("b", 16, 4))
    plan = ChannelPlan(kept, channels)
    with pytest.raises(ValueError, match=message):
        plan.check(groups)
    with pytest.raises(ValueError, match=message):
        choose_channels(groups, plan, torch.zeros(24))


def test_only_some_of_many_groups_are_listed():
    with pytest.raises(ValueError, match="'g5' and 4 more"):
        ChannelPlan({"x": 1}, {"x": 1}).check(tied(*((f"g{i}", 2) for i in range(10))))


@tables
@given(group_tables(), ratios, round_tos, st.lists(st.floats(0, 1), max_size=5).map(sorted))
def test_part_way_goes_from_everything_to_the_plan_and_never_back(groups, ratio, round_to, parts):
    plan = uniform_plan(groups, ratio, round_to=1)
    assert plan.part_way(groups, 1.0, round_to=round_to) == plan
    before = plan.part_way(groups, 0.0, round_to=round_to)
    assert before.kept == plan.channels
    for part in parts:
        now = plan.part_way(groups, part, round_to=round_to)
        now.check(groups)
        assert all(plan.kept[n] <= now.kept[n] <= before.kept[n] for n in plan.kept)
        before = now


def test_part_way_rounds_to_the_nearest_multiple_and_keeps_more_on_a_tie():
    groups, plan = tied(("a", 32)), ChannelPlan({"a": 8}, {"a": 32})
    kept = [plan.part_way(groups, part / 12).kept["a"] for part in range(13)]
    assert kept == [32, 32, 32, 24, 24, 24, 24, 16, 16, 16, 16, 8, 8]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_parts_that_are_none_are_refused(fraction):
    with pytest.raises(ValueError, match="expected a part of the way"):
        ChannelPlan({"a": 1}, {"a": 2}).part_way(tied(("a", 2)), fraction)


def test_a_plan_goes_on_with_a_model_that_was_cut_part_of_the_way():
    groups = tied(("a", 32), ("b", 8))
    plan = ChannelPlan({"a": 8}, {"a": 32})
    part = plan.part_way(groups, 0.5)
    left = groups.after(choose_channels(groups, part, torch.rand(40)))
    rest = plan.for_cut_model(left)
    assert (rest.kept, rest.channels) == ({"a": 8}, {"a": part.kept["a"]})
    with pytest.raises(ValueError, match="from 32 channels to 8 and the model has 4"):
        plan.for_cut_model(tied(("a", 4), ("b", 8)))
    with pytest.raises(ValueError, match="the model has 40"):
        plan.for_cut_model(tied(("a", 40), ("b", 8)))
    with pytest.raises(ValueError, match="the model has none of that name"):
        plan.for_cut_model(tied(("b", 8)))


# --- Which channels -------------------------------------------------------------------------------


@tables
@given(group_tables(), ratios, st.integers(0, 5), st.data())
def test_the_best_of_each_block_stay_in_the_planned_number(groups, ratio, seed, data):
    levels = data.draw(st.sampled_from([1, 3, 1000]))  # few levels make ties
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (groups.num_channels,), generator=generator).float()
    plan = uniform_plan(groups, ratio, round_to=1)
    keep = choose_channels(groups, plan, scores)
    groups.check(keep)
    assert groups.num_kept(keep) == plan.kept
    for group in groups.groups:
        span = groups.span(group.name)
        blocks = zip(
            keep[span].view(group.num_blocks, -1), scores[span].view(group.num_blocks, -1),
            strict=True,
        )  # fmt: skip
        for stays, score in blocks:
            by_rank = sorted(range(len(score)), key=lambda i: (-float(score[i]), i))
            assert stays.nonzero().flatten().tolist() == sorted(by_rank[: int(stays.sum())])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(5), r"the shape \(5,\), expected one number for each of the 6"),
        (torch.tensor([0, 0, 0, 0, math.nan, 0]), "channel 1 in group 'b' is nan"),
        (torch.tensor([0, 0, 0, math.inf, 0, 0]), "channel 0 in group 'b' is inf"),
        (torch.tensor([0, -math.inf, 0, 0, 0, 0]), "channel 1 in group 'a' is -inf"),
    ],
    ids=str,
)
def test_scores_that_rank_nothing_are_refused(scores, message):
    groups = tied(("a", 3), ("b", 3))
    with pytest.raises(ValueError, match=message):
        choose_channels(groups, ChannelPlan({}, {}), scores)
    with pytest.raises(ValueError, match=message):
        plan_from_scores(groups, scores, 0.5)


# --- Ratios ---------------------------------------------------------------------------------------


@tables
@given(group_tables(), st.tuples(ratios, ratios).map(sorted), round_tos)
def test_uniform_plans_are_round_and_fall_with_the_ratio(groups, pair, round_to):
    low, high = (uniform_plan(groups, ratio, round_to=round_to) for ratio in pair)
    fits(groups, low, round_to)
    fits(groups, high, round_to)
    assert all(high.kept[name] <= low.kept[name] for name in low.kept)
    for group in groups.groups:
        step = rounding_step(group, round_to)
        wish = group.num_channels * (1 - pair[0])
        kept = low.kept[group.name]
        assert abs(kept - wish) <= step / 2 + 1e-6 or kept == min(step, group.num_channels)


@tables
@given(group_tables())
def test_a_ratio_of_nothing_keeps_everything(groups):
    dense = {group.name: group.num_channels for group in groups.groups}
    assert uniform_plan(groups, 0.0).kept == dense
    assert plan_from_scores(groups, torch.rand(groups.num_channels), 0.0).kept == dense
    assert plan_from_ratios(groups, {}).kept == dense


@pytest.mark.parametrize(
    ("channels", "ratio", "round_to", "kept"),
    [
        (64, 0.5, 8, 32),
        (24, 0.5, 8, 16),  # 12 lies between 8 and 16
        (40, 0.1, 8, 40),  # 36 lies between 32 and 40, and 1 - 0.1 is not exact
        (16, 0.9, 8, 8),  # never below one multiple
        (8, 0.9, 8, 1),  # no more channels than the multiple: not rounded
        (6, 0.5, 8, 3),
        (100, 0.3, 8, 72),
        (100, 0.3, 1, 70),
        (25, 0.5, 1, 13),
    ],
)
def test_uniform_plans_by_hand(channels, ratio, round_to, kept):
    assert uniform_plan(tied(("a", channels)), ratio, round_to=round_to).kept == {"a": kept}


def test_blocks_and_rounding_go_together():
    groups = tied(("a", 72, 3), ("b", 64, 32), ("c", 18, 6))
    assert uniform_plan(groups, 0.5).kept == {"a": 48, "b": 32, "c": 12}
    assert uniform_plan(groups, 0.5, round_to=1).kept == {"a": 36, "b": 32, "c": 12}


def test_the_first_pattern_that_matches_counts_and_the_others_stay():
    groups = tied(("stem", 32), ("block.1.conv", 64), ("block.2.conv", 64), ("head", 32))
    plan = plan_from_ratios(groups, {"block.1.*": 0.25, "block.*": 0.5, "stem": 0.0})
    assert plan.kept == {"stem": 32, "block.1.conv": 48, "block.2.conv": 32, "head": 32}


def test_a_list_has_a_ratio_for_each_group():
    groups = tied(("a", 64), ("b", 64), ("c", 128))
    assert plan_from_ratios(groups, [0.0, 0.25, 0.5]).kept == {"a": 64, "b": 48, "c": 64}
    with pytest.raises(ValueError, match="lists 2 ratios and the model has 3 groups.*of a, b, c"):
        plan_from_ratios(groups, [0.1, 0.2])


def test_patterns_that_match_nothing_name_the_nearest():
    groups = tied(("layer1.conv1", 8), ("layer1.conv2", 8), ("stem", 8))
    with pytest.raises(ValueError, match=r"'layer1.cnv1', which matches none.*'layer1.conv1'"):
        plan_from_ratios(groups, {"layer1.cnv1": 0.5})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: uniform_plan(g, 1.0), "A layer without channels computes nothing"),
        (lambda g: uniform_plan(g, 50), "For 50 % write 0.5"),
        (lambda g: uniform_plan(g, -0.1), r"pruning_ratio is -0.1, .* in \[0, 1\)"),
        (lambda g: uniform_plan(g, math.nan), "pruning_ratio is nan"),
        (lambda g: uniform_plan(g, "half"), "pruning_ratio is 'half'"),
        (lambda g: uniform_plan(g, True), "pruning_ratio is True"),
        (lambda g: uniform_plan(g, 0.5, round_to=0), "round_to is 0"),
        (lambda g: uniform_plan(g, 0.5, round_to=2.5), "round_to is 2.5"),
        (lambda g: plan_from_ratios(g, {"a": 1.0}), r"pruning_ratio\['a'\] is 1.0"),
        (lambda g: plan_from_ratios(g, [2.0]), "pruning_ratio of group 'a' is 2.0"),
        (lambda g: plan_from_scores(g, torch.zeros(16), 1.5), "pruning_ratio is 1.5"),
        (lambda g: plan_from_scores(g, torch.zeros(16), 0.95), "above max_pruning_ratio=0.9"),
        (
            lambda g: plan_from_scores(g, torch.zeros(16), 0.5, max_pruning_ratio=1.5),
            "max_pruning_ratio is 1.5",
        ),
    ],
)
def test_ratios_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(tied(("a", 16)))


# --- Ranking --------------------------------------------------------------------------------------


@tables
@given(
    group_tables(),
    st.tuples(st.floats(0, 0.8), st.floats(0, 0.8)).map(sorted),
    round_tos,
    st.sampled_from([0.8, 0.9, 1.0]),
    st.integers(0, 3),
)
def test_ranked_plans_are_round_capped_and_fall_with_the_ratio(groups, pair, round_to, cap, seed):
    scores = torch.rand(groups.num_channels, generator=torch.Generator().manual_seed(seed))
    if seed == 0:
        scores.fill_(0.1)
    low, high = (
        plan_from_scores(groups, scores, ratio, round_to=round_to, max_pruning_ratio=cap)
        for ratio in pair
    )
    fits(groups, low, round_to)
    fits(groups, high, round_to)
    assert all(high.kept[name] <= low.kept[name] for name in low.kept)
    assert all(ratio <= cap + 1e-9 for ratio in high.pruning_ratios.values())


@given(st.integers(0, 100), st.floats(0, 0.9))
@settings(max_examples=30, deadline=None)
def test_without_rounding_the_least_scores_of_all_go_exactly(seed, ratio):
    groups = tied(("a", 20), ("b", 30), ("c", 50))
    scores = torch.rand(100, generator=torch.Generator().manual_seed(seed))
    plan = plan_from_scores(groups, scores, ratio, round_to=1, max_pruning_ratio=1.0)
    keep = choose_channels(groups, plan, scores)
    assert abs(int((~keep).sum()) - 100 * ratio) <= 0.5 + 1e-9
    each_has_some = {"a", "b", "c"} <= {g for g, kept in plan.kept.items() if kept > 1}
    if each_has_some and not bool(keep.all()):
        assert scores[~keep].max() < scores[keep].min()


def test_ranking_goes_by_whole_steps_and_by_their_mean():
    groups = tied(("a", 16), ("b", 16))
    # The least eight of a have the mean 1, those of b 2, though b holds the least channel of all.
    scores = torch.tensor([1.0] * 8 + [9.0] * 8 + [0.0] + [16 / 7] * 7 + [9.0] * 8)
    assert plan_from_scores(groups, scores, 0.25).kept == {"a": 8, "b": 16}
    assert plan_from_scores(groups, scores, 0.5).kept == {"a": 8, "b": 8}
    assert plan_from_scores(groups, scores, 0.9).kept == {"a": 8, "b": 8}


# --- What a plan costs ----------------------------------------------------------------------------


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(0, 100), st.floats(0, 0.9))
@settings(max_examples=25, deadline=None)
def test_costs_are_those_of_the_slim_model(widths, seed, ratio):
    model, groups = chain(widths)
    plan = uniform_plan(groups, ratio, round_to=1)
    scores = torch.rand(groups.num_channels, generator=torch.Generator().manual_seed(seed))
    slim = cut(model, groups, choose_channels(groups, plan, scores))
    macs = PlanCost.macs(groups, model, macs_of(model))
    assert macs(plan) == sum(macs_of(slim).values())
    assert macs.dense == sum(macs_of(model).values())
    assert PlanCost.num_params(groups, model)(plan) == sum(p.numel() for p in slim.parameters())
    state = slim.state_dict().values()
    numbers = sum(tensor.numel() * tensor.element_size() for tensor in state)
    assert PlanCost.size_bytes(groups, model)(plan) == numbers
    file = PlanCost.size_bytes(groups, model, file_bytes(model))
    assert file.dense == file_bytes(model)
    assert abs(file(plan) - file_bytes(slim)) <= 256


@tables
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.floats(0, 0.9))
def test_sizes_of_axes_are_those_of_the_groups(widths, ratio):
    model, groups = chain(widths)
    plan = uniform_plan(groups, ratio, round_to=1)
    sizes = groups.axis_sizes(plan.kept_in(groups))
    for axis in groups.axes:  # a tensor that counts alone costs what its axes leave of it
        tensor = model.state_dict()[axis.tensor]
        cost = PlanCost(groups, {axis.tensor: tensor.shape}, {axis.tensor: tensor.numel()}, 5)
        uncut = [n for dim, n in enumerate(tensor.shape) if (axis.tensor, dim) not in sizes]
        cut_sizes = [n for (name, _), n in sizes.items() if name == axis.tensor]
        assert cost(plan) == math.prod(uncut + cut_sizes) + 5


def test_half_precision_takes_half_the_bytes_and_shared_weights_count_once():
    model, groups = chain([8])
    plan = ChannelPlan({}, {})
    full = PlanCost.size_bytes(groups, model)(plan)
    assert PlanCost.size_bytes(groups, model.half())(plan) == (full - 8) / 2 + 8  # a step counter
    tied_model = nn.ModuleList([model, model])
    named = [ChannelAxis(f"0.{a.tensor}", a.dim, a.channels, a.role) for a in groups.axes]
    both = ChannelGroups(groups.groups, tuple(named))
    once = PlanCost.size_bytes(groups, model)(plan)
    assert PlanCost.size_bytes(both, tied_model)(plan) == once


def test_weights_of_a_silent_module_count_for_the_one_around_it():
    attention = nn.MultiheadAttention(8, 2)
    model = nn.Sequential(nn.Linear(8, 8), attention)
    embedding = torch.arange(8)
    axes = (
        ChannelAxis("0.weight", 0, embedding, "out"),
        ChannelAxis("1.in_proj_weight", 1, embedding, "in"),
        ChannelAxis("1.out_proj.weight", 0, embedding, "out"),
    )
    groups = ChannelGroups((ChannelGroup("0", 8),), axes)
    cost = PlanCost.macs(groups, model, {"0": 64, "1": 1000, "1.out_proj": 0, "": 7})
    assert cost.dense == 64 + 1000 + 7
    assert cost(ChannelPlan({"0": 4}, {"0": 8})) == 32 + 500 + 7


def test_costs_of_another_model_are_refused():
    model, groups = chain([8, 8])
    other, _ = chain([8, 16])
    with pytest.raises(ValueError, match=r"know '3.weight' with 8 indices.*\(16, 8, 3, 3\)"):
        PlanCost.num_params(groups, other)
    with pytest.raises(ValueError, match="hold the tensor '3.weight' and the model has none"):
        PlanCost.size_bytes(groups, model[:3])
    with pytest.raises(ValueError, match="layer_macs names 'head', which is no module"):
        PlanCost.macs(groups, model, {"head": 5})
    with pytest.raises(ValueError, match="8 channels in group '0' and the model has 9"):
        PlanCost.num_params(*reversed(chain([9])))(ChannelPlan({"0": 4}, {"0": 8}))


# --- Targets --------------------------------------------------------------------------------------

widths_of_nets = st.lists(st.sampled_from([24, 32, 48, 64]), min_size=5, max_size=7)


def orders(groups, rule, round_to=8, cap=1.0):
    if rule == "uniform":
        return RemovalOrder.by_ratios(groups, round_to=round_to, max_pruning_ratio=cap)
    if rule == "ratios":
        shares = [0.3 + 0.5 * (i % 2) for i, _ in enumerate(groups.groups)]
        return RemovalOrder.by_ratios(groups, shares, round_to=round_to, max_pruning_ratio=cap)
    scores = torch.rand(groups.num_channels, generator=torch.Generator().manual_seed(3))
    return RemovalOrder.by_scores(groups, scores, round_to=round_to, max_pruning_ratio=cap)


@given(
    widths_of_nets,
    st.floats(0.15, 0.95) | st.just(1.0),  # nearer to 1, one channel can be more than the window
    st.sampled_from(["macs", "num_params", "size_bytes"]),
    st.sampled_from(["uniform", "ratios", "scores"]),
    st.sampled_from([1, 4, 8]),
)
@settings(max_examples=80, deadline=None)
def test_targets_are_met_and_never_passed(widths, ratio, what, rule, round_to):
    model, groups = chain(widths)
    macs = [macs_of(model)] if what == "macs" else []
    cost = getattr(PlanCost, what)(groups, model, *macs)
    plan = meet_target(orders(groups, rule, round_to), cost, ratio * cost.dense)
    plan.check(groups)
    assert 0.99 * ratio * cost.dense <= cost(plan) <= ratio * cost.dense


@given(widths_of_nets, st.floats(0.3, 0.95), st.sampled_from(["uniform", "scores"]))
@settings(max_examples=40, deadline=None)
def test_multiples_are_left_only_where_they_must_be(widths, ratio, rule):
    model, groups = chain(widths)
    cost = PlanCost.num_params(groups, model)
    plan = meet_target(orders(groups, rule), cost, ratio * cost.dense)
    odd = [name for name, kept in plan.kept.items() if kept % 8]
    assert len(odd) <= 2
    loose = meet_target(orders(groups, rule), cost, ratio * cost.dense, tolerance=0.5)
    assert all(kept % 8 == 0 for kept in loose.kept.values())


@given(st.lists(st.sampled_from([32, 64, 128]), min_size=3, max_size=6), st.floats(0.2, 0.9))
@settings(max_examples=30, deadline=None)
def test_no_group_strays_far_from_its_rule(widths, ratio):
    model, groups = chain(widths)
    cost = PlanCost.macs(groups, model, macs_of(model))
    plan = meet_target(orders(groups, "uniform"), cost, ratio * cost.dense)
    shares = [kept / plan.channels[name] for name, kept in plan.kept.items()]
    # The rule itself spans a step; from there one group may have a step less, another one more.
    assert max(shares) - min(shares) <= 3 * 8 / min(widths)


def test_protected_groups_stay_whatever_the_target():
    model, groups = chain([32, 32, 32])
    cost = PlanCost.macs(groups, model, macs_of(model))
    order = RemovalOrder.by_ratios(groups, {"3": 0.5})
    plan = meet_target(order, cost, 0.5 * cost.dense, tolerance=0.05)
    assert (plan.kept["0"], plan.kept["6"]) == (32, 32)
    assert 0.475 * cost.dense <= cost(plan) <= 0.5 * cost.dense


def test_blocks_stay_equal_at_a_target():
    model, groups = chain([64, 48])
    blocks = ChannelGroups((ChannelGroup("0", 64, 4), ChannelGroup("3", 48, 3)), groups.axes)
    cost = PlanCost.num_params(blocks, model)
    for ratio in (0.1, 0.33, 0.7):
        plan = meet_target(orders(blocks, "scores"), cost, ratio * cost.dense, tolerance=0.05)
        assert plan.kept["0"] % 4 == 0
        assert plan.kept["3"] % 3 == 0
        assert cost(plan) <= ratio * cost.dense


@given(st.integers(2, 40), st.sampled_from([1, 4, 8, 12]), st.floats(0.05, 1), st.booleans())
@tables
def test_of_a_single_group_every_number_is_found(width, round_to, ratio, slow):
    model, groups = chain([width])
    params = PlanCost.num_params(groups, model)
    costs = {kept: params(ChannelPlan({"0": kept}, {"0": width})) for kept in range(1, width + 1)}
    target = ratio * params.dense
    meets = [kept for kept, cost in costs.items() if 0.95 * target <= cost <= target]
    order = orders(groups, "uniform", round_to)
    cost = (lambda plan: params(plan)) if slow else params
    if meets:
        assert meet_target(order, cost, target, tolerance=0.05).kept["0"] in meets
    else:
        with pytest.raises(ValueError, match=r"the lowest cost|no plan was found"):
            meet_target(order, cost, target, tolerance=0.05)


def test_the_whole_cost_as_target_changes_nothing():
    model, groups = chain([16, 16])
    cost = PlanCost.num_params(groups, model)
    assert meet_target(orders(groups, "uniform"), cost, cost.dense).kept == {"0": 16, "3": 16}


def test_a_hundred_groups_take_no_time():
    model, groups = chain([64] * 100, kernel=1)
    cost = PlanCost.num_params(groups, model)
    calls = []
    original = cost.of_each
    cost.of_each = lambda kept: calls.append(len(kept)) or original(kept)
    plan = meet_target(orders(groups, "scores"), cost, 0.5 * cost.dense, tolerance=0.001)
    assert 0.4995 * cost.dense <= cost(plan) <= 0.5 * cost.dense
    assert len(calls) < 100


@pytest.mark.parametrize(
    ("target", "tolerance", "message"),
    [
        (1.2, 0.01, "expected a target above 0 and not above that, for half of it"),
        (0.0, 0.01, "the target is 0 and the dense model costs"),
        (-1.0, 0.01, "the target is -"),
        (math.nan, 0.01, "the target is nan"),
        (0.5, 1.0, "tolerance is 1.0"),
        (0.5, -0.1, "tolerance is -0.1"),
        (0.01, 0.01, "the lowest cost that can be reached is .* of the dense model"),
    ],
)
def test_targets_that_cannot_be_are_refused(target, tolerance, message):
    model, groups = chain([16, 16])
    cost = PlanCost.num_params(groups, model)
    order = orders(groups, "scores", cap=0.5)
    with pytest.raises(ValueError, match=message):
        meet_target(order, cost, target * cost.dense, tolerance=tolerance)


def test_the_lowest_cost_that_is_named_can_be_reached():
    model, groups = chain([16, 24])
    cost = PlanCost.num_params(groups, model)
    order = orders(groups, "uniform", cap=0.75)
    lowest = cost(ChannelPlan({"0": 4, "3": 6}, {"0": 16, "3": 24}))
    with pytest.raises(ValueError, match=f"can be reached is {lowest:g}"):
        meet_target(order, cost, lowest - 1)
    assert meet_target(order, cost, lowest).kept == {"0": 4, "3": 6}


def test_the_nearest_costs_are_named_where_steps_are_too_coarse():
    model, groups = chain([2], num_classes=2)  # 1 or 2 channels: nothing lies between
    cost = PlanCost.num_params(groups, model)
    one, two = (cost(ChannelPlan({"0": kept}, {"0": 2})) for kept in (1, 2))
    with pytest.raises(ValueError, match=f"the nearest cost {one:g} and {two:g}"):
        meet_target(orders(groups, "uniform"), cost, (one + two) / 2)
    with pytest.raises(ValueError, match=f"the nearest cost {one:g} and {two:g}"):
        meet_target(orders(groups, "uniform"), lambda plan: cost(plan), (one + two) / 2)


@given(widths_of_nets, st.floats(0.2, 1), st.sampled_from(["uniform", "scores"]))
@settings(max_examples=40, deadline=None)
def test_a_slow_cost_is_asked_a_few_times_and_never_twice(widths, ratio, rule):
    model, groups = chain(widths)
    params = PlanCost.num_params(groups, model)
    asked = []

    def latency_ms(plan):
        asked.append(tuple(plan.kept.values()))
        return 0.3 + params(plan) / 1e4  # a fixed cost and a part for the work

    dense = latency_ms(ChannelPlan({}, {}))
    target = 0.3 + (dense - 0.3) * ratio
    asked.clear()
    plan = meet_target(orders(groups, rule), latency_ms, target, tolerance=0.05)
    assert 0.95 * target <= latency_ms(plan) <= target
    assert len(asked) <= 15
    assert len(set(asked[:-1])) == len(asked) - 1  # the last is the assertion's own


def test_a_noisy_cost_still_gives_a_plan_that_was_measured_within_the_target():
    model, groups = chain([64, 64, 64])
    params = PlanCost.num_params(groups, model)
    generator = torch.Generator().manual_seed(0)
    measured = []

    def latency_ms(plan):
        noise = float(torch.randn((), generator=generator)) * 0.01
        measured.append((plan, params(plan) / 1e4 * (1 + noise)))
        return measured[-1][1]

    target = latency_ms(ChannelPlan({}, {})) / 2
    plan = meet_target(orders(groups, "uniform"), latency_ms, target, tolerance=0.05)
    assert [0.95 * target <= ms <= target for asked, ms in measured if asked == plan] == [True]


def test_costs_and_orders_of_two_models_are_refused():
    model, groups = chain([16, 16])
    cost = PlanCost.num_params(groups, model)
    with pytest.raises(ValueError, match="a model with 2 groups and the order that of one with 1"):
        meet_target(orders(tied(("0", 16)), "uniform"), cost, 0.5 * cost.dense)


def test_a_model_without_groups_can_only_stay_as_it_is():
    groups, model = tied(), nn.Linear(3, 2)
    cost = PlanCost.num_params(groups, model)
    order = RemovalOrder.by_ratios(groups)
    assert cost.dense == 8
    assert meet_target(order, cost, 8) == uniform_plan(groups, 0.5) == ChannelPlan({}, {})
    with pytest.raises(ValueError, match="the lowest cost that can be reached is 8"):
        meet_target(order, cost, 4)
    assert choose_channels(groups, ChannelPlan({}, {}), torch.zeros(0)).tolist() == []
