import copy

import pytest
import torch
from torch import nn

from lit_compress.compress.sparsity.copies import SparseCopies
from lit_compress.compress.sparsity.magnitude import magnitude_masks


class Residual(nn.Module):
    """Two convolutions around a shortcut, a grouped one, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (x + self.conv(x)).relu()
        return self.head(self.grouped(x).relu().mean((2, 3)))


LAYERS = ("stem", "conv", "grouped", "head")
DENSITIES = {"stem": 0.5, "conv": 0.2, "grouped": 0.3, "head": 0.4}


def forward(network, batch):
    return network(batch)


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = Residual()
    network(torch.randn(64, 2, 6, 6))  # running statistics
    return network.eval()


@pytest.fixture
def batches():
    return list(torch.randn(3, 32, 2, 6, 6, generator=torch.Generator().manual_seed(1)))


def masks_of(network, densities):
    weights = {layer: network.get_submodule(layer).weight.detach() for layer in densities}
    zeros = {n: w.numel() - round(densities[n] * w.numel()) for n, w in weights.items()}
    return magnitude_masks(weights, zeros)


def test_zeros_are_exact_and_where_magnitudes_are_least(network, batches):
    copies = SparseCopies(network, LAYERS)
    for gathered in (False, True):
        if gathered:
            copies.gather(batches, forward)
        sparse = copies(DENSITIES)
        for layer, mask in masks_of(network, DENSITIES).items():
            weight = sparse.get_submodule(layer).weight
            assert torch.equal(weight != 0, mask)
            kept = torch.equal(weight[mask], network.get_submodule(layer).weight[mask])
            # Only the solved layers differ from the dense weights.
            assert kept == (not gathered or layer == "grouped")


def test_each_solved_layer_is_nearer_to_its_dense_output(network, batches):
    plain = SparseCopies(network, LAYERS)(DENSITIES)
    copies = SparseCopies(network, LAYERS)
    copies.gather(batches, forward, num_points=36)
    solved = copies(DENSITIES)
    seen = {}
    for layer in LAYERS:
        network.get_submodule(layer).register_forward_hook(
            lambda module, args, y, layer=layer: seen.__setitem__(layer, (args[0], y))
        )
    with torch.no_grad():
        network(torch.cat(batches))
        for layer in ("stem", "conv", "head"):
            x, y = seen[layer]
            errors = [
                float((model.get_submodule(layer)(x) - y).square().sum())
                for model in (plain, solved)
            ]
            assert errors[1] < (1.0 if layer == "stem" else 0.95) * errors[0], layer


def test_the_dense_network_stays_and_copies_share_nothing_with_it(network, batches):
    before = copy.deepcopy(network.state_dict())
    copies = SparseCopies(network, LAYERS)
    copies.gather(batches, forward, num_batch_norm_batches=1)
    sparse = copies(DENSITIES)
    with torch.no_grad():
        for tensor in (*sparse.parameters(), *sparse.buffers()):
            tensor.zero_()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not network.training
    again = copies(DENSITIES)  # what is kept between copies was not touched either
    assert again.conv.weight.count_nonzero() > 0


def test_solved_layers_are_kept_and_do_not_depend_on_the_others(network, batches, monkeypatch):
    copies = SparseCopies(network, LAYERS)
    copies.gather(batches, forward)
    first = copies({"stem": 0.5, "conv": 0.2})
    solved = []
    monkeypatch.setattr(
        "lit_compress.compress.channels.normal_equations.NormalEquations.solve_masked",
        lambda self, weight, bias, mask, **_: solved.append(weight.shape) or (weight * mask, bias),
    )
    second = copies({"stem": 0.9, "conv": 0.2})
    assert solved == [(6, 18)]  # the stem alone
    assert torch.equal(first.conv.weight, second.conv.weight)
    assert copies({"head": 1.0}).head.weight.equal(network.head.weight)
    assert len(solved) == 1


def test_batch_norm_statistics_are_computed_anew_if_asked(network, batches):
    copies = SparseCopies(network, LAYERS)
    copies.gather(batches, forward)
    assert torch.equal(copies(DENSITIES).norm.running_mean, network.norm.running_mean)
    copies.gather(iter(batches), forward, num_batch_norm_batches=2)
    sparse = copies(DENSITIES)
    with torch.no_grad():
        means = [sparse.stem(batch).mean((0, 2, 3)) for batch in batches[:2]]
    torch.testing.assert_close(sparse.norm.running_mean, (means[0] + means[1]) / 2)
    assert not sparse.training


def test_a_copy_of_grouped_layers_alone_keeps_their_values(network, batches):
    copies = SparseCopies(network, ["grouped"])
    copies.gather(batches, forward)
    mask = masks_of(network, {"grouped": 0.5})["grouped"]
    assert torch.equal(copies({"grouped": 0.5}).grouped.weight, network.grouped.weight * mask)


def test_bad_arguments_are_refused(network, batches):
    copies = SparseCopies(network, ["stem"])
    with pytest.raises(ValueError, match="densities names 'conv'; expected layers among 'stem'"):
        copies({"conv": 0.5})
    for density in (0.0, 1.5, float("nan")):
        with pytest.raises(
            ValueError, match=r"the density of 'stem' is .*, expected .* in \(0, 1\]"
        ):
            copies({"stem": density})
    with pytest.raises(ValueError, match="num_batch_norm_batches is -1, expected at least 0"):
        copies.gather(batches, forward, num_batch_norm_batches=-1)
    with pytest.raises(ValueError, match="batches is empty"):
        copies.gather([], forward)
