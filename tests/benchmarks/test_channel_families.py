"""Half of the channels of well-known networks: the slim network is right, and so are the rows."""

import copy

import pytest
import torch
from channel_families import FAMILIES, build, prune, read_results
from torch import nn

from lit_compress.compress.channels.cut import cut_channels
from lit_compress.compress.channels.groups import take
from lit_compress.compress.channels.tracing import find_channel_groups
from lit_compress.compress.channels.trial import tensors_in
from lit_compress.measure import count_params
from tests.compress.cut_checks import random_keep, silence, tensors_of

ATTENTION = ("torchvision vit_b_16", "torchvision swin_t")
FAST = ("resnet20", "plain20", "mobilenet_v1", "digits_cnn")
EACH_FAMILY = [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in FAMILIES]


def outputs(family, model):
    """All numbers that the network gives, before detections are chosen among them."""
    model.eval()
    with torch.no_grad():
        if not family.detects:
            return tensors_in(family.run(model))
        images, _ = model.transform(*family.inputs())
        features = list(model.backbone(images.tensors).values())
        return tensors_in(model.head(features))


def normed(model, groups, name):
    """Whether a norm over channels reads the group: it is not the same with zeros among them."""
    owners = [axis.tensor.rpartition(".")[0] for axis in groups.axes_of(name)]
    return any(isinstance(model.get_submodule(owner), nn.LayerNorm) for owner in owners)


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_half_of_the_channels_go_as_planned_and_committed(name):
    family = FAMILIES[name]
    pruned = prune(family)
    dense, slim = pruned.dense, pruned.slim

    committed = read_results()[name]
    assert pruned.row() == {key: value for key, value in committed.items() if key != "seconds"}
    macs, num_params = pruned.planned()
    assert num_params == count_params(slim)
    # Products of queries, keys and values shrink less than the weights by which it is planned.
    assert pruned.macs(slim) == pytest.approx(macs, rel=0.05 if name in ATTENTION else 0.01)

    kept, after = pruned.groups.kept_indices(pruned.keep), tensors_of(slim)
    for tensor, before in tensors_of(dense).items():
        assert torch.equal(after[tensor], take(before, kept.get(tensor, {}))), tensor

    shapes = [t.shape for t in outputs(family, dense)]
    assert [t.shape for t in outputs(family, slim)] == shapes
    dense.train()
    slim.train()
    given = tensors_in(family.run(slim))
    assert [t.shape for t in given] == [t.shape for t in tensors_in(family.run(dense))]
    sum(t.square().mean() for t in given).backward()
    for parameter_name, parameter in slim.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_the_slim_network_computes_what_the_dense_one_does_without_those_channels(name):
    family = FAMILIES[name]
    dense = build(family)
    groups = find_channel_groups(dense, family.run)
    leave = [group.name for group in groups.groups if normed(dense, groups, group.name)]
    assert len(leave) <= len(groups.groups) / 2
    keep = random_keep(groups, leave)
    slim = copy.deepcopy(dense)
    cut_channels(slim, groups, keep)
    complete = outputs(family, dense)
    silence(dense, groups, keep)
    silent = outputs(family, dense)
    for expected, found, before in zip(silent, outputs(family, slim), complete, strict=True):
        scale = expected.abs().max()
        assert (expected - found).abs().max() <= 1e-4 * scale
        assert (expected - before).abs().max() > 1e-2 * scale


def test_every_family_is_in_the_committed_results():
    assert list(read_results()) == list(FAMILIES)


def test_no_family_takes_longer_than_its_bar():
    assert max(row["seconds"] for row in read_results().values()) < 20
