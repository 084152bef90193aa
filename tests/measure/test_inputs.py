import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.measure.inputs import (
    as_call,
    device_of,
    evaluating,
    infer_batch_size,
    with_batch_size,
)


def test_each_kind_of_inputs_becomes_a_call() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2)
    assert as_call(x) == ((x,), {})
    assert as_call((x, y)) == ((x, y), {})
    assert as_call([x, 3]) == ((x, 3), {})
    assert as_call({"x": x, "flag": True}) == ((), {"x": x, "flag": True})
    assert as_call(({"x": x},)) == (({"x": x},), {})


@pytest.mark.parametrize("empty", [(), [], {}, ("text", 3), {"n": 1}])
def test_inputs_without_a_tensor_are_refused(empty: object) -> None:
    with pytest.raises(ValueError, match=r"holds no tensor.*Pass one batch"):
        as_call(empty)  # type: ignore[arg-type]


def test_inputs_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"is int; expected a tensor, a tuple.*a dict"):
        as_call(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (0, 3, 8, 8)])
def test_a_batch_without_an_example_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"has shape \(.*expected a batch of at least one"):
        infer_batch_size(torch.zeros(shape))


@settings(deadline=None, max_examples=25)
@given(present=st.integers(1, 5), wanted=st.integers(1, 9))
def test_resizing_repeats_or_cuts_every_batched_tensor(present: int, wanted: int) -> None:
    x = torch.arange(present * 2).reshape(present, 2)
    table = torch.zeros(present + 1, 4)  # another first dimension: not a batch
    resized = with_batch_size({"x": x, "pair": (x, "text"), "table": table}, wanted)
    assert isinstance(resized, dict)
    assert resized["x"].tolist() == [x[i % present].tolist() for i in range(wanted)]
    assert torch.equal(resized["pair"][0], resized["x"])
    assert resized["pair"][1] == "text"
    assert resized["table"] is table


def test_resizing_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=0; expected at least 1"):
        with_batch_size(torch.zeros(2, 3), 0)


def test_every_mode_comes_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    model[2].eval()
    modes = []

    def fail() -> None:
        with evaluating(model):
            modes.extend(module.training for module in model.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert modes == [False] * 4
    assert [module.training for module in model.modules()] == [True, True, True, False]


def test_the_device_is_that_of_the_model_or_the_inputs() -> None:
    assert device_of(nn.Linear(2, 2), torch.zeros(1, 2)).type == "cpu"
    assert device_of(nn.Linear(2, 2, device="meta"), torch.zeros(1, 2)).type == "meta"
    assert device_of(len, torch.zeros(1, 2, device="meta")).type == "meta"
