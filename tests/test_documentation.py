"""The documentation is true: its code runs, it names every public object, its links lead somewhere."""

from __future__ import annotations

import inspect
import itertools
import re
import shlex
import socket
import tomllib
import types
import warnings
from pathlib import Path

import pytest
import torch

import ace
import ace.plotting
import ace.results
from ace import cli, problem, terms

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "methods").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^\.\. auto(?:function|class|exception|module|data|method):: ([\w.]+)", re.MULTILINE)
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL_LINE = re.compile(r"^ace (.*)$", re.MULTILINE)
CLI_PAGE = ROOT / "docs" / "cli.md"
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and code of each Python block of a page."""
    text = page.read_text(encoding="utf-8")
    return [(text[: match.start(1)].count("\n"), match[1]) for match in BLOCK.finditer(text)]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun would set for a single process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
@pytest.mark.usefixtures("one_process")
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    with torch.random.fork_rng(), warnings.catch_warnings():
        # a page may restore before γ is 0 to show what happens; that warns, as it should
        warnings.simplefilter("ignore", ace.errors.ConstraintNotMet)
        for line, code in blocks(page):
            exec(compile("\n" * line + code, page, "exec"), namespace)


def test_the_readme_example_returns_an_equivariant_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    model_and_data, example = (code for _, code in blocks(ROOT / "README.md")[:2])
    with torch.random.fork_rng():
        exec(model_and_data + example, namespace)
    force, model, x = namespace["Force"], namespace["model"], namespace["x"]
    error = ace.equivariance_error(model, x, ace.O3(), inputs={0: force.irreps_in}, outputs=force.irreps_out)
    assert error.max < 1e-5
    assert torch.nn.functional.mse_loss(model(x), namespace["y"]) < 1e-4
    assert model.state_dict().keys() == force().state_dict().keys()
    assert Path("trajectories.png").stat().st_size > 10_000


def test_the_readme_example_has_fifteen_lines() -> None:
    _, example = blocks(ROOT / "README.md")[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 17  # fifteen, and two imports of torch


def public_names() -> set[str]:
    """Every public object of the package, and of the modules that are public as a whole."""
    names = {f"ace.{name}" for name in ace.__all__ if not isinstance(getattr(ace, name), types.ModuleType)}
    for module in (ace.checkpoint, ace.errors, ace.plotting, ace.results):
        names |= {
            f"{module.__name__}.{name}"
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__ and callable(value)
        }
    return names


def test_every_public_name_has_one_entry() -> None:
    entries = ENTRY.findall((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    assert public_names() - set(entries) == set()
    assert len(entries) == len(set(entries))


def test_every_error_is_explained() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    errors = {
        name
        for name, value in vars(ace.errors).items()
        if isinstance(value, type) and value not in {ace.errors.AceError, ace.errors.AceWarning}
    }
    assert {name for name in errors if f"`{name}`" not in page} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_commands_in_the_pages_exist() -> None:
    import typer.main

    commands = typer.main.get_command(cli.app).commands
    for page in PAGES:
        for line in SHELL_LINE.findall("".join(SHELL.findall(page.read_text(encoding="utf-8")))):
            words = shlex.split(line, comments=True)
            options = {option for parameter in commands[words[0]].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, f"{page.name}: ace {line}"
            suites_and_tasks = {"suite": "suites", "run": "tasks"}
            if words[0] in suites_and_tasks and not words[1].startswith("my-"):
                kind = ROOT / "configs" / suites_and_tasks[words[0]]
                assert (kind / f"{words[1]}.yaml").exists() or (ROOT / words[1]).exists(), f"{page.name}: ace {line}"
    named = set(
        re.findall(r"^ace ([a-z]+)", "".join(SHELL.findall(CLI_PAGE.read_text(encoding="utf-8"))), re.MULTILINE)
    )
    assert named == set(commands)


def test_every_method_has_a_page() -> None:
    from benchmarks.methods import METHODS

    folder = ROOT / "docs" / "methods"
    index = (folder / "index.md").read_text(encoding="utf-8")
    assert {path.stem for path in folder.glob("*.md")} == {*METHODS, "index"}
    for method in METHODS:
        assert f"[`{method}`]({method}.md)" in index
        assert re.search(rf"^{method}$", index, re.MULTILINE)
        assert "## What we found" in (folder / f"{method}.md").read_text(encoding="utf-8")


def test_the_files_that_the_makefile_names_exist() -> None:
    named = re.findall(r"configs/\S+\.yaml", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_settings_in_the_pages_are_those_of_a_run() -> None:
    from benchmarks.config import RunConfig

    table = re.search(r"^\| key \|.*?\n\n", CLI_PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[0]
    keys = {word for row in table.strip().splitlines() for word in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert keys == set(RunConfig.model_fields)


def test_the_method_page_has_the_rates_of_the_code() -> None:
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    polish = inspect.signature(ace.PrimalDual).parameters["polish"].default
    for fact in (
        rf"$\kappa_d = {problem.DUAL_RATE:g}$, $\kappa_\gamma = {problem.PRIMAL_RATE:g}$",
        f"the last {100 * polish:g} % by default",
        rf"\kappa_e = {problem.TOLERANCE_RATE:g}",
        rf"$\eta_\gamma = {4 * problem.AUGMENTED_RATE:g}/(cT)$",
        rf"$\eta_d = {problem.AUGMENTED_RATE:g}c/T$",
        f"start at {terms.START:g} times",
        rf"\min(\tfrac{{{problem.RESILIENT_RATE:g}}}{{T}}, 1)",
        rf"but $\kappa_\gamma = {problem.PRICED_RATE:g}$",
    ):
        assert fact in page.replace("\n", " "), fact


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)[1].split()
    assert sorted(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE)) == sorted(phony)


def test_make_targets_named_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, f"{page.name}: no target {named - targets}"


def test_constraints_pin_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    wanted = {re.split(r"[<>=~!\[ ;]", name, maxsplit=1)[0].lower().replace("_", "-") for name in requirements}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", pin) for pin in pins)  # no local version, no path
    assert wanted <= {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    assert "torch==2.13.0" in pins
