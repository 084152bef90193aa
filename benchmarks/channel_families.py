"""What pruning half of all channels does to well-known families of networks.

Each network has random weights. The channels are found by running it on two small examples, half of
each group goes (by l2, rounded to 8), and the row says how many groups there were, what is left,
and which layers were skipped. `tests/benchmarks/test_channel_families.py` makes sure that the
slim networks compute what they should, and that the committed rows are what it measures.

    python benchmarks/channel_families.py [NAME ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from machine import machine
from torch import Tensor, nn

from lit_compress.compress.channels.costs import PlanCost
from lit_compress.compress.channels.cut import cut_channels
from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.channels.importance import channel_importance
from lit_compress.compress.channels.order import uniform_plan
from lit_compress.compress.channels.plan import ChannelPlan, choose_channels
from lit_compress.compress.channels.tracing import find_channel_groups
from lit_compress.measure import count_macs, count_params, layer_complexity
from lit_compress.tasks import build_model

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "channel_families.json"
RATIO = 0.5
ROUND_TO = 8
BATCH = 2


@dataclass(frozen=True)
class Family:
    """A network and what it runs on.

    Attributes:
        name: As in the table.
        build: Makes the network with random weights.
        input_shape: Shape of one image.
        detects: Whether it takes lists of images, and targets in training mode.
    """

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, int, int]
    detects: bool = False

    def images(self) -> Tensor:
        """A batch of random images."""
        generator = torch.Generator().manual_seed(1)
        return torch.rand(BATCH, *self.input_shape, generator=generator)

    def inputs(self) -> Any:
        """A batch as the network takes it in evaluation mode, as a tuple of arguments."""
        return (list(self.images()),) if self.detects else (self.images(),)

    def run(self, model: nn.Module) -> Any:
        """Call the network in the mode that it is in."""
        if not (self.detects and model.training):
            return model(*self.inputs())
        targets = [
            {"boxes": torch.tensor([[8.0, 8.0, 99.0, 99.0]]), "labels": torch.tensor([1])}
        ] * BATCH
        return model(*self.inputs(), targets)


def _torchvision(name: str, pixels: int = 64, **kwargs: Any) -> Family:
    def build() -> nn.Module:
        return torchvision.models.get_model(name, weights=None, **kwargs)  # type: ignore[no-any-return]

    return Family(f"torchvision {name}", build, (3, pixels, pixels))


def _ours(name: str, input_shape: tuple[int, int, int] = (3, 32, 32)) -> Family:
    return Family(name, lambda: build_model(name), input_shape)


def _ssdlite() -> nn.Module:
    build = torchvision.models.detection.ssdlite320_mobilenet_v3_large
    return build(weights=None, weights_backbone=None)  # type: ignore[no-any-return]


FAMILIES = {
    family.name: family
    for family in (
        _torchvision("resnet18"),
        _torchvision("resnet50"),
        _torchvision("vgg16_bn"),
        _torchvision("mobilenet_v2"),
        _torchvision("mobilenet_v3_large"),
        _torchvision("efficientnet_b0"),
        _torchvision("convnext_tiny"),
        _torchvision("densenet121"),
        _torchvision("googlenet", init_weights=False, aux_logits=True),
        _torchvision("vit_b_16", image_size=64),
        _torchvision("swin_t"),
        Family("torchvision ssdlite320_mobilenet_v3_large", _ssdlite, (3, 320, 320), detects=True),
        *map(_ours, ("resnet20", "resnet32", "resnet56", "plain20")),
        *map(_ours, ("mobilenet_v1", "vgg16", "vgg16_bn")),
        _ours("digits_cnn", (1, 8, 8)),
    )
}


def build(family: Family) -> nn.Module:
    """The network with weights that leave nothing to chance: no two norms alike, no zeros."""
    torch.manual_seed(0)
    model = family.build()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "layer_scale" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif not bool(parameter.any()):  # the head of vision transformers begins at zero
            nn.init.normal_(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model


@dataclass(frozen=True)
class Pruned:
    """A network before and after its cut."""

    family: Family
    dense: nn.Module
    slim: nn.Module
    groups: ChannelGroups
    plan: ChannelPlan
    keep: Tensor
    seconds: float

    def row(self) -> dict[str, Any]:
        """What is committed, but for the time."""
        return {
            "input_shape": list(self.family.input_shape),
            "groups": len(self.groups.groups),
            "channels": self.groups.num_channels,
            "kept": sum(self.plan.kept_in(self.groups).values()),
            "macs_ratio": round(self.macs(self.slim) / self.macs(self.dense), 4),
            "params_ratio": round(count_params(self.slim) / count_params(self.dense), 4),
            "left_alone": [[layer.layer, layer.reason] for layer in self.groups.left_alone],
        }

    def macs(self, model: nn.Module) -> int:
        """MACs for one image."""
        return count_macs(model, self.family.inputs(), batch_size=BATCH)

    def planned(self) -> tuple[float, float]:
        """MACs and parameters that the plan says."""
        rows = layer_complexity(self.dense, self.family.inputs(), batch_size=BATCH)
        macs = PlanCost.macs(self.groups, self.dense, {row.name: row.macs or 0 for row in rows})
        return macs(self.plan), PlanCost.num_params(self.groups, self.dense)(self.plan)


def prune(family: Family) -> Pruned:
    """Find the channels of a network and cut half of each group."""
    dense = build(family)
    start = time.perf_counter()
    groups = find_channel_groups(dense, family.run)
    seconds = time.perf_counter() - start
    plan = uniform_plan(groups, RATIO, round_to=ROUND_TO)
    keep = choose_channels(groups, plan, channel_importance(dense, groups, "l2"))
    slim = copy.deepcopy(dense)
    cut_channels(slim, groups, keep)
    return Pruned(family, dense, slim, groups, plan, keep, seconds)


def read_results() -> dict[str, dict[str, Any]]:
    """The committed rows, by family."""
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    rows: dict[str, dict[str, Any]] = results.get("families", results)  # earlier: rows alone
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| network | input | groups | channels | MACs left | params left | skipped |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        size = " × ".join(map(str, row["input_shape"]))
        lines.append(
            f"| {name} | {size} | {row['groups']} | {row['channels']} → {row['kept']} | "
            f"{100 * row['macs_ratio']:.1f} % | {100 * row['params_ratio']:.1f} % | "
            f"{_left_alone(row['left_alone'])} |"
        )
    return "\n".join(lines)


def _left_alone(layers: list[list[str]]) -> str:
    by_reason: dict[str, list[str]] = {}
    for layer, reason in layers:
        by_reason.setdefault(reason, []).append(layer)
    return "; ".join(
        f"`{names[0]}`{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in by_reason.items()
    )


def section() -> str:
    """The part of the results page."""
    rows = read_results()
    slowest = max(rows, key=lambda name: rows[name]["seconds"])
    return f"""## Channel pruning: families of networks

Half of the channels of every group removed by l2, rounded to {ROUND_TO}, random weights. Layers
that make the output keep their channels. Groups are found by running the network on two examples;
the slowest of these, {slowest}, took {rows[slowest]["seconds"]:.1f} s on one thread of a busy
machine.

{table(rows)}

JSON: [`results/channel_families.json`](results/channel_families.json); made by
`python benchmarks/channel_families.py`, and measured again by the tests."""


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; by default all")
    names = parser.parse_args().names or list(FAMILIES)
    torch.set_num_threads(1)
    rows = read_results() if RESULTS.exists() else {}
    for name in names:
        pruned = prune(FAMILIES[name])
        rows[name] = pruned.row() | {"seconds": round(pruned.seconds, 2)}
        print(name, rows[name], flush=True)
    in_order = {name: rows[name] for name in FAMILIES if name in rows}
    RESULTS.write_text(json.dumps({"machine": machine(), "families": in_order}, indent=1) + "\n")


if __name__ == "__main__":
    main()
