"""Every Python snippet of the documentation runs, page by page, in one namespace each."""

import os
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SYBIL = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_snippets_run(page, monkeypatch, tmp_path):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("LIT_COMPRESS_CACHE", str(tmp_path))
    document = SYBIL.parse(page)
    for example in document:
        example.evaluate()
    fences = page.read_text().count("```python")
    assert len(list(document)) >= fences
    assert os.path.exists(page)


def test_the_pages_hold_snippets():
    assert sum(page.read_text().count("```python") for page in PAGES) > 10
