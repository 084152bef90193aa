import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.compress.channels.normal_equations import NormalEquations


def masked_problem(seed, num_inputs=6, num_outputs=4, num_samples=40, bias=True):
    """Equations of a random linear map with noise, a weight to start from, and a random mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(num_samples, num_inputs) @ normal(num_inputs, num_inputs) + 1.0
    weight = normal(num_outputs, num_inputs)
    y = x @ weight.T + normal(num_samples, num_outputs) - 2.0
    equations = NormalEquations(num_inputs, num_outputs)
    equations.add(x, y)
    mask = torch.rand(num_outputs, num_inputs, generator=generator) < 0.5
    return x, y, equations, weight, normal(num_outputs) if bias else None, mask


@given(st.integers(0, 999), st.booleans(), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_a_masked_solve_is_a_dense_solve_of_each_row_by_itself(seed, bias, ridge):
    x, y, equations, weight, offset, mask = masked_problem(seed, bias=bias)
    solved, constant = equations.solve_masked(weight, offset, mask, ridge=ridge, num_iterations=60)
    centred, wanted = (x - x.mean(0), y - y.mean(0)) if bias else (x, y)
    strength = ridge * centred.square().sum(0).mean()
    for row, left in enumerate(mask):
        start = weight[row, left]
        gram = centred[:, left].T @ centred[:, left] + strength * torch.eye(len(start)).double()
        step = torch.linalg.solve(
            gram, centred[:, left].T @ (wanted[:, row] - centred[:, left] @ start)
        )
        torch.testing.assert_close(solved[row, left], start + step, rtol=1e-6, atol=1e-6)
    assert torch.equal(solved[~mask], torch.zeros(int((~mask).sum())).double())
    if bias:
        torch.testing.assert_close(constant, y.mean(0) - solved @ x.mean(0))
    else:
        assert constant is None


@given(st.integers(0, 999), st.booleans(), st.floats(0, 10), st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_a_masked_solve_is_never_worse_and_more_iterations_never_hurt(seed, bias, ridge, number):
    x, y, equations, weight, offset, mask = masked_problem(seed, 8, 3, 20, bias)

    def loss(w, b):
        centred, wanted = (x - x.mean(0), y - y.mean(0)) if bias else (x, y)
        pull = ridge * centred.square().sum(0).mean() * (w - weight * mask).square().sum()
        return float((wanted - centred @ w.T).square().sum() + pull)

    few = equations.solve_masked(weight, offset, mask, ridge=ridge, num_iterations=number)
    more = equations.solve_masked(weight, offset, mask, ridge=ridge, num_iterations=number + 1)
    start = weight * mask
    assert loss(*few) <= loss(start, offset) * (1 + 1e-9)
    assert loss(*more) <= loss(*few) * (1 + 1e-9)
    assert equations.error(*few) <= equations.error(start, offset) * (1 + 1e-9)


def test_with_nothing_masked_it_is_the_plain_solve():
    _, _, equations, weight, bias, mask = masked_problem(3)
    full = torch.ones_like(mask)
    solved, constant = equations.solve_masked(weight, bias, full, ridge=1e-2, num_iterations=40)
    wanted, wanted_constant = equations.solve(weight, bias, ridge=1e-2)
    torch.testing.assert_close(solved, wanted)
    torch.testing.assert_close(constant, wanted_constant)


def test_what_the_samples_say_nothing_about_stays():
    equations = NormalEquations(3, 1)
    x = torch.tensor([[1.0, 0.0, 2.0], [2.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    equations.add(x, x @ torch.tensor([[1.0], [1.0], [1.0]]))
    weight, mask = torch.tensor([[5.0, 7.0, 9.0]]), torch.tensor([[True, True, False]])
    solved, _ = equations.solve_masked(weight, None, mask, ridge=0.0)
    # Least squares of [3, 3, 1] on the first column, which is [1, 2, 0].
    torch.testing.assert_close(solved, torch.tensor([[9 / 5, 7.0, 0.0]]))
    empty, bias = equations.solve_masked(weight, torch.zeros(1), torch.zeros(1, 3).bool())
    assert empty.tolist() == [[0.0, 0.0, 0.0]]
    torch.testing.assert_close(bias, torch.tensor([7 / 3]))


def test_dtypes_stay_and_bad_arguments_are_refused():
    equations = NormalEquations(2, 1)
    weight, mask = torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="there are no samples yet"):
        equations.solve_masked(weight, None, mask)
    equations.add(torch.randn(8, 2), torch.randn(8, 1))
    solved, bias = equations.solve_masked(weight, torch.zeros(1), mask)
    assert (solved.dtype, bias.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match=r"ridge is -1, expected at least 0"):
        equations.solve_masked(weight, None, mask, ridge=-1)
    with pytest.raises(ValueError, match="num_iterations is 0, expected at least 1"):
        equations.solve_masked(weight, None, mask, num_iterations=0)
    with pytest.raises(ValueError, match=r"the mask is torch.float32 of shape \(1, 2\), expected"):
        equations.solve_masked(weight, None, mask.float())
    with pytest.raises(ValueError, match=r"torch.bool of shape \(2,\), expected .* \(1, 2\)"):
        equations.solve_masked(weight, None, mask[0])
