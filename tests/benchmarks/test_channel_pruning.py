"""The benchmark judges what it should, and drives Torch-Pruning as it says."""

from dataclasses import asdict, replace

import channel_pruning
import pruning_accuracy as accuracy
import pytest
import torch
import torch_pruning

from lit_compress.compress.channels.tracing import find_channel_groups
from lit_compress.measure import count_macs
from lit_compress.tasks import build_model


def made_up(arm, top1, after_cut, seed, macs_ratio=0.498):
    run = asdict(arm) | {"seed": seed, "split": "test", "macs_ratio": macs_ratio}
    run["top1_after_cut"] = after_cut
    return run if top1 is None else run | {"top1": top1}


def ratio(estimate, width=0.02):
    low, high = estimate - width / 2, estimate + width / 2
    return {"ratio": estimate, "low": low, "high": high, "rounds": 9}


def cut_time(cut, in_fit):
    return {"cut_step_ratio": cut, "in_fit_step_ratio": in_fit}


def results(best=0.87, peer=0.86, repaired=0.7, macs_ratio=0.498, seeds=(1, 2, 3), **parts):
    tops = {accuracy.DENSE: 0.89, accuracy.BEST: best, accuracy.TORCH_PRUNING_BELOW: peer}
    runs = []
    for seed in seeds:
        for arm in accuracy.ARMS:
            top1 = tops.get(arm, 0.85) + seed / 1000
            runs.append(made_up(arm, top1, 0.3, seed, macs_ratio))
        runs += [
            made_up(arm, None, repaired if arm.reconstruct else 0.4, seed)
            for arm in accuracy.untuned_arms()
        ]
    return {
        "runs": runs,
        "cut_time": {"cut_step_ratio": ratio(0.1), "in_fit_step_ratio": ratio(0.2)},
        "sensitivity": {"time_ratio": ratio(1.02)},
    } | parts


def test_all_bars_hold():
    assert channel_pruning.check(results()) == []
    assert channel_pruning.lead(results()) == pytest.approx(1.0)
    assert channel_pruning.margin(results()) == pytest.approx(30.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peer": 0.88}, "leads Torch-Pruning by -1.00 points"),
        ({"repaired": 0.35}, "reconstruction gains -5.00 points"),
        ({"macs_ratio": 0.51}, "keeps 0.5100 of the MACs"),
        ({"macs_ratio": 0.48}, "keeps 0.4800 of the MACs"),
        ({"seeds": (1, 2)}, "best has 2 runs of 3"),
        ({"seeds": ()}, "leads Torch-Pruning by nan points"),
        ({"cut_time": cut_time(ratio(1.1), ratio(0.2))}, "ratio 1.1000"),
        ({"cut_time": cut_time(ratio(0.1), ratio(1.2))}, "ratio 1.2000"),
        ({"sensitivity": {"time_ratio": ratio(1.2)}}, "ratio 1.2000"),
        ({"sensitivity": {"time_ratio": 1.2}}, "ratio 1.2000"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else None,
)
def test_a_missed_bar_is_named(changes, message):
    assert message in "\n".join(channel_pruning.check(results(**changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"cut_time": cut_time(ratio(1.1, width=0.3), ratio(0.2))},
        {"sensitivity": {"time_ratio": ratio(1.2, width=0.3)}},
        {"cut_time": {"cut_s": 1.0, "in_fit_s": 2.0}},  # of an earlier run, in seconds
    ],
)
def test_what_is_not_decided_is_not_missed(changes):
    assert channel_pruning.check(results(**changes)) == []
    verdicts = [bar.verdict for bar in channel_pruning.time_bars(results(**changes))]
    assert "not decided" in verdicts


def test_pilot_runs_are_no_part_of_the_study():
    pilot = made_up(accuracy.BEST, 0.1, 0.1, 0) | {"split": "val"}
    with_pilot = results()
    with_pilot["runs"].append(pilot)
    assert channel_pruning.lead(with_pilot) == pytest.approx(1.0)


def test_no_two_arms_of_the_study_are_taken_for_each_other():
    arms = [*accuracy.ARMS, *accuracy.untuned_arms()]
    assert len(set(arms)) == len(arms)
    keys = [accuracy.job_key(job) for job in accuracy.jobs(accuracy.Settings())]
    assert len(set(keys)) == len(keys) == len(accuracy.SEEDS) * len(arms)


@pytest.mark.parametrize(
    "arm",
    [
        pytest.param(accuracy.TORCH_PRUNING, marks=pytest.mark.slow),
        accuracy.TORCH_PRUNING_INSIDE,
    ],
)
def test_torch_pruning_is_driven_to_the_same_multiply_adds(arm):
    torch.manual_seed(0)
    network = build_model("resnet20", 10)
    dense = count_macs(network, accuracy.EXAMPLE)
    accuracy.cut_by_torch_pruning(network, arm, accuracy.Settings())
    assert 0.48 < count_macs(network, accuracy.EXAMPLE) / dense <= 0.5 * 1.02
    assert (network.conv1.out_channels == 16) == (not arm.whole)
    assert all(module.training for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_torch_pruning_reads_padded_shortcuts_as_the_results_page_says():
    network = build_model("resnet20", 10)
    graph = torch_pruning.DependencyGraph().build_dependency(network, accuracy.EXAMPLE)
    group = graph.get_pruning_group(network.conv1, torch_pruning.prune_conv_out_channels, [0])
    theirs = {item.dep.target.module: list(item.idxs) for item in group}
    assert theirs[network.layer2[0].conv2] == [0]

    # A picture in channel 0 of the stem alone comes out of the padded shortcut in channel 8.
    block = network.layer2[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)
    stream = torch.zeros(1, 16, 8, 8)
    stream[:, 0] = 1
    assert block(stream).sum(dim=(0, 2, 3)).nonzero().flatten().tolist() == [8]
    groups = find_channel_groups(network, lambda m: m(torch.zeros(2, 3, 32, 32)))
    (ours,) = (
        a for a in groups.axes_of("conv1") if (a.tensor, a.dim) == ("layer2.0.conv2.weight", 0)
    )
    assert ours.channels[8] == 0


@pytest.mark.parametrize("reconstruct", [False, True])
def test_our_callback_is_what_the_arm_says(reconstruct):
    arm = replace(accuracy.BEST, reconstruct=reconstruct)
    (callback,) = accuracy.our_callback(arm, accuracy.Settings())
    assert callback.goal.target_macs_ratio == accuracy.TARGET
    assert callback.goal.allocation == arm.allocation
    assert callback.reconstruct == reconstruct
    assert bool(callback.ignored_layers) == (not arm.whole)
