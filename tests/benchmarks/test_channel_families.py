"""Half of the channels of well-known networks: the slim network is right, and so is the table."""

import copy

import channel_families
import pytest
import torch
from channel_families import FAMILIES, prune, read_results
from torch import nn

from lit_compress.compress.channel_cut import cut_channels
from lit_compress.compress.channel_groups import take
from lit_compress.compress.channel_trial import tensors_in
from lit_compress.measure import count_params

SLOW = ["torchvision vgg16_bn", "torchvision vit_b_16"]
LARGE = {*SLOW, "torchvision ssdlite320_mobilenet_v3_large"}
ATTENTION = {"torchvision vit_b_16", "torchvision swin_t"}


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def silence(model, groups, keep):
    """Zeros in place of what makes the channels that are not kept."""
    own = tensors(model)
    with torch.no_grad():
        for axis in groups.axes:
            gone = (axis.channels >= 0) & ~keep[axis.channels.clamp(min=0)]
            if axis.role != "in":
                own[axis.tensor].index_fill_(axis.dim, gone.nonzero().flatten(), 0.0)


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
    """Whether a norm over channels reads the group, which then is not the same with zeros."""
    owners = [axis.tensor.rpartition(".")[0] for axis in groups.axes_of(name)]
    kinds = (nn.LayerNorm, nn.GroupNorm)
    return any(isinstance(model.get_submodule(owner), kinds) for owner in owners)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_the_channels_go(name):
    family = FAMILIES[name]
    pruned = prune(family)
    groups, dense, slim = pruned.groups, pruned.dense, pruned.slim

    row = pruned.row()
    committed = read_results()[name]
    assert row == {key: value for key, value in committed.items() if key != "seconds"}
    macs, num_params = pruned.planned()
    assert num_params == count_params(slim)
    # Products of queries, keys and values shrink less than the weights by which it is planned.
    assert pruned.macs(slim) == pytest.approx(macs, rel=0.05 if name in ATTENTION else 0.01)

    kept, after = groups.kept_indices(pruned.keep), tensors(slim)
    for tensor, before in tensors(dense).items():
        assert torch.equal(after[tensor], take(before, kept.get(tensor, {}))), tensor

    slim.train()
    given = [t for t in tensors_in(family.run(slim)) if t.requires_grad]
    dense.train()
    assert [t.shape for t in given] == [
        t.shape for t in tensors_in(family.run(dense)) if t.requires_grad
    ]
    sum(t.square().mean() for t in given).backward()
    unreached = {layer.layer for layer in groups.left_alone if "not reached" in layer.reason}
    for parameter_name, parameter in slim.named_parameters():
        assert parameter.grad is not None or parameter_name.rpartition(".")[0] in unreached
        assert parameter.grad is None or parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", FAMILIES)
def test_the_slim_network_computes_what_the_dense_one_does_without_those_channels(name):
    family = FAMILIES[name]
    dense = channel_families.build(family)
    groups = channel_families.find_channel_groups(dense, family.run)
    keep = torch.ones(groups.num_channels, dtype=torch.bool)
    chosen = [g for g in groups.groups if not normed(dense, groups, g.name)]
    assert len(chosen) >= min(3, len(groups.groups) - 1)
    for group in chosen:
        for block in keep[groups.span(group.name)].view(group.num_blocks, -1):
            block[torch.randperm(len(block))[: len(block) // 2]] = False
    slim = copy.deepcopy(dense)
    cut_channels(slim, groups, keep)
    complete = outputs(family, dense)
    silence(dense, groups, keep)
    for expected, found, before in zip(
        outputs(family, dense), outputs(family, slim), complete, strict=True
    ):
        scale = expected.abs().max()
        assert (expected - found).abs().max() <= 1e-4 * scale
        assert (expected - before).abs().max() > 1e-2 * scale


def test_every_family_is_in_the_table():
    assert list(read_results()) == list(FAMILIES)
    assert channel_families.table(read_results()).count("\n") == len(FAMILIES) + 1
