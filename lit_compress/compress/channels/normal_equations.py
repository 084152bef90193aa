"""Least squares by normal equations: sums gathered once, solved for any part of the inputs.

Channel pruning solves the same regression again and again with other input channels left, and
sparsity with other weights left. The sums ``X^T X`` and ``X^T Y`` hold all that is needed, and no
sample is kept: a solve costs the cube of the inputs left, or for weights a few products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["NormalEquations"]


class NormalEquations:
    """The regression of outputs on inputs, in float64.

    Args:
        num_inputs: Columns of X, at least 1.
        num_outputs: Columns of Y, at least 1.
        device: Where the sums are kept; their size is
            ``8 * num_inputs * (num_inputs + num_outputs)`` bytes.

    Raises:
        ValueError: If a number is below 1.

    Examples:
        >>> equations = NormalEquations(2, 1)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> equations.add(x, x @ torch.tensor([[2.0], [3.0]]) + 1.0)
        >>> weight, bias = equations.solve(torch.zeros(1, 2), torch.zeros(1), ridge=0.0)
        >>> weight.round(decimals=6).tolist(), bias.round(decimals=6).tolist()
        ([[2.0, 3.0]], [1.0])
    """

    def __init__(
        self, num_inputs: int, num_outputs: int, device: torch.device | str = "cpu"
    ) -> None:
        for name, number in (("num_inputs", num_inputs), ("num_outputs", num_outputs)):
            if number < 1:
                raise ValueError(f"{name} is {number}, expected at least 1.")

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.num_samples = 0
        self._xx = zeros(num_inputs, num_inputs)
        self._xy = zeros(num_inputs, num_outputs)
        self._yy = zeros(num_outputs)
        self._x = zeros(num_inputs)
        self._y = zeros(num_outputs)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples.

        Args:
            x: Inputs, shape ``[samples, num_inputs]``, on any device.
            y: Outputs, shape ``[samples, num_outputs]``.

        Raises:
            ValueError: If the shapes do not fit, or a value is NaN or infinite.
        """
        expected = [(len(x), self._x.numel()), (len(x), self._y.numel())]
        if [tuple(x.shape), tuple(y.shape)] != expected:
            raise ValueError(
                f"x and y have shapes {tuple(x.shape)} and {tuple(y.shape)}, expected "
                f"{expected[0]} and {expected[1]}."
            )
        if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise ValueError("the samples hold NaN or infinity, expected finite numbers.")
        x = x.detach().to(self._x.device).to(torch.float64)
        y = y.detach().to(self._y.device).to(torch.float64)
        self.num_samples += len(x)
        self._xx.addmm_(x.T, x)
        self._xy.addmm_(x.T, y)
        self._yy += y.square().sum(0)
        self._x += x.sum(0)
        self._y += y.sum(0)

    def map_sums(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put every sum through a function of the same shape, such as a sum over processes.

        Args:
            change: Gives a tensor of its argument's shape, float64.
        """
        count = torch.tensor([float(self.num_samples)], dtype=torch.float64)
        self.num_samples = int(change(count))
        for sums in (self._xx, self._xy, self._yy, self._x, self._y):
            sums.copy_(change(sums))

    def solve(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        inputs: Tensor | None = None,
        outputs: Tensor | None = None,
        ridge: float = 1e-2,
    ) -> tuple[Tensor, Tensor | None]:
        """The weights that predict the outputs best, near given ones.

        Minimises ``|Y - X W^T - b|^2 + r |W - W0|^2``. Pulling towards the weights there are,
        instead of towards 0, never fits worse than they do, and leaves alone what the samples do
        not determine. Cholesky factorisation; where it fails, with ten times the ridge.

        Args:
            weight: W0, shape ``[len(outputs), len(inputs)]``.
            bias: A bias, shape ``[len(outputs)]``, is found too (and not penalised); ``None`` if
                there is to be none.
            inputs: Columns of X that are left, int64; all by default.
            outputs: Columns of Y that are left, int64; all by default.
            ridge: ``r`` divided by the mean diagonal of ``X^T X`` (of its left part, centred if
                there is a bias), at least 0.

        Returns:
            W and b, shaped and typed as ``weight`` and ``bias``.

        Raises:
            ValueError: If no sample was added, ``ridge`` is negative, or the shapes do not fit.
        """
        _check_ridge(ridge)
        xx, xy, _, mean_x, mean_y = self._part(weight, bias, inputs, outputs)
        start = weight.detach().to(xx)
        scale = xx.diagonal().mean()
        solved = start
        if scale > 0:  # else every input is constant, and no weight matters
            factor = _cholesky(xx, float(scale), ridge)
            solved = start + torch.cholesky_solve(xy - xx @ start.T, factor).T
        if bias is None:
            return solved.to(weight), None
        return solved.to(weight), (mean_y - solved @ mean_x).to(bias)

    def solve_masked(
        self,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        *,
        ridge: float = 1e-2,
        num_iterations: int = 20,
    ) -> tuple[Tensor, Tensor | None]:
        """The weights that predict the outputs best where each output has inputs of its own.

        Minimises what :meth:`solve` does over the weights that a mask leaves, ``W0`` being the
        masked weight. Every output is a system of its own; all are solved together by conjugate
        gradients, preconditioned by the diagonal, at the cost of a product of ``W`` and ``X^T X``
        an iteration. The error falls in each iteration from that of the masked weight, so that
        few of them never fit worse than none (Hestenes & Stiefel 1952).

        Args:
            weight: Shape ``[num_outputs, num_inputs]``.
            bias: As in :meth:`solve`.
            mask: Bool, shaped as ``weight``, ``True`` where a weight is kept.
            ridge: As in :meth:`solve`.
            num_iterations: At least 1; 20 come close to the least error of convolutions.

        Returns:
            W, exactly 0 where the mask is ``False``, and b, shaped and typed as ``weight`` and
            ``bias``.

        Raises:
            ValueError: If no sample was added, ``ridge`` is negative, ``num_iterations`` is below
                1, or the shapes do not fit.
        """
        _check_ridge(ridge)
        if num_iterations < 1:
            raise ValueError(f"num_iterations is {num_iterations}, expected at least 1.")
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ValueError(
                f"the mask is {mask.dtype} of shape {tuple(mask.shape)}, expected torch.bool of "
                f"the weight's shape {tuple(weight.shape)}."
            )
        xx, xy, _, mean_x, mean_y = self._part(weight, bias, None, None)
        mask = mask.to(xx.device)
        start = torch.where(mask, weight.detach().to(xx), 0)
        slope = torch.where(mask, xy.T - start @ xx, 0)
        xx = xx.clone()
        xx.diagonal().add_(ridge * xx.diagonal().mean())
        solved = start + _conjugate_gradients(xx, slope, mask, num_iterations)
        if bias is None:
            return solved.to(weight), None
        return solved.to(weight), (mean_y - solved @ mean_x).to(bias)

    def error(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        inputs: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> float:
        """The share of the outputs' variance that given weights leave unexplained.

        Args:
            weight: Shape ``[len(outputs), len(inputs)]``.
            bias: Shape ``[len(outputs)]``, or ``None``.
            inputs: Columns of X that are left, int64; all by default.
            outputs: Columns of Y that are left, int64; all by default.

        Returns:
            The summed squared error over the summed squared deviation of the outputs from their
            means: 0 for a perfect fit, 1 for one no better than the means; 0 if both are 0.

        Raises:
            ValueError: If no sample was added or the shapes do not fit.
        """
        # About the means of X and Y in any case; what a bias leaves of the mean is added.
        centred = torch.zeros(len(weight)) if bias is None else bias
        xx, xy, yy, mean_x, mean_y = self._part(weight, centred, inputs, outputs)
        w = weight.detach().to(xx)
        offset = mean_y - w @ mean_x - centred.detach().to(xx)
        squares = yy - 2 * (w.T * xy).sum(0) + ((w @ xx) * w).sum(1)
        squares = squares.clamp(min=0) + self.num_samples * offset.square()
        variance = float(yy.sum())
        total = float(squares.sum())
        return total / variance if variance > 0 else (float("inf") if total > 0 else 0.0)

    def _part(
        self,
        weight: Tensor,
        bias: Tensor | None,
        inputs: Tensor | None,
        outputs: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The sums for some columns, about the means if there is a bias; and the means."""
        if self.num_samples == 0:
            raise ValueError("there are no samples yet; call add first.")
        xx, xy, yy, x, y = self._xx, self._xy, self._yy, self._x, self._y
        if inputs is not None:
            inputs = inputs.to(xx.device)
            xx = xx.index_select(0, inputs).index_select(1, inputs)
            xy, x = xy.index_select(0, inputs), x.index_select(0, inputs)
        if outputs is not None:
            outputs = outputs.to(xx.device)
            xy, yy, y = xy.index_select(1, outputs), yy[outputs], y[outputs]
        if weight.shape != (y.numel(), x.numel()):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, expected ({y.numel()}, {x.numel()}): "
                "outputs by inputs."
            )
        if bias is not None and bias.shape != y.shape:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({y.numel()},).")
        mean_x, mean_y = x / self.num_samples, y / self.num_samples
        if bias is not None:
            xx = xx.addr(x, mean_x, alpha=-1)
            xy = xy.addr(x, mean_y, alpha=-1)
            yy = yy - y * mean_y
        return xx, xy, yy, mean_x, mean_y


def _cholesky(xx: Tensor, scale: float, ridge: float) -> Tensor:
    """The factor of ``xx`` plus as much ridge as it takes, ``scale`` times ``ridge`` at least."""
    while True:
        ridged = xx.clone()
        ridged.diagonal().add_(ridge * scale)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if not bool(failed) and bool(torch.isfinite(factor).all()):
            return factor
        ridge = max(10 * ridge, 1e-12)


def _conjugate_gradients(xx: Tensor, slope: Tensor, mask: Tensor, num_iterations: int) -> Tensor:
    """Steps ``D``, zero outside of the mask, with ``D xx = slope`` inside of it, row by row.

    Rows that are done, and inputs that are always zero, stay where they are.
    """
    diagonal = xx.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    steps = torch.zeros_like(slope)
    direction = slope * inverse
    size = (slope * direction).sum(1)
    for _ in range(num_iterations):
        change = torch.where(mask, direction @ xx, 0)
        step = _divided(size, (direction * change).sum(1))
        steps += step * direction
        slope = slope - step * change
        scaled = slope * inverse
        size, before = (slope * scaled).sum(1), size
        direction = scaled + _divided(size, before) * direction
    return steps


def _divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotients as a column, 0 where the denominator is not above 0."""
    return torch.where(denominator > 0, numerator / denominator, 0).unsqueeze(1)


def _check_ridge(ridge: float) -> None:
    if ridge < 0:
        raise ValueError(f"ridge is {ridge}, expected at least 0.")
