import pytest
import torch
from torch import Tensor, nn

from lit_compress.measure.memory import peak_memory_bytes

SLACK = 256  # scalars that become tensors


def test_the_peak_is_that_of_what_lives_at_once() -> None:
    def frees_early(x: Tensor) -> Tensor:  # at most two of size x besides x
        for _ in range(5):
            x = x + x
        return x

    def keeps_all(x: Tensor) -> list[Tensor]:
        return [x + x for _ in range(5)]

    x = torch.zeros(10_000)
    assert 0 <= peak_memory_bytes(frees_early, x) - 2 * 40_000 <= SLACK
    assert 0 <= peak_memory_bytes(keeps_all, x) - 5 * 40_000 <= SLACK


def test_weights_and_inputs_are_not_counted() -> None:
    model, x = nn.Linear(1000, 10), torch.zeros(8, 1000)
    assert 0 <= peak_memory_bytes(model, x) - 8 * 10 * 4 <= SLACK
    assert model.training


def test_a_call_that_allocates_nothing() -> None:
    assert peak_memory_bytes(lambda x: x, torch.zeros(3)) == 0


def test_an_error_comes_with_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"Linear raised RuntimeError .*\(2, 5\) float32"):
        peak_memory_bytes(nn.Linear(3, 3), torch.zeros(2, 5))


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"on meta; peak memory can be measured on the CPU and"):
        peak_memory_bytes(nn.Linear(3, 3, device="meta"), torch.zeros(2, 3, device="meta"))
