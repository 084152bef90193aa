import pytest
import torch
from torch import nn

from lit_compress.measure.shadow import meta_shadow, real_shadow


class Keeper(nn.Module):
    """A module that keeps what a forward gives it in every way a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[torch.Tensor] = []
        self.by_name: dict[str, list[torch.Tensor]] = {"all": []}
        self.last: torch.Tensor | None = None
        self.outside = object()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1  # type: ignore[operator]
        self.seen.append(x)
        self.by_name["all"].append(x)
        self.last = self.linear(x)
        return self.last


@pytest.mark.parametrize("make", [meta_shadow, real_shadow])
def test_what_a_forward_stores_stays_in_the_shadow(make) -> None:
    model = Keeper()
    shadow = make(model)
    device = shadow.model.linear.weight.device
    shadow.model(torch.zeros(2, 3, device=device))
    assert len(shadow.model.seen) == 1
    assert (model.seen, model.by_name, model.last) == ([], {"all": []}, None)
    assert model.calls == 0
    assert model.training
    assert model.linear.training
    assert not shadow.model.linear.training
    assert shadow.model.outside is model.outside


def test_a_meta_shadow_has_the_shapes_and_no_memory() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    shadow = meta_shadow(model).model
    for name, tensor in model.state_dict().items():
        copy = shadow.state_dict()[name]
        assert (copy.shape, copy.dtype, copy.device.type) == (tensor.shape, tensor.dtype, "meta")


def test_a_real_shadow_computes_with_the_models_own_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    shadow = real_shadow(model).model
    x = torch.randn(4, 3)
    assert torch.equal(shadow(x), model(x))
    assert shadow[0].weight is model[0].weight  # type: ignore[index]


def test_sharing_and_cycles_are_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.parent = [model]  # type: ignore[assignment]
    shadow = meta_shadow(model).model
    assert shadow[0].weight is shadow[1].weight  # type: ignore[index]
    assert shadow.parent[0] is shadow  # type: ignore[index]


def test_lstm_weights_are_the_shadows_own() -> None:
    model = nn.LSTM(2, 3)
    before = [id(weight) for weight in model._flat_weights]
    shadow = meta_shadow(model).model
    assert all(weight.is_meta for weight in shadow._flat_weights)  # type: ignore[union-attr]
    assert shadow._flat_weights[0] is shadow.weight_ih_l0  # type: ignore[index]
    assert [id(weight) for weight in model._flat_weights] == before


def test_hooks_do_not_run_on_a_shadow() -> None:
    model, calls = nn.Linear(2, 2), []
    model.register_forward_hook(lambda *args: calls.append(args))
    model.register_forward_pre_hook(lambda *args: calls.append(args))
    meta_shadow(model).model(torch.zeros(1, 2, device="meta"))
    assert calls == []
    model(torch.zeros(1, 2))
    assert len(calls) == 2


def test_names_are_those_of_the_original() -> None:
    model = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Sequential(nn.Linear(2, 2))))
    shadow = meta_shadow(model)
    assert shadow.name_of(shadow.model) == ""
    assert shadow.name_of(shadow.model[0]) == "0"  # type: ignore[index]
    assert shadow.name_of(shadow.model[1][0]) == "1._orig_mod.0"  # type: ignore[index]
    assert shadow.name_of(nn.Linear(2, 2)) is None
