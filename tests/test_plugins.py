"""A task, a model and a method of one's own: the files of the page on benchmarks, run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ace.errors import ConfigError
from benchmarks import plugins
from benchmarks.config import find, load_run
from benchmarks.models import MODELS

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


@pytest.fixture
def mine(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    text = text[text.index("## Add a task, a model, a method") : text.index("## Add a controller")]
    written = re.findall(r"`mine/(\S+)`[^`]*?\n\n```(?:python|yaml)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    [(name, content)] = re.findall(r"`mine/(configs/methods/\S+)` holds `(.*?)`", text)
    folder = tmp_path / "mine"
    for path, code in [*written, (name, content)]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(code, encoding="utf-8")
    assert {path.name for path in folder.rglob("*.*")} == {
        "spring.py",
        "my-spring.yaml",
        "linear.py",
        "half.py",
        "half.yaml",
    }
    return folder


def command(folder, *words, code=0):
    environment = {**os.environ, "ACE_PLUGINS": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ace.cli", *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stderr
    return done


def test_the_files_of_the_page_are_a_task_a_model_and_a_method(mine, tmp_path):
    suite = mine / "configs" / "suites" / "mine.yaml"
    suite.parent.mkdir()
    suite.write_text(
        "methods: [strict, half, ace]\n"
        "overrides: {steps: 40, eval_every: 20}\n"
        "grid: [{tasks: [my-spring], models: [linear]}]\n"
    )
    assert re.search(r"my-spring +egnn", command(mine, "tasks").stdout)
    command(mine, "suite", "mine", "--jobs", "2", "--out", tmp_path / "out")
    rows = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("summary.json")]
    assert {(row["task"], row["model"], row["method"]) for row in rows} == {
        ("my-spring", "linear", method) for method in ("strict", "half", "ace")
    }
    for row in rows:
        assert row["max_gamma"] == {"strict": 0, "half": 0.5, "ace": 0}[row["method"]]
        assert (row["equivariance_error_float64"] < 1e-9) == (row["method"] != "half")
    again = command(mine, "suite", "mine", "--out", tmp_path / "out")
    assert again.stdout.splitlines() == [f"3 runs in {tmp_path / 'out'}, 3 of them done already"]
    command(mine, "run", "my-spring", "method=half", "method.strength=0.25", "steps=20", "--out", tmp_path / "quarter")
    [summary] = (tmp_path / "quarter").rglob("summary.json")
    assert json.loads(summary.read_text())["max_gamma"] == 0.25


def test_what_is_wrong_is_named(mine, tmp_path, monkeypatch):
    assert "strenght" in command(mine, "run", "my-spring", "method=half", "method.strenght=1", code=2).stderr
    (mine / "tasks" / "empty.py").write_text("tasks = 1\n")
    failed = command(mine, "tasks", code=2).stderr
    assert re.search(r"empty.py: has no dictionary TASKS", failed)
    assert "Traceback" not in failed
    (mine / "tasks" / "empty.py").write_text("TASKS = {'nbody': None}\n")
    monkeypatch.setenv("ACE_PLUGINS", str(mine))
    with pytest.raises(ConfigError, match="tasks called nbody already"):
        plugins.load("tasks", {"nbody": None})
    monkeypatch.setenv("ACE_PLUGINS", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="nowhere"):
        plugins.folders()


def test_a_model_runs_on_the_tasks_that_it_names(monkeypatch):
    monkeypatch.setitem(MODELS, "vector", replace(MODELS["vector"], tasks=("nbody",)))
    assert load_run("nbody", ["model=vector"]).model.name == "vector"
    with pytest.raises(ConfigError, match="'vector' does not run on nbody-iso"):
        load_run("nbody-iso", ["model=vector"])


def test_configurations_are_found_in_all_folders(mine, monkeypatch):
    monkeypatch.setenv("ACE_PLUGINS", os.pathsep.join([str(mine), str(mine.parent)]))
    assert plugins.folders() == [mine, mine.parent]
    assert find("tasks", "my-spring") == mine / "configs" / "tasks" / "my-spring.yaml"
    assert find("tasks", "nbody").parts[-3:] == ("configs", "tasks", "nbody.yaml")
    with pytest.raises(ConfigError, match="spring"):
        find("tasks", "my-sprin")


@pytest.mark.parametrize("words", [["method=ace"], ["method=unconstrained"], ["method=controlled"]])
def test_a_model_without_layers_to_relax_is_not_relaxed(words):
    assert load_run("smoke2d", ["model=cnn", "method=strict"]).model.name == "cnn"
    with pytest.raises(ConfigError, match="'cnn' has none to relax"):
        load_run("smoke2d", ["model=cnn", *words])
