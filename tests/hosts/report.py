"""Plugin of pytest that writes down what the host tests found: ``pytest -p hosts.report --environment NAME``.

A row of ``docs/hosts/results.csv`` is a host in an environment; the rows of hosts that did not run stay as they are.
``docs/hosts/tables.inc`` is made from the rows.
"""

from __future__ import annotations

import csv
import functools
import re
import sys
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import ace
from ace.testing import HostTests

FOLDER = Path(__file__).parents[2] / "docs" / "hosts"
COLUMNS = (
    "library", "version", "host", "environment", "torch", "relaxed", "strict", "group", "floor", "error",
    "passed", "failed", "skipped",
)  # fmt: skip
KEY = ("library", "host", "environment")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--environment", required=True, help="name of the environment, for the rows of the results")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Report(config.getoption("environment")))


class Report:
    """Collects the outcome of each check of each host."""

    def __init__(self, environment: str) -> None:
        self.environment = environment
        self.hosts: dict[type[HostTests], dict[str, tuple[str, str]]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        host = getattr(item, "cls", None)
        if isinstance(host, type) and issubclass(host, HostTests) and (report.when == "call" or not report.passed):
            reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else ""
            reason = re.sub(r" at 0x[0-9a-f]+", "", reason)  # an address is another each time
            check = item.name.removeprefix("test_")
            if self.hosts.setdefault(host, {}).get(check, ("passed",))[0] == "passed":
                self.hosts[host][check] = (report.outcome, reason)
        return report

    def pytest_sessionfinish(self) -> None:
        whole = [host for host, checks in self.hosts.items() if len(checks) >= len(checks_of(host))]
        if whole:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                write([{**row(host, self.hosts[host]), "environment": self.environment} for host in whole])


def checks_of(host: type[HostTests]) -> list[str]:
    return [name for name in dir(host) if name.startswith("test_")]


def row(host: type[HostTests], checks: dict[str, tuple[str, str]]) -> dict[str, str]:
    """What there is to say about a host after its checks."""
    outcomes = Counter(outcome for outcome, _ in checks.values())
    skipped = [f"{check}: {reason}" for check, (outcome, reason) in checks.items() if outcome == "skipped"]
    failed = [check for check, (outcome, _) in checks.items() if outcome == "failed"]
    return {
        "host": host.__name__.removeprefix("Test"),
        "torch": torch.__version__.split("+")[0],
        **facts(host()),
        "passed": str(outcomes["passed"]),
        "failed": " ".join(failed),
        "skipped": "\n".join(skipped),
    }


def facts(host: HostTests) -> dict[str, str]:
    """Library, layers and errors; only the library where the model cannot be relaxed."""
    found = {}
    torch.set_default_dtype(torch.float32)  # some libraries ask for another, and leave it
    try:
        plain = host._plain()
        found["library"], found["version"] = library_of(plain)
        group, types = host.symmetries()[0]
        floor = host._error(plain, host.batch(), group, types)
        relaxed = host._relax(plain, host.batch())
        error = host._error(relaxed, host.batch(), group, types)
        layers = [layer for layer in ace.summary(relaxed) if not layer.status.startswith("strict")]
    except Exception as problem:
        return {**found, "relaxed": f"{type(problem).__name__}: {problem}".splitlines()[0]}
    kinds = Counter(layer.type for layer in layers)
    return {
        **found,
        "relaxed": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        "strict": str(len(ace.summary(relaxed)) - len(layers)),
        "group": str(group),
        "floor": f"{floor:.1e}",
        "error": f"{error:.2g}",
    }


def library_of(model: torch.nn.Module) -> tuple[str, str]:
    """Distribution and version of the library that most modules of a model come from, its root first of all."""
    names = [type(module).__module__.partition(".")[0] for module in model.modules()]
    distributions = installed()
    ours = {"torch", "ace", "torch_geometric"} if "e3nn" in names else {"torch", "ace"}
    foreign = [name for name in names if name in distributions and name not in ours]
    if not foreign:
        return "(ace's benchmarks)", ""
    name = foreign[0] if foreign[0] == names[0] else Counter(foreign).most_common(1)[0][0]
    distribution = distributions[name][0]
    return distribution, metadata.version(distribution)


@functools.cache
def installed() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def write(new: list[dict[str, str]]) -> None:
    """Merge rows into the file of results, and make the tables anew."""
    rows = {tuple(row[key] for key in KEY): row for row in [*read(), *new]}
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))
    (FOLDER / "tables.inc").write_text(tables(read()), encoding="utf-8")


def read() -> list[dict[str, str]]:
    path = FOLDER / "results.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables(rows: list[dict[str, str]]) -> str:
    """The pages' tables: one line a host, then what was skipped and why."""
    head = (
        "| library | environment | host | relaxed layers | strict | error: plain | relaxed | checks |\n"
        + "|---" * 8
        + "|\n"
    )
    body = "".join(f"| {' | '.join(_cells(row))} |\n" for row in rows)
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for line in row["skipped"].splitlines():
            check, _, reason = line.partition(": ")
            reasons.setdefault((check, reason), []).append(row["host"])
    skipped = "".join(f"- `{check}` of {', '.join(hosts)}: {why}\n" for (check, why), hosts in sorted(reasons.items()))
    return f"{head}{body}\nSkipped, because the plain model cannot do it either:\n\n{skipped or 'Nothing.'}"


def _cells(row: dict[str, str]) -> list[str]:
    error = f"{row['error']} ({row['group']})"
    name = f"{row['library']} {row['version']}".strip()
    return [name, row["environment"], row["host"], row["relaxed"], row["strict"], row["floor"], error, _checks(row)]


def _checks(row: dict[str, str]) -> str:
    parts = [f"{row['passed']} passed"]
    if row["failed"]:
        parts.append(f"failed: {', '.join(row['failed'].split())}")
    if row["skipped"]:
        parts.append(f"{len(row['skipped'].splitlines())} skipped")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit("a plugin: PYTHONPATH=tests python -m pytest -p hosts.report --environment NAME tests/hosts")
