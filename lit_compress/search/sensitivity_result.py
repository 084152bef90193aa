"""The result of a sensitivity analysis, as data and tables; plans derived from it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lit_compress.compress.channels.groups import ChannelGroup, ChannelGroups
from lit_compress.compress.channels.plan import ChannelPlan, rounding_step
from lit_compress.measure.table import UNKNOWN, aligned
from lit_compress.plain import SavedAsJSON
from lit_compress.search.evaluation import Mode

__all__ = ["SensitivityPoint", "SensitivityResult"]


@dataclass(frozen=True)
class SensitivityPoint:
    """The metrics of the model with one group cut, all others whole.

    Attributes:
        group: The group's name; empty for the baseline.
        kept: Channels that it keeps.
        metrics: What evaluation gave, by name.
        tuned_metrics: What it gave after a short tuning, if there was one.
    """

    group: str
    kept: int
    metrics: Mapping[str, float]
    tuned_metrics: Mapping[str, float] | None = None

    def value(self, metric: str, tuned: bool) -> float:
        """One metric, before or after tuning; NaN where it is not known."""
        metrics = self.tuned_metrics if tuned else self.metrics
        return math.nan if metrics is None else metrics.get(metric, math.nan)


@dataclass(frozen=True)
class SensitivityResult(SavedAsJSON):
    """The curves of a model's channel groups, complete or as far as a run has come.

    ``print(result)`` shows one table a metric: a row for each group, a column for each pruning
    ratio, the dash where nothing was measured.

    Attributes:
        groups: The channel groups, in forward order.
        ratios: The pruning ratios that were asked for, each in (0, 1).
        baseline: The model without a cut.
        points: One for each group and number of channels, by group and falling number.
        setting: What the points depend on, in words.
    """

    groups: tuple[ChannelGroup, ...]
    ratios: tuple[float, ...]
    baseline: SensitivityPoint
    points: tuple[SensitivityPoint, ...]
    setting: Mapping[str, str]

    json_format: ClassVar[str] = "lit-compress sensitivity 1"
    json_name: ClassVar[str] = "a sensitivity analysis"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, as the baseline has them."""
        return tuple(self.baseline.metrics)

    @property
    def is_tuned(self) -> bool:
        """Whether points were tuned and evaluated again."""
        return self.baseline.tuned_metrics is not None

    def curve(self, group: str, metric: str, tuned: bool = False) -> dict[float, float]:
        """One curve, with the ratios that whole channels gave.

        Args:
            group: The group's name.
            metric: The metric's name.
            tuned: Whether after tuning.

        Returns:
            The metric by pruning ratio, rising from the baseline's at 0.

        Raises:
            ValueError: If there is no such group or metric, or no tuning.
        """
        self.check_metric(metric, tuned)
        found = next((g for g in self.groups if g.name == group), None)
        if found is None:
            raise ValueError(
                f"there is no group {group!r}; the groups are "
                f"{', '.join(repr(g.name) for g in self.groups)}."
            )
        curve = {0.0: self.baseline.value(metric, tuned)}
        for point in self._points_of(group):
            curve[1 - point.kept / found.num_channels] = point.value(metric, tuned)
        return curve

    def derive_plan(
        self,
        tolerance: float,
        metric: str,
        mode: Mode = "max",
        *,
        tuned: bool | None = None,
        round_to: int = 8,
    ) -> ChannelPlan:
        """Take from each group what it can lose by itself.

        Each group keeps as few channels as the curve allows: it is followed from the baseline up
        to the first point that is worse by more than the tolerance, or not a number. Losses of
        several groups add up, so the model with all of them cut is worse than the tolerance says.

        Args:
            tolerance: How much worse than the baseline a point may be, at least 0, in the metric's
                own unit: 0.01 is one point of an accuracy in [0, 1].
            metric: The metric's name.
            mode: ``"max"`` where more is better, ``"min"`` where less is.
            tuned: Whether to judge the points after tuning; by default if there was any. They are
                held against the better of the baselines before and after tuning, so that a tuning
                that ruins every model alike is not taken for a model that bears every cut.
            round_to: Channels kept are rounded up to a multiple, where a group has more.

        Returns:
            The plan, for ``ChannelPruning(plan=...)``.

        Raises:
            ValueError: If an argument is out of range, the metric was not logged, or a baseline is
                not a number.
        """
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance is {tolerance}; expected a finite number of at least 0.")
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}; expected 'max' or 'min'.")
        tuned = self.is_tuned if tuned is None else tuned
        self.check_metric(metric, tuned)
        sign = 1 if mode == "max" else -1
        ways = (False, True) if tuned else (False,)
        baseline = max(sign * self._known_baseline(metric, way) for way in ways)
        kept = {}
        for group in self.groups:
            fewest = group.num_channels
            for point in self._points_of(group.name):
                loss = baseline - sign * point.value(metric, tuned)
                if not loss <= tolerance + 1e-9:  # also where it is NaN
                    break
                fewest = point.kept
            step = rounding_step(group, round_to)
            kept[group.name] = min(math.ceil(fewest / step) * step, group.num_channels)
        return ChannelPlan(kept, {group.name: group.num_channels for group in self.groups})

    def check(self, groups: ChannelGroups, setting: Mapping[str, str]) -> None:
        """Refuse to be continued on another model or in another setting.

        Args:
            groups: The channels of the model.
            setting: As for :func:`~lit_compress.search.sensitivity.sensitivity_curves`.

        Raises:
            ValueError: If they are not those of this result; the first difference is named.
        """
        here = [(g.name, g.num_channels, g.num_blocks) for g in groups.groups]
        there = [(g.name, g.num_channels, g.num_blocks) for g in self.groups]
        differing = next(
            (pair for pair in zip(here, there, strict=False) if pair[0] != pair[1]), None
        )
        if differing is not None:
            (name, channels, _), (old_name, old_channels, _) = differing
            raise ValueError(
                f"the analysis to be continued is of another model: it has {old_channels} channels "
                f"in group {old_name!r} where this one has {channels} in {name!r}."
            )
        if len(here) != len(there):
            raise ValueError(
                f"the analysis to be continued is of another model: it has {len(there)} groups, "
                f"this one {len(here)}."
            )
        for key in dict.fromkeys((*self.setting, *setting)):
            if self.setting.get(key) != setting.get(key):
                raise ValueError(
                    f"the analysis to be continued had another setting: {key!r} was "
                    f"{self.setting.get(key)!r} and is {setting.get(key)!r}."
                )

    def rows(self, metric: str, tuned: bool = False) -> list[list[str]]:
        """A table: the header (group, channels, ratios), the baseline, then the groups."""
        self.check_metric(metric, tuned)
        header = ["group", "channels", *(f"-{ratio:.0%}" for ratio in self.ratios)]
        rows = [header]
        for group in self.groups:
            values = [self._near(group, ratio, metric, tuned) for ratio in self.ratios]
            rows.append([group.name, str(group.num_channels), *values])
        return rows

    def table(self, metric: str, tuned: bool = False) -> str:
        """One metric of all groups as an aligned table.

        Raises:
            ValueError: If the metric was not logged, or nothing was tuned.
        """
        header, *rows = self.rows(metric, tuned)
        after = " after tuning" if tuned else ""
        baseline = self.baseline.value(metric, tuned)
        title = f"{metric}{after}, one group cut at a time; {baseline:.4f} with none"
        return "\n".join([title, *aligned(header, rows)])

    def __str__(self) -> str:
        ways = (False, True) if self.is_tuned else (False,)
        return "\n\n".join(self.table(metric, way) for metric in self.metrics for way in ways)

    def check_metric(self, metric: str, tuned: bool = False) -> None:
        """Check that a metric was logged.

        Args:
            metric: The metric's name.
            tuned: Whether it is asked for after tuning.

        Raises:
            ValueError: If it was not logged, or nothing was tuned.
        """
        if tuned and not self.is_tuned:
            raise ValueError("nothing was tuned in this analysis; ask without tuning.")
        if metric not in self.metrics:
            near = difflib.get_close_matches(metric, self.metrics, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"the metric {metric!r} is not logged; those that are: "
                f"{', '.join(map(repr, self.metrics))}.{hint}"
            )

    def _known_baseline(self, metric: str, tuned: bool) -> float:
        value = self.baseline.value(metric, tuned)
        if math.isnan(value):
            after = " after tuning" if tuned else ""
            raise ValueError(
                f"the baseline's {metric!r} is not a number{after}, so there is nothing to compare "
                "the points with. Is the model itself sound"
                f"{', and the learning rate not too high' if tuned else ''}?"
            )
        return value

    def _points_of(self, group: str) -> list[SensitivityPoint]:
        points = [point for point in self.points if point.group == group]
        return sorted(points, key=lambda point: -point.kept)

    def _near(self, group: ChannelGroup, ratio: float, metric: str, tuned: bool) -> str:
        """The point that a ratio was rounded to, if it was measured."""
        wish = group.num_channels * (1 - ratio)
        points = (self.baseline, *self._points_of(group.name))
        kept = [p.kept if p.group else group.num_channels for p in points]
        index = min(range(len(points)), key=lambda i: abs(kept[i] - wish))
        away = abs(kept[index] - wish)
        if away > group.num_blocks / 2 + 1e-9 and kept[index] > group.num_blocks:
            return UNKNOWN
        return f"{points[index].value(metric, tuned):.4f}"
