"""The pages of the host libraries are true: their code runs where the library is, their links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
import warnings
from pathlib import Path

import pytest
import test_testing
import torch
from test_documentation import LINK, blocks

import ace
from ace.probing import default_dtype
from hosts import report

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "hosts").glob("*.md"))
ENVIRONMENTS = sorted((ROOT / "tests" / "hosts" / "environments").glob("*.txt"))


def imported(code: str) -> list[str]:
    """Top-level packages that a block imports."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [name for _, code in blocks(page) for name in imported(code) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed here: {', '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    with torch.random.fork_rng(), warnings.catch_warnings(), default_dtype():  # nequip asks for another
        warnings.simplefilter("ignore", ace.errors.ConstraintNotMet)
        for line, code in blocks(page):
            exec(compile("\n" * line + code, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_are_short_and_their_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [
        target for target in LINK.findall(text) if "://" not in target and not (page.parent / target).exists()
    ] == []
    assert len(text.splitlines()) <= 100


def test_the_tables_are_those_of_the_results() -> None:
    assert (report.FOLDER / "tables.inc").read_text(encoding="utf-8") == report.tables(report.read())


def test_no_host_has_failed() -> None:
    rows = report.read()
    assert rows
    assert [(row["host"], row["failed"]) for row in rows if row["failed"]] == []


def test_rows_are_merged_by_host_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    one = dict.fromkeys(report.COLUMNS, "a") | {"failed": "", "skipped": "compile: it does not"}
    report.write([one, {**one, "host": "b"}])
    report.write([{**one, "version": "2", "failed": "deepcopy"}])
    assert [(row["host"], row["version"]) for row in report.read()] == [("a", "2"), ("b", "a")]
    tables = (tmp_path / "tables.inc").read_text(encoding="utf-8")
    assert "a passed, failed: deepcopy, 1 skipped" in tables
    assert "- `compile` of a, b: it does not" in tables


def test_a_row_says_what_was_found() -> None:
    checks = {"summary": ("passed", ""), "compile": ("skipped", "why"), "pickle": ("failed", "")}
    row = report.row(test_testing.TestPoints, checks)
    assert row["relaxed"] == "2 Layer"
    assert (row["passed"], row["failed"], row["skipped"]) == ("1", "pickle", "compile: why")
    assert float(row["floor"]) < 1e-5 < 1e-3 < float(row["error"])
    assert "cannot be" in report.row(test_testing.Unrelaxable, checks)["relaxed"]


def test_the_extra_is_the_shared_environment() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = {re.split(r"[<>=~!]", name)[0] for name in project["optional-dependencies"]["hosts"]}
    lines = (ROOT / "tests/hosts/environments/shared.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0]: line for line in lines if line and not line.startswith(("#", "-"))}
    assert extra <= set(pins)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert set(pins.values()) <= set(constraints)


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_environments_are_pinned(path: Path) -> None:
    lines = [
        line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith(("#", "-c "))
    ]
    assert lines
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines)
