"""Runs of the command line that the tests share."""

import pytest

from lit_compress.cli import main

TASK = [
    "--model=ImageClassifier",
    "--model.model=digits_cnn",
    "--model.model_args.width=4",
    "--data=DigitsDataModule",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=1",
    "--trainer.logger=CSVLogger",
    "--trainer.logger.save_dir=.",
    "--trainer.logger.name=runs",
]


@pytest.fixture
def task():
    """Arguments of a small run on the digits, a second long."""
    return list(TASK)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """The folder of a finished run at 50 % sparsity: config.yaml, checkpoints/, report."""
    folder = tmp_path_factory.mktemp("run")
    task = [word.replace("save_dir=.", f"save_dir={folder}") for word in TASK]
    arguments = [
        "--sparsity.final_sparsity=0.5",
        "--summary.latency=false",
        "--summary.plots=false",
    ]
    assert main(["fit", *task, *arguments]) == 0
    return folder / "runs" / "version_0"


@pytest.fixture(scope="session")
def checkpoint(run_folder):
    """The checkpoint of that run."""
    (path,) = (run_folder / "checkpoints").glob("*.ckpt")
    return path
