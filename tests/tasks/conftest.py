"""Folders that the tests of the tasks share."""

import os

import numpy as np
import pytest
from PIL import Image

from lit_compress.tasks.assets import ASSETS_VARIABLE, CACHE_VARIABLE


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of the test's own."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def real_assets():
    """The real assets folder; the test is skipped where none is named."""
    folder = os.environ.get(ASSETS_VARIABLE)
    if not folder:
        pytest.skip(f"{ASSETS_VARIABLE} names no folder with data/ and weights/")
    return folder


@pytest.fixture
def make_images():
    """Write random images: ``make_images(folder, {"cat": 3, ...}, size=(8, 8))``."""

    def make(folder, counts, size=(8, 8), suffix=".png"):
        random = np.random.default_rng(0)
        for name, count in counts.items():
            (folder / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{index:03d}{suffix}")
        return folder

    return make
