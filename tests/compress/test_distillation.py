import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lit_compress.compress.distillation import (
    attention_transfer,
    feature_mse,
    soft_cross_entropy,
    soft_target_kl,
)

shapes = st.tuples(
    st.integers(1, 4), st.integers(1, 5), st.lists(st.integers(1, 3), max_size=2)
).map(lambda parts: (parts[0], parts[1], *parts[2]))
temperatures = st.floats(0.25, 20.0)
seeds = st.integers(0, 2**16)
examples = settings(max_examples=40, deadline=None)


def two(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) * 3 for _ in range(2)]


@given(shapes, temperatures, seeds)
@examples
def test_kl_is_the_divergence_written_out_class_by_class(shape, temperature, seed):
    student, teacher = two(shape, seed)
    rows_s = student.movedim(1, -1).reshape(-1, shape[1])
    rows_t = teacher.movedim(1, -1).reshape(-1, shape[1])
    total = 0.0
    for row_s, row_t in zip(rows_s.tolist(), rows_t.tolist(), strict=True):
        norm_s = sum(math.exp(z / temperature) for z in row_s)
        norm_t = sum(math.exp(z / temperature) for z in row_t)
        for z_s, z_t in zip(row_s, row_t, strict=True):
            p_s, p_t = math.exp(z_s / temperature) / norm_s, math.exp(z_t / temperature) / norm_t
            total += p_t * math.log(p_t / p_s)
    expected = temperature**2 * total / len(rows_s)
    assert soft_target_kl(student, teacher, temperature).item() == pytest.approx(expected, abs=1e-8)


@given(shapes, temperatures, seeds)
@examples
def test_kl_is_zero_at_the_teacher_and_nowhere_negative(shape, temperature, seed):
    student, teacher = two(shape, seed)
    assert soft_target_kl(teacher, teacher, temperature) == 0
    assert soft_target_kl(student, teacher, temperature) >= -1e-12


@given(shapes, temperatures, seeds)
@examples
def test_the_two_losses_differ_by_the_entropy_of_the_teacher_and_the_factor(
    shape, temperature, seed
):
    student, teacher = two(shape, seed)
    entropy = soft_cross_entropy(teacher, teacher, temperature)
    cross = soft_cross_entropy(student, teacher, temperature)
    kl = soft_target_kl(student, teacher, temperature)
    assert torch.isclose(kl, temperature**2 * (cross - entropy), atol=1e-9)


def test_soft_cross_entropy_is_torch_cross_entropy_with_soft_targets():
    student, teacher = two((6, 10), seed=0)
    expected = F.cross_entropy(student / 4, (teacher / 4).softmax(1))
    assert torch.isclose(soft_cross_entropy(student, teacher, 4.0), expected)


@given(seeds)
@examples
def test_the_gradient_of_kl_hardly_depends_on_a_high_temperature(seed):
    student, teacher = two((4, 10), seed)
    norms = []
    for temperature in (100.0, 200.0):
        leaf = student.clone().requires_grad_()
        soft_target_kl(leaf, teacher, temperature).backward()
        norms.append(leaf.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [soft_target_kl, soft_cross_entropy])
def test_half_logits_are_compared_in_float32(dtype, loss):
    student, teacher = (logits.to(dtype) for logits in two((4, 10), seed=1))
    value = loss(student, teacher, 4.0)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(student.float(), teacher.float(), 4.0))


@pytest.mark.parametrize("loss", [feature_mse, attention_transfer])
def test_half_features_whose_squares_overflow_are_compared_in_float32(loss):
    student, teacher = (torch.full((1, 2, 2, 2), v, dtype=torch.float16) for v in (1000.0, 2000.0))
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.isfinite()


@pytest.mark.parametrize("loss", [soft_target_kl, soft_cross_entropy])
def test_bad_logits_are_refused(loss):
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\).*same classes"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4), 4.0)
    with pytest.raises(ValueError, match=r"\(3,\).*batch dimension"):
        loss(torch.zeros(3), torch.zeros(3), 4.0)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature is .* positive finite"):
            loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature)


@given(shapes, seeds)
@examples
def test_feature_mse_averages_all_elements(shape, seed):
    student, teacher = two(shape, seed)
    expected = sum((a - b) ** 2 for a, b in zip(student.flatten(), teacher.flatten(), strict=True))
    assert torch.isclose(feature_mse(student, teacher), expected / student.numel())
    assert feature_mse(student, student) == 0


def test_feature_mse_refuses_another_shape():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\).*attention transfer"):
        feature_mse(torch.zeros(2, 3), torch.zeros(2, 4))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.floats(0.1, 100.0), seeds)
@examples
def test_attention_ignores_scale_sign_and_number_of_channels(n, channels, size, factor, seed):
    student, _ = two((n, channels, size, size), seed)
    teacher = torch.cat([student * factor, -student * factor], dim=1)
    assert torch.isclose(attention_transfer(student, teacher), torch.zeros(()).double(), atol=1e-12)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), seeds)
@examples
def test_attention_stays_in_its_range(n, channels, height, width, seed):
    student, _ = two((n, channels, height, width), seed)
    teacher, _ = two((n, channels + 1, height, width), seed + 1)
    assert 0 <= attention_transfer(student, teacher) <= 2 / (height * width) + 1e-12


def test_attention_by_hand():
    student = torch.tensor([[[[3.0, 4.0]]]])  # energies 9 and 16
    teacher = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # energies 1 and 1
    a, b = 9 / math.hypot(9, 16), 16 / math.hypot(9, 16)
    expected = ((a - math.sqrt(0.5)) ** 2 + (b - math.sqrt(0.5)) ** 2) / 2
    assert attention_transfer(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_dead_features_give_a_finite_gradient():
    student = torch.zeros(1, 2, 3, 3, requires_grad=True)
    attention_transfer(student, torch.ones(1, 2, 3, 3)).backward()
    assert student.grad.isfinite().all()


def test_attention_refuses_what_it_would_have_to_resize():
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\).*\(1, 2, 8, 8\).*same resolution"):
        attention_transfer(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="equal batch"):
        attention_transfer(torch.zeros(1, 2, 4), torch.zeros(2, 2, 4))
    with pytest.raises(ValueError, match=r"\(1, 2\).*spatial dimension"):
        attention_transfer(torch.zeros(1, 2), torch.zeros(1, 2))
