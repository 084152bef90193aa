import pytest
import torch
from torch import nn

from lit_compress.measure.complexity import count_macs, count_params
from lit_compress.measure.latency import LatencyResult
from lit_compress.measure.measures import measure_model
from lit_compress.measure.memory import peak_memory_bytes
from lit_compress.measure.size import saved_sizes


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))


def test_without_inputs_only_what_the_weights_say_is_known() -> None:
    model = small_model()
    with torch.no_grad():
        model[3].weight[0] = 0  # type: ignore[index]
    measures = measure_model(model, metrics={"top1": torch.tensor(0.5)})  # type: ignore[dict-item]
    assert measures.name == "Sequential"
    assert measures.num_params == count_params(model)
    assert measures.sparsity == pytest.approx(144 / (108 + 288))
    assert (measures.size_bytes, measures.compressed_size_bytes) == saved_sizes(model)
    assert (measures.macs, measures.latency, measures.peak_memory_bytes) == (None, None, None)
    assert {layer.macs for layer in measures.layers} == {None}
    assert measures.metrics == {"top1": 0.5}
    assert type(measures.metrics["top1"]) is float


def test_with_inputs_everything_asked_for_is_known() -> None:
    model, x = small_model(), torch.zeros(2, 3, 8, 8)
    measures = measure_model(model, x, name="small", latency=True, peak_memory=True)
    assert measures.name == "small"
    assert measures.macs == count_macs(model, x) == sum(row.macs or 0 for row in measures.layers)
    assert measures.latency is not None
    assert [result.batch_size for result in measures.latency] == [2]
    assert measures.peak_memory_bytes == peak_memory_bytes(model, x)
    quick = measure_model(model, x)
    assert (quick.latency, quick.peak_memory_bytes) == (None, None)


def test_latency_measured_elsewhere_is_kept() -> None:
    times = [LatencyResult(1.0, 0.1, 0.9, 1.1, 5, 2, 1, "cpu")]
    assert measure_model(small_model(), latency=times).latency == tuple(times)


@pytest.mark.parametrize("asked", [{"latency": True}, {"peak_memory": True}])
def test_times_and_memory_need_inputs(asked: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=r"without example_inputs; expected one batch.*Pass"):
        measure_model(small_model(), **asked)


def test_a_model_without_weights_has_no_sparsity() -> None:
    assert measure_model(nn.ReLU()).sparsity is None
