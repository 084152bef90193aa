"""What every test runs under: one thread, a folder of its own, W&B offline, assets if there."""

import os

import pytest
import torch

# Two test processes share two cores; more threads would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the assets where they are missing, and say so."""
    if os.environ.get("LIT_COMPRESS_ASSETS"):
        return
    reason = "LIT_COMPRESS_ASSETS names no folder with data/ and weights/"
    for item in items:
        if "assets" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs and checkpoints of a test go to a folder that nobody else uses."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
