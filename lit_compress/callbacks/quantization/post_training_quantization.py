"""PostTrainingQuantization, the callback that quantizes the network when training has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_compress.callbacks.base import CompressionCallback
from lit_compress.callbacks.lightning import tracking
from lit_compress.callbacks.lightning.loader_states import fresh_loaders
from lit_compress.callbacks.lightning.method_wrapping import MethodWrapper
from lit_compress.callbacks.lightning.network_calls import (
    find_network,
    is_compiled,
    name_of_network,
)
from lit_compress.callbacks.lightning.training_sample import TrainingSample
from lit_compress.callbacks.lightning.validation_in_fit import validation_in_fit
from lit_compress.callbacks.quantization.post_training_result import PostTrainingResult
from lit_compress.callbacks.quantization.quantization_aware_training import (
    QuantizationAwareTraining,
)
from lit_compress.callbacks.quantization.quantizers_in_fit import clustered_weights
from lit_compress.callbacks.search.searched import (
    SEARCHED,
    LayerBits,
    declared_bits,
    found_bits,
)
from lit_compress.callbacks.stage_order import Stage, StageSpan
from lit_compress.compress.quantization.formats.fixed_point import FixedPoint
from lit_compress.compress.quantization.formats.linear_kernels import torchao_weights_readable
from lit_compress.compress.quantization.post_training import (
    Correction,
    PostTrainingMethod,
    PostTrainingOutcome,
    PostTrainingScheme,
    quantize_after_training,
)
from lit_compress.compress.quantization.ranges import RangeKind
from lit_compress.compress.quantization.sizes import stored_bytes
from lit_compress.compress.quantization.stored import (
    QUANTIZATION_KEY,
    quantization_records,
    take_quantization,
)
from lit_compress.search.search_result import SearchResult, Space
from lit_compress.search.settings import CandidateSettings

__all__ = ["PostTrainingQuantization"]

_FILE = "quantized.ckpt"
_CHANGING_WEIGHTS = ("equalization", "adaround")


class PostTrainingQuantization(CompressionCallback):
    """Quantizes a network at the end of ``Trainer.fit``, with batches of its training data.

    For a network that is trained already, ``Trainer(max_epochs=0)``. Ranges come from the first
    training batches as ``training_step`` gives them to the network (Jacob et al. 2018, section 3;
    Krishnamoorthi 2018, section 3). The user's validation runs before and after, and the difference
    is printed, logged and kept as :attr:`result`.

    The module stays quantized: ``Trainer.test`` reports the accuracy of integers, and exports have
    exactly these ranges. Its layers stay the modules that they were. The checkpoint
    ``quantized.ckpt`` is written beside the others; :func:`lit_compress.load_compressed` opens it.

    Logged to every logger: ``quantization/<metric>_before`` and ``quantization/<metric>_after`` for
    each metric of the validation.

    Args:
        method: ``"static"``: integers for weights and activations, ranges found by calibration;
            what runtimes execute. ``"dynamic"``: ranges of activations found for each batch.
            ``"weight_only"``: activations stay in floating point. ``"float16"``, ``"bfloat16"``:
            half precision, float32 in and out. ``"fixed_point"``: as ``fixed_point`` says.
            ``"int8_dynamic_linear"``, ``"int8_weight_only_linear"``,
            ``"int4_weight_only_linear"``: linear layers on torchao's kernels in eager torch.
        weight_bits: Bits of weights, 2 to 8, for the first three methods.
        activation_bits: Bits of activations, 2 to 8, for the first two.
        layer_bits: Bits of weights by name pattern of the layer, where they differ, for the first
            three; or ``"searched"``: what the ``RatioSearch`` listed before it finds.
        ranges: How ranges of activations come from the values seen, for ``"static"``: their least
            and largest (``"minmax"``), these averaged over batches (``"moving_average"``), or from
            a histogram by least information lost (``"histogram"``), by a ``percentile`` or by
            least squared error (``"mse"``).
        percentile: Percent of the values inside of the range, in (50, 100], for
            ``ranges="percentile"``.
        corrections: For few bits and depthwise layers, with the first three methods: any of
            ``"equalization"`` (Nagel et al. 2019, section 4.1), ``"adaround"`` (Nagel et al. 2020)
            and ``"bias_correction"`` (Nagel et al. 2019, section 4.2), applied in this order.
        num_calibration_batches: Training batches to draw, at least 1.
        ignored_layers: Name patterns of layers left in floating point. Patterns match names in
            the LightningModule and in its network: ``"model.layer1.*"`` or ``"layer1.*"``.
        fixed_point: Method, bits and overflow rate of ``"fixed_point"``; ``None`` for the defaults
            of :class:`~lit_compress.compress.quantization.formats.fixed_point_record.FixedPoint`.
        dirpath: Folder for the checkpoint; by default that of the Trainer's ``ModelCheckpoint``, or
            else of its logger.
        save: Whether to write it.
        network: Dotted name of the network in the LightningModule; by default the only child that
            holds all parameters, or else the module itself.
        avoid_saturation: Whether the scales of 8-bit weights leave room for the sums of two
            products, which saturate on x86 processors without VNNI.

    Raises:
        ValueError: At construction, if an argument is out of range, of the wrong kind or of another
            method. When the fit ends, if a weight or an activation (which is named) is NaN, a batch
            does not run through the network, a name pattern matches nothing or nothing can be
            quantized; the module is then as it was.
        ModuleNotFoundError: When the fit ends, if the method needs torchao and it is missing.
        MisconfigurationException: When the fit begins, if the module is quantized already or is to
            be trained with integers in the same fit, is compiled, or the strategy shards parameters
            or spawns processes. When it ends, if there is no training batch, or a correction would
            undo clusters.

    Example::

        trainer = Trainer(max_epochs=0, callbacks=[PostTrainingQuantization()])
        trainer.fit(model, datamodule)
    """

    changes_weights = False
    changes_structure = True
    compression_stage: Stage = "quantize"
    searched_space: Space = "bits"

    def __init__(
        self,
        method: PostTrainingMethod = "static",
        weight_bits: int = 8,
        activation_bits: int | None = 8,
        layer_bits: LayerBits | None = None,
        ranges: RangeKind = "mse",
        percentile: float = 99.99,
        corrections: Sequence[Correction] = (),
        num_calibration_batches: int = 32,
        ignored_layers: Sequence[str] | None = None,
        fixed_point: FixedPoint | None = None,
        dirpath: str | Path | None = None,
        save: bool = True,
        network: str | None = None,
        avoid_saturation: bool = True,
    ) -> None:
        super().__init__()
        self.scheme = PostTrainingScheme(
            method, weight_bits, activation_bits, declared_bits(layer_bits, network), ranges,
            percentile, corrections, ignored_layers or (), fixed_point, avoid_saturation,
        )  # fmt: skip
        self._is_searched = layer_bits == SEARCHED
        if self._is_searched:
            replace(self.scheme, layer_bits={"*": weight_bits})  # refused by other methods
        if isinstance(num_calibration_batches, bool) or not (
            isinstance(num_calibration_batches, int) and num_calibration_batches >= 1
        ):
            raise ValueError(
                f"num_calibration_batches is {num_calibration_batches!r}; give a whole number of "
                "at least 1."
            )
        self.num_calibration_batches = num_calibration_batches
        self.dirpath = dirpath
        self.save = save
        self.network = network
        self.result: PostTrainingResult | None = None
        """What it cost and saved; ``None`` until a fit has ended."""

    # --- The run ----------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work; let checkpoints be read that hold torchao's weights."""
        super().setup(trainer, pl_module, stage)
        if self.scheme.method.endswith("_linear"):
            files = trainer.strategy.checkpoint_io
            self.bindings.add(MethodWrapper(files, "load_checkpoint", _reading_torchao))

    def check_run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a second quantization in the same Trainer."""
        self._check_only_quantization(trainer)
        super().check_run(trainer, pl_module)

    def start_or_resume(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: dict[str, Any] | None
    ) -> None:
        """Refuse a module that is quantized or compiled already."""
        fresh_loaders(trainer)  # what is calibrated on in the end
        quantized = quantization_records(pl_module)
        if quantized:
            raise MisconfigurationException(
                f"{type(self).__name__} quantizes float networks, and "
                f"{next(iter(quantized)) or type(pl_module).__name__!r} is quantized already. "
                "Begin with the float checkpoint, or leave the callback out."
            )
        if is_compiled(pl_module):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} is compiled by torch.compile, which has fixed what it "
                f"computes. Train it without {type(self).__name__}, then quantize the uncompiled "
                "module with Trainer(max_epochs=0)."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate, quantize, validate, and hand over what was found."""
        self.release()
        # Lightning has brought the module to the CPU by now, and leaves it there.
        pl_module.to(trainer.strategy.root_device)
        try:
            self.result = self._quantized(trainer, pl_module)
            self._tell_callbacks(trainer, pl_module, self.result)
            self._hand_over(trainer, self.result)
        finally:
            pl_module.cpu()

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks in one Trainer apart."""
        return self._generate_state_key(network=self.network)

    def fit_state(self) -> None:
        """Nothing: it happens at once, when the fit has ended."""

    def stage_span(self, resolved: bool) -> StageSpan | None:
        """The end of the run."""
        return None if resolved else StageSpan(1.0, 1.0)

    # --- A search before it -----------------------------------------------------------------------

    @property
    def waits_for_search(self) -> bool:
        """Whether ``layer_bits="searched"``."""
        return self._is_searched

    def take_searched(self, result: SearchResult, candidates: CandidateSettings) -> None:
        """Work with the bits that were found from now on."""
        self.scheme = replace(self.scheme, layer_bits=found_bits(result))

    # --- Details ----------------------------------------------------------------------------------

    def _quantized(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> PostTrainingResult:
        network = find_network(pl_module, self.network)
        validate = validation_in_fit(trainer, pl_module, network) or dict
        before, size_before = validate(), stored_bytes(network)
        outcome = self._quantize(trainer, pl_module, network)
        if trainer.world_size > 1:
            _as_rank_zero(trainer, pl_module)
        result = PostTrainingResult.of(
            self._description, outcome, (before, validate()), (size_before, stored_bytes(network))
        )
        if not self.save or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return result
        path = self._folder(trainer) / _FILE
        trainer.save_checkpoint(path, weights_only=True)
        return replace(result, checkpoint=str(path))

    def _quantize(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module
    ) -> PostTrainingOutcome:
        clustered = clustered_weights(trainer, pl_module, network)
        harmful = [c for c in self.scheme.corrections if c in _CHANGING_WEIGHTS]
        if clustered and harmful:
            raise MisconfigurationException(
                f"{harmful[0]!r} gives the weights of a layer values of their own, and those of "
                f"{clustered[0]!r} are clustered; leave it out of corrections, or the clustering "
                "out of the run."
            )
        wanted = self.scheme.num_batches(self.num_calibration_batches)
        inputs = TrainingSample(trainer, pl_module, network, wanted).inputs if wanted else []
        return quantize_after_training(
            network,
            self.scheme,
            [(one.args, one.kwargs) for one in inputs],
            lambda net, batch: net(*batch[0], **batch[1]),
            clustered,
            name_of_network(pl_module, network),
        )

    @property
    def _description(self) -> str:
        """The method in words."""
        scheme = self.scheme
        words: list[str] = [scheme.method]
        if scheme.method in ("static", "dynamic", "weight_only"):
            words.append(f"{scheme.weight_bits}-bit weights")
            if scheme.layer_bits:
                words.append(f"but {scheme.layer_bits}")
            if scheme.method != "weight_only":
                words.append(f"{scheme.activation_bits}-bit activations")
        if scheme.method == "static":
            words.append(f"{scheme.ranges} ranges")
        return ", ".join([*words, *scheme.corrections])

    def _folder(self, trainer: pl.Trainer) -> Path:
        checkpoints = trainer.checkpoint_callback
        beside = checkpoints.dirpath if isinstance(checkpoints, ModelCheckpoint) else None
        return Path(self.dirpath or beside or trainer.log_dir or trainer.default_root_dir)

    def _tell_callbacks(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, result: PostTrainingResult
    ) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            tell = getattr(callback, "on_network_quantized", None)
            if tell is not None:
                tell(trainer, pl_module, result.metrics_before, result.metrics_after)

    def _hand_over(self, trainer: pl.Trainer, result: PostTrainingResult) -> None:
        rank_zero_info(f"\n{type(self).__name__}: {result}")
        metrics = {f"quantization/{n}_before": v for n, v in result.metrics_before.items()}
        metrics |= {f"quantization/{n}_after": v for n, v in result.metrics_after.items()}
        tracking.log_metrics(trainer, metrics)
        columns = ("measure", "before", "after", "change")
        tracking.log_table(trainer, "quantization/result", columns, result.rows())

    def _check_only_quantization(self, trainer: pl.Trainer) -> None:
        name = type(self).__name__
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        if any(isinstance(other, QuantizationAwareTraining) for other in others):
            raise MisconfigurationException(
                f"{name} and QuantizationAwareTraining are in the same Trainer, and a network is "
                "quantized once. Keep the former for a network that is trained, the latter to "
                "train it with integers."
            )
        if any(isinstance(other, PostTrainingQuantization) for other in others):
            raise MisconfigurationException(
                f"there are two {name} callbacks in the Trainer, and a network is quantized once; "
                "leave one out."
            )


def _as_rank_zero(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Take over what the first process found; each one drew other batches."""
    own = {"state_dict": pl_module.state_dict(), QUANTIZATION_KEY: quantization_records(pl_module)}
    first: Mapping[str, Any] = trainer.strategy.broadcast(own, src=0)
    take_quantization(pl_module, first)
    pl_module.load_state_dict(first["state_dict"])


def _reading_torchao(load: Any, *args: Any, **kwargs: Any) -> Any:
    with torchao_weights_readable():  # they take no function that says where they go
        return load(*args, **{**kwargs, "map_location": "cpu"})
