import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_compress.measure import latency
from lit_compress.measure.latency import compare_latency, measure_latency


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only the timed functions move: ``clock[0] += seconds``."""
    now = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    return now


def test_median_and_spread_are_those_of_the_calls(clock: list[float]) -> None:
    durations = iter([9.0, 9.0, *(float(i) for i in range(1, 12))])  # a trial, a warm-up, 1 to 11

    def call(_: Tensor) -> None:
        clock[0] += next(durations) / 1e3

    (result,) = measure_latency(call, torch.zeros(4, 1), warmup=1, repeats=11)
    assert result.median_ms == pytest.approx(6)
    assert result.iqr_ms == pytest.approx(5)
    assert (result.p10_ms, result.p90_ms) == (pytest.approx(2), pytest.approx(10))
    assert (result.repeats, result.batch_size, result.device) == (11, 4, "cpu")
    assert result.throughput == pytest.approx(4 / 6e-3)
    assert str(result).startswith("6.000 ms (10-90 %: 2.000-10.000, 11 repeats, ")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=20), st.floats(0, 1))
def test_quantiles_agree_with_torch(values: list[float], fraction: float) -> None:
    expected = torch.quantile(torch.tensor(values, dtype=torch.float64), fraction).item()
    assert latency._quantile(values, fraction) == pytest.approx(expected)


def test_sleep_takes_its_time() -> None:
    (result,) = measure_latency(lambda _: time.sleep(0.01), torch.zeros(1), warmup=0, repeats=3)
    assert 10 <= result.p10_ms <= result.median_ms <= result.p90_ms


def test_every_thread_count_and_batch_size_is_measured_and_restored() -> None:
    seen: list[tuple[int, int]] = []
    before = torch.get_num_threads()

    def call(x: Tensor) -> None:
        seen.append((x.shape[0], torch.get_num_threads()))

    results = measure_latency(
        call, torch.zeros(2, 3), warmup=1, repeats=2, num_threads=[1, 2], batch_sizes=[1, 4]
    )
    pairs = [(1, 1), (1, 2), (4, 1), (4, 2)]
    assert [(r.batch_size, r.num_threads) for r in results] == pairs
    assert seen == [pair for pair in pairs for _ in range(4)]  # a trial, a warm-up, two repeats
    assert torch.get_num_threads() == before


def test_threads_come_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match=r"Linear raised RuntimeError .*\(2, 5\) float32"):
        measure_latency(nn.Linear(3, 3), torch.zeros(2, 5), num_threads=before + 1)
    assert torch.get_num_threads() == before


def test_modules_run_in_evaluation_mode_without_gradients() -> None:
    seen = []

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return x.add_(1)

    model, x = Probe(), torch.zeros(1)
    measure_latency(model, x, warmup=0, repeats=1)
    assert set(seen) == {(False, False, False)}
    assert model.training
    assert x == 0


def test_functions_run_as_they_are() -> None:
    seen = []
    measure_latency(
        lambda x: seen.append(torch.is_grad_enabled()), torch.zeros(1), warmup=0, repeats=1
    )
    assert seen == [True, True]


def test_a_minimum_duration_adds_repeats(clock: list[float]) -> None:
    def call(_: Tensor) -> None:
        clock[0] += 0.1

    (result,) = measure_latency(call, torch.zeros(1), warmup=0, repeats=2, min_duration_s=0.95)
    assert result.repeats == 10


def test_the_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(str(device)))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    monkeypatch.setattr(latency, "device_of", lambda *_: torch.device("cuda", 1))
    (result,) = measure_latency(lambda x: x, torch.zeros(1), warmup=0, repeats=1)
    assert waited == ["cuda:1"] * 4  # before and after the trial and the timed call
    assert result.device == "cuda:1"
    latency.synchronize(torch.device("mps"))
    assert waited[-1] == "mps"


def test_a_comparison_takes_turns(clock: list[float]) -> None:
    order: list[str] = []

    def a(_: Tensor) -> None:
        order.append("a")
        clock[0] += 0.004

    def b(_: Tensor) -> None:
        order.append("b")
        clock[0] += 0.001

    result = compare_latency(a, b, torch.zeros(1), warmup=1, repeats=3)
    assert "".join(order) == "ab" + "ab" + "abbaab"
    assert result.ratio == pytest.approx(0.25)
    assert result.ratio_p10 == pytest.approx(result.ratio_p90)
    assert (result.a.median_ms, result.b.median_ms) == (pytest.approx(4), pytest.approx(1))
    assert result.a.repeats == result.b.repeats == 3


def test_a_drifting_machine_does_not_favour_either(clock: list[float]) -> None:
    slowness = [1.0]

    def call(_: Tensor) -> None:
        slowness[0] += 0.01
        clock[0] += slowness[0]

    result = compare_latency(call, call, torch.zeros(1), warmup=0, repeats=20)
    assert result.ratio == pytest.approx(1, abs=0.005)
    assert result.ratio_p10 < 1 < result.ratio_p90


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, r"warmup=-1; expected at least 0"),
        ({"repeats": 0}, r"repeats=0; expected at least 1"),
        ({"num_threads": 0}, r"num_threads=0; expected at least one number, each at least 1"),
        ({"min_duration_s": -1.0}, r"min_duration_s=-1.0; expected a finite number"),
        ({"min_duration_s": float("inf")}, r"min_duration_s=inf; expected a finite number"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_latency(nn.Linear(2, 2), torch.zeros(1, 2), **options)
    with pytest.raises(ValueError, match=message):
        compare_latency(nn.Linear(2, 2), nn.Linear(2, 2), torch.zeros(1, 2), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_threads": []}, r"num_threads=\[\]; expected at least one number"),
        ({"batch_sizes": [1, 0]}, r"batch_sizes=\[1, 0\]; expected at least one number, each"),
    ],
)
def test_lists_out_of_range_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_latency(nn.Linear(2, 2), torch.zeros(1, 2), **options)


def test_empty_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="holds no tensor"):
        measure_latency(nn.Linear(2, 2), ())
    with pytest.raises(ValueError, match="expected a batch of at least one example"):
        compare_latency(nn.Linear(2, 2), nn.Linear(2, 2), torch.zeros(0, 2))
