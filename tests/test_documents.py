"""Documents that speak of code are held to it. (docs/passes.md and the pass example: tests/passes/test_pipeline.py.)"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import click
import pytest

import hasten
from hasten.cli import COMMANDS, cli
from runtimes import tasks

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of the headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_version_is_one() -> None:
    assert hasten.__version__ == VERSION
    assert re.search(rf"^## {re.escape(VERSION)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_of_readme_parses_and_its_names_exist() -> None:
    assert python_blocks()
    methods = {name for kind in vars(tasks).values() if isinstance(kind, type) for name in dir(kind)}
    for block in python_blocks():
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            if node.value.id == "hasten":
                assert hasattr(hasten, node.attr), node.attr
            if node.value.id == "model":
                assert node.attr in methods, node.attr
        for name in re.findall(r"\bmodel\.(\w+)\(", block):
            assert name in methods, name


def test_the_commands_of_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`hasten ([a-z]+)", text)) | {"verify", "unpack"} & set(re.findall(r"`([a-z]+)\b", text))
    assert named == set(COMMANDS)
    for command, option in re.findall(r"`hasten ([a-z]+)[^`\n]*?(--[a-z-]+)", text):
        found = cli.get_command(click.Context(cli), command)
        assert found is not None
        assert option in {name for parameter in found.params for name in parameter.opts}, (command, option)


def test_the_rooms_of_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE)
    assert rooms == ["artifacts", "passes", "runtimes", "compiler", "hasten"]
    assert all((ROOT / room / "__init__.py").is_file() for room in rooms)
    for target in re.findall(r"^    make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "adr"
    listed = re.findall(r"\]\((\d{4}-[a-z0-9-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert listed == sorted(path.name for path in folder.glob("[0-9]*.md"))
    for name in listed:
        text = (folder / name).read_text(encoding="utf-8")
        assert all(f"**{part}.**" in text for part in ("Context", "Choice", "Price")), name
