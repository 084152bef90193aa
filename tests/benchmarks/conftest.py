"""The benchmarks are scripts that import each other by name, and quiet Lightning when they run."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def _lightning_stays_as_loud_as_it_was() -> Iterator[None]:
    """For the tests that come after in the same process and listen to it."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)
