import io

import pytest
import torch
from torch import nn

from lit_compress.compress.sparsity.masked_weights import MaskedWeights
from lit_compress.compress.sparsity.patterns import NofM


def weights_of(values):
    return {"w": nn.Parameter(torch.tensor([values]))}


def roundtrip(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_removed_weights_come_back_with_their_old_value():
    params = weights_of([1.0, 2.0, 3.0, 4.0])
    masked = MaskedWeights(params)
    masked.update({"w": 2})
    assert params["w"].tolist() == [[0.0, 0.0, 3.0, 4.0]]
    params["w"].data[0, 3] = 0.5  # training shrinks a kept weight below a removed one
    masked.update({"w": 2})
    assert params["w"].tolist() == [[0.0, 2.0, 3.0, 0.0]]
    params["w"].data[0, 2] = 0.1
    masked.update({"w": 2})
    assert params["w"].tolist() == [[1.0, 2.0, 0.0, 0.0]]


def test_settled_masks_stay():
    params = weights_of([1.0, 2.0])
    masked = MaskedWeights(params)
    masked.update({"w": 1})
    masked.settle()
    assert masked.is_settled
    with pytest.raises(RuntimeError, match="settled"):
        masked.update({"w": 1})
    masked.reopen()
    masked.update({"w": 0})
    assert params["w"].tolist() == [[0.0, 2.0]]


def test_weights_and_gradients_are_masked_in_place():
    params = weights_of([1.0, -2.0, 3.0])
    masked = MaskedWeights(params)
    masked.update({"w": 2})
    params["w"].data.fill_(-5.0)
    params["w"].grad = torch.full((1, 3), 7.0)
    masked.apply()
    masked.apply_to_gradients()
    assert params["w"].tolist() == [[0.0, 0.0, -5.0]]
    assert params["w"].grad.tolist() == [[0.0, 0.0, 7.0]]


def test_clear_leaves_positive_zeros():
    params = weights_of([-1.0, -2.0])
    masked = MaskedWeights(params)
    masked.update({"w": 1})
    params["w"].data.fill_(-5.0)
    masked.apply()
    assert torch.signbit(params["w"])[0, 0]
    masked.clear()
    assert not torch.signbit(params["w"])[0, 0]


def test_copies_are_masked_by_name_whatever_their_dtype():
    masked = MaskedWeights(weights_of([1.0, 2.0]))
    masked.update({"w": 1})
    average = {"w": torch.ones(1, 2, dtype=torch.float64), "other": torch.ones(2)}
    masked.apply_to_copy(average)
    assert average["w"].tolist() == [[0.0, 1.0]]
    assert average["other"].tolist() == [1.0, 1.0]


def test_memory_formats_are_kept():
    weight = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    masked = MaskedWeights({"w": weight})
    masked.update({"w": 100})
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert masked.masks["w"].stride() == weight.stride()
    assert int((weight == 0).sum()) == 100


def test_processes_agree_on_what_one_of_them_decides():
    ours, theirs = weights_of([1.0, 2.0]), weights_of([2.0, 1.0])
    decided = {}
    MaskedWeights(theirs).update({"w": 1}, agree=lambda packed: decided.update(packed) or packed)
    MaskedWeights(ours).update({"w": 1}, agree=lambda _: decided)
    assert (ours["w"] == 0).tolist() == (theirs["w"] == 0).tolist() == [[False, True]]


@pytest.mark.parametrize("settled", [False, True])
def test_the_state_comes_back_without_pickles(settled):
    params = weights_of([1.0, 2.0, 3.0, 4.0])
    masked = MaskedWeights(params)
    masked.update({"w": 2})
    if settled:
        masked.settle()
    copy = {"w": nn.Parameter(params["w"].detach().clone())}
    restored = MaskedWeights(copy)
    restored.load_state_dict(roundtrip(masked.state_dict()))
    assert restored.is_settled == settled
    assert restored.sparsity() == 0.5
    if not settled:
        for twin in (masked, restored):
            twin.parameters["w"].data[0, 3] = 0.5
            twin.update({"w": 2})
        assert copy["w"].tolist() == params["w"].tolist() == [[0.0, 2.0, 3.0, 0.0]]


def test_a_foreign_state_is_refused_with_the_first_mismatch():
    state = MaskedWeights(weights_of([1.0, 2.0])).state_dict()
    with pytest.raises(ValueError, match=r"'w' has shape \[1, 2\] in the checkpoint and \[1, 3\]"):
        MaskedWeights(weights_of([1.0, 2.0, 3.0])).load_state_dict(state)
    with pytest.raises(ValueError, match=r"'v' has shape None in the checkpoint and \[2\] here"):
        MaskedWeights({"v": nn.Parameter(torch.ones(2))}).load_state_dict(state)
    with pytest.raises(ValueError, match="pattern 'unstructured', this run's '2:4'"):
        MaskedWeights({"w": nn.Parameter(torch.ones(1, 4))}, NofM(2, 4)).load_state_dict(state)
