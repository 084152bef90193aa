"""Commands and configurations in the documentation are accepted as they stand."""

import shlex
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser

from lit_compress.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TRAINING = ("fit", "validate", "test", "predict")
LOOKING = ("report", "benchmark", "analyze", "export", "quantize", "search")


def check_commands(example):
    """``lit-compress`` commands parse; those that only look run up to the missing checkpoint."""
    for line in example.parsed.strip().splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["lit-compress"]:
            continue
        arguments = [str(ROOT / w) if w.startswith("recipes/") else w for w in words[1:]]
        asks = any(word.endswith("help") for word in arguments)
        if asks or arguments[0] not in TRAINING:
            status = main(arguments)
        else:
            status = main([*arguments, "--print_config"])
        missing = arguments[0] in LOOKING and not asks
        assert status == (2 if missing else 0), line


def check_configuration(example):
    """A YAML block is accepted by ``fit``, whatever it leaves open."""
    path = Path("snippet.yaml")
    path.write_text(example.parsed)
    assert main(["fit", "--model=ImageClassifier", f"--config={path}", "--print_config"]) == 0


def document_of(page):
    parsers = [
        CodeBlockParser(language="bash", evaluator=check_commands),
        CodeBlockParser(language="yaml", evaluator=check_configuration),
    ]
    return Sybil(parsers=parsers, path=str(page.parent), patterns=[page.name]).parse(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_configurations(page):
    for example in document_of(page).examples():
        example.evaluate()


def test_snippets_are_found_and_may_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\nlit-compress fitt\n```\n\n```yaml\nsparsty: {final_sparsity: 1}\n```\n"
    )
    examples = list(document_of(page).examples())
    assert len(examples) == 2
    for example in examples:
        with pytest.raises(AssertionError):
            example.evaluate()


def test_readme_opens_with_its_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    run, test = (line for line in lines if line.startswith("pip install uv && uv run "))
    assert "pytest" in test
    words = shlex.split(run.removeprefix("pip install uv && uv run "))
    assert words[:3] == ["lit-compress", "fit", "--config"]
    assert (ROOT / words[3]).is_file()
    assert lines.index(run) < 20
