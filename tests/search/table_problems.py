"""Ratio problems that are tables of numbers, drawn by Hypothesis or made by hand."""

from __future__ import annotations

import random

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from lit_compress.search.problem import Budget, Choice, Cost, Decision, RatioProblem

COST_KINDS = ("pairs", "concave", "table")


@st.composite
def problems(draw: st.DrawFn, with_budget: bool = True) -> RatioProblem:
    """1 to 8 decisions with up to 6 levels, a cost that never falls, a budget that can be met."""
    chance, by_level = draw(st.randoms(use_true_random=False)), draw(st.booleans())
    decisions = tuple(
        Decision(f"layer{i}", _levels(chance), 24.0, (chance.random(), chance.random()), by_level)
        for i in range(draw(st.integers(1, 8)))
    )
    assume(any(len(decision.levels) > 1 for decision in decisions))
    cost = monotone_cost(draw(st.sampled_from(COST_KINDS)), decisions, chance)
    free = RatioProblem(decisions, {"macs": cost})
    least = free.cost_of((0,) * len(decisions))["macs"]
    most = free.cost_of(free.highest)["macs"]
    assume(most > least * (1 + 1e-6) + 1e-6)
    limit = least + draw(st.floats(0, 1, exclude_max=True)) * (most - least)
    assume(0 < limit < most * (1 - 1e-6))
    return RatioProblem(decisions, {"macs": cost}, Budget("macs", limit)) if with_budget else free


def monotone_cost(kind: str, decisions: tuple[Decision, ...], chance: random.Random) -> Cost:
    """A cost that never falls where a value rises, and may stay as it is."""
    count = len(decisions)
    if kind == "pairs":  # MACs of layers that read what others make
        products = [[_number(chance) for _ in range(count)] for _ in range(count)]
        return pair_cost(products, [_number(chance) for _ in range(count)])
    if kind == "concave":
        factors = torch.tensor([_number(chance) for _ in range(count)], dtype=torch.float64)
        return lambda values: (values.sqrt() * factors).sum(1)
    steps = torch.tensor([[_number(chance) for _ in range(25)] for _ in range(count)]).double()
    tables = steps.cumsum(1)

    def table_cost(values: Tensor) -> Tensor:
        return sum(table[column.long()] for table, column in zip(tables, values.T, strict=True))

    return table_cost


def pair_cost(products: list[list[float]], factors: list[float]) -> Cost:
    """``x P x + f x`` for each row x."""
    matrix = torch.tensor(products, dtype=torch.float64)
    vector = torch.tensor(factors, dtype=torch.float64)
    return lambda values: ((values @ matrix) * values).sum(1) + values @ vector


def chain_problem(
    widths: tuple[int, ...] = (32, 64, 64, 128), share: float | None = 0.5, step: int = 8
) -> RatioProblem:
    """Layers one behind another: each costs its inputs times its outputs."""
    decisions = tuple(
        Decision(f"conv{i}", tuple(map(float, range(step, w + 1, step))), w, (i / 10, w / 128))
        for i, w in enumerate(widths)
    )
    problem = RatioProblem(decisions, {"macs": chain_macs})
    if share is None:
        return problem
    limit = share * problem.full_costs["macs"]
    return RatioProblem(decisions, {"macs": chain_macs}, Budget("macs", limit))


def chain_macs(values: Tensor) -> Tensor:
    """Three input channels, then ten classes."""
    inputs = torch.cat([torch.full_like(values[:, :1], 3.0), values], 1)
    outputs = torch.cat([values, torch.full_like(values[:, :1], 10.0)], 1)
    return (inputs * outputs).sum(1)


def raised(problem: RatioProblem, choice: Choice) -> list[Choice]:
    """The choices that keep one level more of one decision."""
    return [
        (*choice[:i], index + 1, *choice[i + 1 :])
        for i, index in enumerate(choice)
        if index < problem.highest[i]
    ]


def _levels(chance: random.Random) -> tuple[float, ...]:
    return tuple(float(n) for n in sorted(chance.sample(range(1, 25), chance.randint(1, 6))))


def _number(chance: random.Random) -> float:
    return 0.0 if chance.random() < 0.2 else chance.random() * 10 ** chance.randint(-2, 2)
