"""``lit-compress quantize``: quantize a trained model, and validate it before and after."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from inspect import signature
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer

from lit_compress.callbacks.quantization.post_training_quantization import PostTrainingQuantization
from lit_compress.cli.inspection import fill
from lit_compress.cli.parsing import CommandParser
from lit_compress.cli.subject import Subject, find_subject, quiet
from lit_compress.compress.packing.checkpoint import write_packed_checkpoint
from lit_compress.files import write_text
from lit_compress.measure.table import megabytes
from lit_compress.plain import to_plain

__all__ = ["quantize"]

_OWN = ("dirpath", "save")  # what this command decides


def quantize(args: Sequence[str]) -> None:
    """Quantize the model of a checkpoint, print what it cost and saved, and write it.

    Args:
        args: The command's arguments; see ``lit-compress quantize --help``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or does not fit the model, an option is out of range or of
            another method, the model is not known, quantized already or cannot be quantized, or
            there is nothing to write.
        MisconfigurationException: If the module has no training data.
        ModuleNotFoundError: If the method needs torchao and it is missing.
    """
    parser = _parser()
    options = parser.parse_args(list(args))
    if options.output is None and options.packed is None:
        raise ValueError("nothing says where to write the model; give --output FILE.")
    subject = _filled_subject(options)
    given = parser.instantiate_classes(options)
    names = set(signature(PostTrainingQuantization).parameters).difference(_OWN)
    callback = PostTrainingQuantization(save=False, **{name: given[name] for name in names})
    trainer = _run(options, subject, callback)
    result = callback.result
    assert result is not None, "the fit has not ended"
    print(result)
    written = _write(options, trainer, subject.module)
    print(
        "\n" + "\n".join(f"{name}: {path}, {megabytes(n)}" for name, (path, n) in written.items())
    )
    if options.json is not None:
        files = {name: {"path": path, "bytes": size} for name, (path, size) in written.items()}
        text = json.dumps({**to_plain(result), "files": files}, indent=2)
        write_text(options.json, text + "\n")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="lit-compress quantize",
        description="Quantize a trained model with batches of its training data, and validate it "
        "before and after.",
        usage="lit-compress quantize [CHECKPOINT] [--config FILE]... --output FILE [options]",
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", type=str, help="A Lightning checkpoint or a state dict; without "
        "one, the model as the configuration builds it.")  # fmt: skip
    add("--ckpt_path", "--ckpt-path", type=str | None, help="The same by name.")
    add("-c", "--config", action="append", type=str, help="The run's configuration, as given to "
        "fit; by default the config.yaml beside the checkpoint.")  # fmt: skip
    add("--output", type=str | None, help="Write the quantized checkpoint here.")
    add("--packed", type=str | None, help="Write a packed file here: integers in their bits.")
    add("--json", type=str | None, help="Write the figures here.")
    add("--limit_val_batches", "--limit-val-batches", type=int | float | None,
        help="Validate on the first so many batches, or such a part of them.")  # fmt: skip
    add("--accelerator", type=str, default="auto", help="As for the Trainer.")
    add("--assets", type=str | None, help="Folder with data/ and weights/.")
    parser.add_class_arguments(PostTrainingQuantization, as_group=False, skip=set(_OWN))
    return parser


def _filled_subject(options: Namespace) -> Subject:
    """The model with its weights."""
    if options.assets is not None:
        os.environ["LIT_COMPRESS_ASSETS"] = options.assets
    if options.checkpoint is not None and options.ckpt_path is not None:
        raise ValueError(
            f"the checkpoint is given twice, as {options.checkpoint!r} and as --ckpt_path "
            f"{options.ckpt_path!r}; leave one out."
        )
    checkpoint = options.checkpoint or options.ckpt_path
    subject = find_subject(checkpoint, options.config or (), None)
    if subject is None:
        raise ValueError(
            "nothing says which model to quantize; give the configuration of its run as "
            "--config FILE."
        )
    if checkpoint is not None:
        fill(subject.network, checkpoint)
    return subject


def _run(options: Namespace, subject: Subject, callback: PostTrainingQuantization) -> Trainer:
    """A fit of no epochs, at whose end the callback quantizes."""
    with quiet():
        trainer = Trainer(
            accelerator=options.accelerator,
            devices=1,
            max_epochs=0,
            num_sanity_val_steps=0,
            limit_val_batches=options.limit_val_batches,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(subject.module, subject.data)
    return trainer


def _write(
    options: Namespace, trainer: Trainer, module: LightningModule
) -> dict[str, tuple[str, int]]:
    """Paths and real sizes of the files, by what they are."""
    written = {}
    if options.output is not None:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(options.output, weights_only=True)
        written["checkpoint"] = (options.output, os.path.getsize(options.output))
    if options.packed is not None:
        size = write_packed_checkpoint(options.packed, module)
        written["packed"] = (options.packed, size)
    return written
