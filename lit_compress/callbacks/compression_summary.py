"""CompressionSummary, the callback that measures and reports what a run's compression gained."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lit_compress.callbacks.lightning import tracking
from lit_compress.callbacks.lightning.network_calls import (
    NetworkCall,
    NetworkCalls,
    find_network,
    is_compiled,
)
from lit_compress.compress.packing.checkpoint import write_packed_checkpoint
from lit_compress.compress.quantization.network import Quantization, without_quantizers
from lit_compress.compress.quantization.quantizers import WeightQuantizer
from lit_compress.measure import (
    CompressionReport,
    ExampleInputs,
    ModelMeasures,
    compare_latency,
    layer_complexity,
    measure_model,
)
from lit_compress.measure.inputs import with_batch_size
from lit_compress.plain import from_plain, to_plain
from lit_compress.plotting import plot_report

__all__ = ["CompressionSummary"]

_NOTHING: tuple[int, ...] = ()


class CompressionSummary(pl.Callback):
    """Measures the network before and after ``Trainer.fit`` and reports the difference.

    The dense side is the network as it is when the fit begins. When the fit ends, the report is
    printed, written to ``compression_report.json``, ``.md`` and PNG plots, and sent to the loggers
    (W&B: table, plots and an artifact; TensorBoard: text). It is also the attribute ``report``.
    A network on integers or with clustered weights is also written to ``packed.ckpt``, which
    :func:`lit_compress.load_compressed` opens; its size is among the compressed ones.

    Metrics are those that validation logged: the compressed side has the last ones of the fit; the
    dense side the last ones that were taken before any callback changed the network. A run that
    compresses from its first step has those only if the Trainer's sanity check is a whole
    validation: ``Trainer(num_sanity_val_steps=-1)``.

    The first example of the first batch that the network sees is the input for MACs and
    latency; a compiled network is not looked into, and has neither. Both latencies are taken in
    turns when the fit ends, for which a copy of the dense network is kept on the CPU. A resumed run
    has no such copy; its report has no latency.

    Args:
        dirpath: Where to write the files; by default the logger's folder, or else the Trainer's
            ``default_root_dir``.
        latency: Whether to measure latency, at batch size 1.
        plots: Whether to draw; needs matplotlib (``pip install 'lit-compress[report]'``).
        network: Dotted name of the network inside the LightningModule; by default the only child
            that holds all parameters, or else the module itself.

    Raises:
        ValueError: When the fit begins, if there is no module named ``network``.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        latency: bool = True,
        plots: bool = True,
        network: str | None = None,
    ) -> None:
        super().__init__()
        self.dirpath = dirpath
        self.latency = latency
        self.plots = plots
        self.network = network
        self.report: CompressionReport | None = None
        self._dense: ModelMeasures | None = None
        self._dense_state = _NOTHING  # weights, zeros among them and quantizers at work, before
        self._dense_metrics: dict[str, float] = {}
        self._latest_metrics: dict[str, float] = {}
        self._latest_state = _NOTHING  # the same when the latest metrics were taken
        self._dense_copies: list[nn.Module] = []  # in a list, where nobody takes it for a child
        self._inputs: ExampleInputs | None = None
        self._watching = ExitStack()
        self._calls: NetworkCalls | None = None
        self._restored = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out early what cannot be had."""
        if stage == "fit" and self.plots and importlib.util.find_spec("matplotlib") is None:
            rank_zero_warn(
                "CompressionSummary draws no plots: matplotlib is not installed. Install it with "
                "pip install 'lit-compress[report]', or give plots=False."
            )
            self.plots = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the dense network and wait for an input."""
        self._watching.close()
        self._inputs = None
        network = self._network_of(pl_module)
        if not self._restored:
            self._dense, self._dense_metrics = None, {}
            self._dense_state = _numbers(network)
            self._dense_copies = [copy.deepcopy(network).cpu()] if trainer.is_global_zero else []
        self._restored = False
        self._latest_metrics, self._latest_state = {}, _NOTHING
        if trainer.is_global_zero and not is_compiled(pl_module):
            self._calls = NetworkCalls(network, requires_grad=False)
            self._calls.install()
            self._watching.callback(self._calls.remove)
            self._watching.enter_context(self._calls.recording())

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Keep the first input, already in the sanity check."""
        self._keep_first_input()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Keep the first input."""
        self._keep_first_input()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the metrics, and whether they are of the dense or of a compressed network."""
        partial = trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf")
        if trainer.state.fn != TrainerFn.FITTING or partial:
            return
        self._latest_metrics = _validation_metrics(trainer)
        self._latest_state = _numbers(self._network_of(pl_module))
        if self._latest_state == self._dense_state:
            self._dense_metrics = self._latest_metrics

    def on_network_quantized(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        before: Mapping[str, float],
        after: Mapping[str, float],
    ) -> None:
        """Take the metrics that ``PostTrainingQuantization`` found before and after."""
        network = self._network_of(pl_module)
        if not self._dense_metrics and _numbers(network)[:2] == self._dense_state[:2]:
            self._dense_metrics = dict(before)
        self._latest_metrics = dict(after)
        self._latest_state = _numbers(network)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, compare, print, write and log."""
        self._watching.close()
        folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero:
            return
        network = self._network_of(pl_module)
        self.report = self._make_report(network, pl_module.device)
        packed = self._pack(trainer, pl_module, folder / "packed.ckpt")
        rank_zero_info(f"\n{self.report}")
        files = [
            *packed,
            self.report.save(folder / "compression_report.json"),
            self.report.save_markdown(folder / "compression_report.md"),
        ]
        plots = plot_report(self.report, folder) if self.plots else []
        rank_zero_info(f"The compression report is in {folder}.")
        columns, rows = ["measure", "dense", "compressed", "change"], self.report.rows()
        tracking.log_table(trainer, "compression/report", columns, rows)
        tracking.log_images(trainer, "compression/plots", plots)
        tracking.log_artifact(
            trainer, "compression-report", "report", [*files, *plots], self.report.kept()
        )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the network as it was."""
        self._watching.close()

    def state_dict(self) -> dict[str, Any]:
        """The dense side, as plain data."""
        if self._dense is None and self._dense_copies:
            self._dense = measure_model(self._dense_copies[0], self._inputs, name="dense")
        return {
            "dense": None if self._dense is None else to_plain(self._dense),
            "dense_metrics": self._dense_metrics,
            "dense_state": list(self._dense_state),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the dense side of the run that is resumed."""
        dense = state_dict["dense"]
        self._dense = None if dense is None else from_plain(ModelMeasures, dense, "dense")
        self._dense_metrics = dict(state_dict["dense_metrics"])
        self._dense_state = tuple(state_dict["dense_state"])
        self._dense_copies, self._restored = [], True

    # --- Details ----------------------------------------------------------------------------------

    def _network_of(self, pl_module: pl.LightningModule) -> nn.Module:
        network = find_network(pl_module, self.network)
        original: nn.Module = getattr(network, "_orig_mod", network)
        return original

    def _keep_first_input(self) -> None:
        if self._calls is None or self._inputs is not None:
            return
        calls = self._calls.take()
        if not calls:
            return
        self._inputs = _first_example(calls[0])
        self._watching.close()
        if self._dense_copies and self._dense is None:
            dense = self._dense_copies[0]
            on_cpu = tree_map_only(Tensor, Tensor.cpu, self._inputs)
            self._dense = measure_model(dense, on_cpu, name="dense")
        if not self.latency:
            self._dense_copies = []

    def _pack(self, trainer: pl.Trainer, pl_module: pl.LightningModule, file: Path) -> list[Path]:
        """Write what packing makes smaller, and note the size."""
        assert self.report is not None
        clustered = any(getattr(c, "clustered_names", ()) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if not clustered and not _at_work(self._network_of(pl_module)):
            return []
        try:
            size = write_packed_checkpoint(file, pl_module)
        except ValueError as error:  # a state that is no plain data must not end the run
            rank_zero_warn(f"CompressionSummary writes no packed file: {error}")
            return []
        self.report = _with_packed_size(self.report, size)
        return [file]

    def _make_report(self, network: nn.Module, device: torch.device) -> CompressionReport:
        dense, notes = self._dense, []
        if dense is None:
            dense = measure_model(self._dense_copies[0], self._inputs, name="dense")
        if quantizations := _at_work(network):
            every = [quantizer for found in quantizations for quantizer in found.quantizers]
            bits = sorted({q.grid.bits for q in every if isinstance(q, WeightQuantizer)})
            notes.append(
                f"The network is quantized, its weights to {' and '.join(map(str, bits))} bits. "
                "Sizes but the packed one, and latency, are of its weights in floating point; the "
                "latency of integers is the exported file's."
            )
        counted = without_quantizers(copy.deepcopy(network)) if quantizations else network
        compressed = measure_model(counted, self._inputs, name="compressed")
        metrics = self._latest_metrics
        if metrics and self._latest_state != _numbers(network):
            metrics = {}
            notes.append("The network was not validated after it was last changed.")
        if self._inputs is None:
            notes.append("No input was seen, so there are no MACs and no latency.")
        elif self.latency and self._dense_copies:
            copied = self._dense_copies[0].to(device)
            times = compare_latency(copied, counted, self._inputs)
            dense = replace(dense, latency=(times.a,))
            compressed = replace(compressed, latency=(times.b,))
        elif self.latency:
            notes.append("The run was resumed, so the dense network was not there to be timed.")
        self._dense_copies = []
        return CompressionReport(
            dense=replace(dense, metrics=self._dense_metrics),
            compressed=replace(compressed, metrics=metrics),
            notes=tuple(notes),
        )


def _numbers(network: nn.Module) -> tuple[int, ...]:
    """Weights, zeros among them, and quantizers at work: by these a changed network is known.

    Biases and norms are left out; they often begin as zeros and do not stay so.
    """
    rows = layer_complexity(network)
    weights = sum(row.num_weights for row in rows)
    zeros = weights - sum(row.num_nonzero_weights for row in rows)
    return weights, zeros, sum(len(found.quantizers) for found in _at_work(network))


def _with_packed_size(report: CompressionReport, size: int) -> CompressionReport:
    sizes = {**report.compressed.compressed_size_bytes, "packed": size}
    return replace(report, compressed=replace(report.compressed, compressed_size_bytes=sizes))


def _at_work(network: nn.Module) -> list[Quantization]:
    return [m for m in network.modules() if isinstance(m, Quantization) and m.quantizing]


def _validation_metrics(trainer: pl.Trainer) -> dict[str, float]:
    """What this validation logged, without what training left in ``callback_metrics``."""
    results = trainer.fit_loop.epoch_loop.val_loop._results
    logged = results.metrics(on_step=False)["callback"]
    names = [name for name in logged if name != "sparsity"]
    return {n: float(trainer.callback_metrics[n]) for n in names if n in trainer.callback_metrics}


def _first_example(call: NetworkCall) -> ExampleInputs | None:
    """The inputs of a call, cut to one example; ``None`` if they cannot be."""
    inputs: ExampleInputs = call.kwargs or call.args
    if call.args and call.kwargs:
        return None
    detached = tree_map_only(Tensor, Tensor.detach, inputs)
    try:
        return with_batch_size(detached, 1)
    except ValueError:
        return None
