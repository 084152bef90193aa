"""What channel pruning costs and gains in time, on one thread: the cut, and latency after it.

A cut is timed by the processor's clock, which does not count what other processes take.
"""

from __future__ import annotations

import copy
import gc
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from bars import Ratio
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet50

from lit_compress import ChannelPruning, Schedule, compare_latency, count_macs
from lit_compress.compress.channels.cut import cut_channels, cut_optimizer_state
from lit_compress.compress.channels.goal import ChannelGoal
from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.channels.importance import channel_importance
from lit_compress.compress.channels.plan import ChannelPlan, choose_channels
from lit_compress.compress.channels.tracing import find_channel_groups
from lit_compress.measure import layer_complexity
from lit_compress.search.sensitivity import point_overhead
from lit_compress.tasks import build_model, load_weights, weights_path
from lit_compress.tasks.assets import ASSETS_VARIABLE

RATIO = 0.5
STEP_IMAGES, STEP_PIXELS = 8, 128
"""Of the training step of ResNet-50 that a cut is compared with."""


# --- One cut of ResNet-50 -------------------------------------------------------------------------


def cut_time(repeats: int, num_traces: int, image_size: int = 224) -> dict[str, Any]:
    """Seconds of one cut of ResNet-50 to half of its MACs, momentum included.

    Args:
        repeats: Our cuts of fresh copies, of each kind, in turns; at least 1, for an interval 6.
        num_traces: Our traces, and Torch-Pruning's traces and cuts; at least 1.
        image_size: Height and width of the example that is traced.

    Returns:
        Medians: of our trace and cut (scores, plan, choice, cut, optimizer state), of the cut as
        the callback makes it inside of a fit, of a training step, and of Torch-Pruning's trace and
        cut, which leaves the optimizer with parameters that the model no longer has. The ratios
        are of both cuts and the training step of the same round.
    """
    torch.manual_seed(0)
    dense = resnet50()
    example = torch.randn(2, 3, image_size, image_size)
    traces, cuts, cuts_in_fit, steps = [], [], [], []
    slim = dense
    train = _training_step(dense)
    train()
    for _ in range(num_traces):
        (groups, layer_macs), seconds = _timed(_trace, dense, example)
        traces.append(seconds)
    for _ in range(repeats):
        model, optimizer = _in_training(dense)
        _, seconds = _timed(_cut, model, optimizer, groups, layer_macs)
        cuts.append(seconds)
        cuts_in_fit.append(_cut_in_fit_s())
        steps.append(_timed(train)[1])
        slim = model
    peer_traces, peer_cuts, peer_slim = _torch_pruning_times(dense, example, num_traces)
    dense_macs = count_macs(dense, example)
    return {
        "model": "resnet50",
        "repeats": repeats,
        "trace_s": median(traces),
        "cut_s": median(cuts),
        "in_fit_s": median(cuts_in_fit),
        "training_step_s": median(steps),
        "training_step": f"{STEP_IMAGES} images of {STEP_PIXELS} × {STEP_PIXELS}",
        "cut_step_ratio": Ratio.of(cuts, steps).as_json(),
        "in_fit_step_ratio": Ratio.of(cuts_in_fit, steps).as_json(),
        "macs_ratio": count_macs(slim, example) / dense_macs,
        "torch_pruning_trace_s": median(peer_traces),
        "torch_pruning_cut_s": median(peer_cuts),
        "torch_pruning_macs_ratio": count_macs(peer_slim, example) / dense_macs,
    }


def _trace(model: nn.Module, example: Tensor) -> tuple[ChannelGroups, dict[str, int]]:
    groups = find_channel_groups(model, lambda m: m(example))
    rows = layer_complexity(model, example[:1])
    return groups, {row.name: row.macs or 0 for row in rows}


def _cut(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: ChannelGroups,
    layer_macs: dict[str, int],
) -> None:
    scores = channel_importance(model, groups, "l2")
    goal = ChannelGoal(target_macs_ratio=RATIO)
    plan = goal.resolve(groups, model, scores, layer_macs, _no_latency)
    keep = choose_channels(groups, plan, scores)
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    cut_channels(model, groups, keep)
    cut_optimizer_state(optimizer, parameters, groups.kept_indices(keep), shapes)


def _no_latency(plan: ChannelPlan) -> float:
    raise AssertionError("a target in MACs needs no latency")


def _in_training(dense: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy with an optimizer that has momentum for each weight."""
    model = copy.deepcopy(dense)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.randn_like(parameter)
    return model, optimizer


def _training_step(dense: nn.Module) -> Callable[[], None]:
    """Forward, backward and SGD with momentum, on a copy."""
    model = copy.deepcopy(dense).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(STEP_IMAGES, 3, STEP_PIXELS, STEP_PIXELS)
    labels = torch.arange(STEP_IMAGES)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()

    return step


def _torch_pruning_times(
    dense: nn.Module, example: Tensor, repeats: int
) -> tuple[list[float], list[float], nn.Module]:
    import torch_pruning  # here and not above: who reads results needs no peer

    traces, cuts = [], []
    model = dense
    for _ in range(repeats):
        model = copy.deepcopy(dense)

        def trace(model: nn.Module = model) -> Any:
            return torch_pruning.pruner.MagnitudePruner(
                model,
                example,
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=0.3,  # of channels: about half of the MACs
                ignored_layers=[model.get_submodule("fc")],
                round_to=8,
            )

        pruner, seconds = _timed(trace)
        traces.append(seconds)
        _, seconds = _timed(pruner.step)
        cuts.append(seconds)
    return traces, cuts, model


class _Timed(ChannelPruning):
    """Notes how long the hook took in which it cut."""

    seconds = 0.0

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Time the longest call."""
        began = time.process_time()
        super().on_train_batch_end(*args, **kwargs)
        self.seconds = max(self.seconds, time.process_time() - began)


class _ResNet50(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = resnet50(num_classes=10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def _cut_in_fit_s() -> float:
    """One cut after the second step of a fit, all that the callback does at a cut included."""
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8))
    schedule = Schedule("constant", begin=2, end=2, update_every=1)
    pruning = _Timed(target_macs_ratio=RATIO, schedule=schedule, num_calibration_batches=1)
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[pruning],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(_ResNet50(), DataLoader(data, batch_size=2))
    return pruning.seconds


def _timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    gc.collect()
    began = time.process_time()
    result = call(*arguments)
    return result, time.process_time() - began


# --- Latency --------------------------------------------------------------------------------------


def latency(quick: bool = False) -> list[dict[str, Any]]:
    """Latency of slim MobileNet-v1 beside the dense one, in turns in one process."""
    small = build_model("mobilenet_v1", 10, width=0.5)
    _load_if_there(small, "mobilenetv1-0.5-cifar10-jpeg")
    rows = [_latency("MobileNet-v1 × 0.5, 32 × 32", small, size, 32, quick) for size in (1, 32)]
    if not quick:
        large = build_model("mobilenet_v1", 1000, input_size=224)
        rows.append(_latency("MobileNet-v1, 224 × 224", large, 1, 224, quick))
    return rows


def _load_if_there(network: nn.Module, name: str) -> None:
    """Trained weights from the assets; without them the network keeps its own, as fast as those."""
    if os.environ.get(ASSETS_VARIABLE):
        load_weights(network, weights_path(name))


def _latency(
    name: str, dense: nn.Module, batch_size: int, image_size: int, quick: bool
) -> dict[str, Any]:
    dense.eval()
    images = torch.randn(batch_size, 3, image_size, image_size)
    groups, layer_macs = _trace(dense, torch.randn(2, 3, image_size, image_size))
    slim = copy.deepcopy(dense)
    scores = channel_importance(dense, groups, "l2")
    goal = ChannelGoal(target_macs_ratio=RATIO)
    plan = goal.resolve(groups, dense, scores, layer_macs, _no_latency)
    cut_channels(slim, groups, choose_channels(groups, plan, scores))
    compared = compare_latency(
        dense,
        slim,
        images,
        num_threads=1,
        repeats=20 if quick else 100,
        min_duration_s=0.0 if quick else 10.0,
    )
    return {
        "model": name,
        "batch_size": batch_size,
        "macs_ratio": count_macs(slim, images) / count_macs(dense, images),
        "dense": asdict(compared.a),
        "slim": asdict(compared.b),
        "latency_ratio": compared.ratio,
        "latency_ratio_p10": compared.ratio_p10,
        "latency_ratio_p90": compared.ratio_p90,
    }


# --- Sensitivity ----------------------------------------------------------------------------------


def sensitivity_point(quick: bool = False) -> dict[str, Any]:
    """What a sensitivity point of ResNet-20 costs beside evaluating the same slim model."""
    network = build_model("resnet20", 10)
    _load_if_there(network, "resnet20-cifar10-jpeg")
    num_images = 1024 if quick else 5000
    torch.manual_seed(0)
    images = torch.randn(num_images, 3, 32, 32)
    labels = torch.arange(num_images) % 10

    batches = list(zip(torch.split(images, 256), torch.split(labels, 256), strict=True))

    def evaluate(model: nn.Module) -> dict[str, float]:
        model.eval()
        with torch.inference_mode():
            right = [int((model(x).argmax(1) == y).sum()) for x, y in batches]
        return {"top1": sum(right) / num_images}

    groups = find_channel_groups(network, lambda m: m(images[:2]))
    scores = channel_importance(network, groups, "l2")
    ratios = point_overhead(network, groups, scores, evaluate, repeats=6 if quick else 15)
    time_ratio = Ratio.of_rounds(ratios).as_json()
    return {"model": "resnet20", "num_images": num_images, "time_ratio": time_ratio}
