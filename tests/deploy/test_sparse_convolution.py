"""The sparse kernel gives what the dense one gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.deploy.sparse_convolution import SparsePointwiseConv2d, use_sparse_kernels
from tests.deploy.nets import images


def sparse_conv(inputs, outputs, sparsity, **kwargs):
    layer = nn.Conv2d(inputs, outputs, 1, **kwargs)
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) >= sparsity)
    return layer


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3), inputs=st.integers(1, 9), outputs=st.integers(1, 9),
    stride=st.sampled_from([1, 2, (1, 2)]), bias=st.booleans(), size=st.integers(1, 7),
    sparsity=st.sampled_from([0.0, 0.8, 1.0]), seed=st.integers(0, 100),
)  # fmt: skip
def test_it_is_the_same_function(batch, inputs, outputs, stride, bias, size, sparsity, seed):
    torch.manual_seed(seed)
    layer = sparse_conv(inputs, outputs, sparsity, stride=stride, bias=bias)
    x = torch.randn(batch, inputs, size, size + 1)
    with torch.no_grad():
        expected, got = layer(x), SparsePointwiseConv2d(layer)(x)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, atol=1e-5)


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        sparse_conv(16, 32, 0.9),
        nn.ReLU(),
        nn.Sequential(sparse_conv(32, 32, 0.9, stride=2), sparse_conv(32, 16, 0.5)),
        sparse_conv(16, 16, 0.9, groups=4),
        sparse_conv(16, 8, 0.9, padding=1),
    ).eval()


def test_layers_above_the_threshold_are_replaced_in_a_copy():
    net, x = make_net(), images()
    sparse, replaced = use_sparse_kernels(net)
    assert replaced == ("1", "3.0")
    assert type(net[1]) is nn.Conv2d
    assert isinstance(sparse[3][0], SparsePointwiseConv2d)
    with torch.no_grad():
        assert torch.allclose(sparse(x), net(x), atol=1e-5)
    assert use_sparse_kernels(net, threshold=0.3)[1] == ("1", "3.0", "3.1")


def test_a_copy_moves_and_prints():
    sparse, _ = use_sparse_kernels(make_net())
    assert "16, 32, stride=(1, 1), sparsity=0.8" in repr(sparse[1])
    again = make_net()
    again, _ = use_sparse_kernels(again, threshold=0.75)
    again.load_state_dict(sparse.state_dict())
    x = images()
    with torch.no_grad():
        assert torch.equal(again(x), sparse(x))


@pytest.mark.parametrize("threshold", [1.0, -0.1, "0.5", True])
def test_threshold_out_of_range(threshold):
    with pytest.raises(ValueError, match="threshold=.*in \\[0, 1\\)"):
        use_sparse_kernels(make_net(), threshold)


def test_weights_elsewhere_are_refused():
    net = nn.Sequential(sparse_conv(4, 4, 0.9).to("meta"))
    with pytest.raises(ValueError, match="weight of '0' is on meta.*Move the network"):
        use_sparse_kernels(net)
