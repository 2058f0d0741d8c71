"""What imports what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported_by(statement, *names):
    """Which of these modules are loaded after a statement in a fresh interpreter."""
    script = f"import sys\n{statement}\nprint([name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_ace_imports_no_host_and_no_plots():
    names = "e3nn", "torch_geometric", "matplotlib", "benchmarks", "typer", "pydantic", "ace.hosts.e3nn", "cooper"
    assert imported_by("import ace", *names) == "['cooper']"


@pytest.mark.parametrize("library", ["e3nn", "torch_geometric"])
def test_rules_of_a_library_are_loaded_with_it_only(library):
    rules = {"e3nn": "ace.hosts.e3nn", "torch_geometric": "ace.hosts.pyg"}
    statement = f"import ace, ace.terms, {library}; ace.terms.registered_types()"
    assert imported_by(statement, *rules.values()) == f"['{rules[library]}']"


def test_benchmark_models_do_not_know_ace():
    """With ``ace`` impossible to import they load and run."""
    blocked = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ace", "cooper"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import inspect, torch
from benchmarks.models import MODELS
edges = torch.tensor([[0, 1], [1, 0]])
for entry in MODELS.values():
    if "node_features" not in inspect.signature(entry.build).parameters:
        continue  # a model of another kind of task
    model = entry.build(node_features=1, edge_features=1, layers=1)
    model(torch.randn(4, 3), torch.randn(4, 3), torch.ones(4, 1), edges, torch.ones(2, 1), torch.zeros(4).long())
"""
    assert imported_by(blocked, "ace", "benchmarks.models") == "['benchmarks.models']"


def test_import_contracts():
    """The layers and the forbidden imports of pyproject.toml."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout
