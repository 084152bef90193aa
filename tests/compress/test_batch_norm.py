import pytest
import torch
from torch import nn

from lit_compress.compress.batch_norm import recalibrate_batch_norm


def forward(model, batch):
    return model(batch)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.9), nn.ReLU())


def test_statistics_are_the_averages_over_batches():
    model = net()
    model(torch.randn(4, 1, 6, 6) * 50)  # statistics of something else
    batches = [torch.randn(4, 1, 6, 6) + shift for shift in (0.0, 1.0, 5.0)]
    assert recalibrate_batch_norm(model, batches, forward) == 1
    outputs = [model[0](batch).detach() for batch in batches]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variance = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    assert model[1].num_batches_tracked == 3


def test_parameters_modes_and_momentum_stay():
    model = net()
    model[1].momentum = 0.3
    model[0].eval()
    before = {k: v.clone() for k, v in model.named_parameters()}
    random = torch.get_rng_state()
    batch = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    recalibrate_batch_norm(model, [batch], forward)
    assert [m.training for m in model] == [False, True, True, True]
    assert model.training
    assert model[1].momentum == 0.3
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)  # dropout was off


def test_later_layers_see_what_earlier_ones_do_in_training():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    batch = torch.randn(64, 2) * 7 + 3
    assert recalibrate_batch_norm(model, [batch], forward) == 2
    torch.testing.assert_close(model[1].running_mean, torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(model[1].running_var, torch.full((2,), 64 / 63), atol=1e-4, rtol=0)


def test_without_statistics_there_is_nothing_to_do():
    def refuse(model, batch):
        raise AssertionError("no batch need be run")

    for layer in nn.GroupNorm(1, 3), nn.BatchNorm2d(3, track_running_stats=False):
        assert recalibrate_batch_norm(nn.Sequential(layer), [torch.ones(1)], refuse) == 0


@pytest.mark.parametrize("batches", [[], [torch.randn(2, 1, 6, 6), torch.randn(2, 7, 6, 6)]])
def test_everything_stays_when_it_fails(batches):
    model = net()
    model(torch.randn(4, 1, 6, 6))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = RuntimeError if batches else ValueError
    message = "expected input" if batches else "batches is empty, so batch norm statistics"
    with pytest.raises(expected, match=message):
        recalibrate_batch_norm(model, batches, forward)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model[1].momentum == 0.1
    assert model.training
    assert model[1].training
