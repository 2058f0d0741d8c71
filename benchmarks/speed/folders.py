"""``python -m benchmarks.speed.folders``: what a suite costs beside the training.

A small run is trained, its folder copied many times under other methods and seeds, and the commands that read the
folder of a suite are timed on the copies. Then a run of a single step is run as a suite runs it. Each command is a
process of its own; what counts is its processor time, since other work on the machine makes the clock run on. The
table goes to ``docs/results/speed_folders.csv``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from rich.progress import track

from ace.history import replace_file
from ace.results import load_results
from benchmarks.config import load_run
from benchmarks.executors import environment, write_config
from benchmarks.suite import RUNS
from benchmarks.train import run

PATH = Path(__file__).parents[2] / "docs" / "results" / "speed_folders.csv"
SMALL = (
    "task.train=40",
    "task.valid=10",
    "task.test=10",
    "model.hidden=8",
    "model.layers=2",
    "batch_size=20",
    "eval_every=50",
)
METHODS = ("strict", "ace", "ace-resilient", "cr")
MODELS = ("egnn", "segnn")


def fill(out: Path, runs: int) -> tuple[int, int]:
    """Fill ``out/suite`` with runs that are done, copies of one; return the files and bytes of one of them."""
    source, suite = out / "source", out / "suite"
    summary = run(load_run("nbody", (*SMALL, "steps=1000")), source)
    (source / "log.txt").write_text(json.dumps(summary, indent=1))
    config = (source / "config.yaml").read_text()
    copied = {name: (source / name).read_bytes() for name in ("history.csv", "log.txt", ".lock")}
    listed = []
    for number in track(range(runs), description=f"{runs} runs"):
        seed, place = divmod(number, len(MODELS) * len(METHODS))
        model, method = MODELS[place % len(MODELS)], METHODS[place // len(MODELS)]
        name = f"nbody-{model}/{method}/seed{seed}-{number:08x}"
        listed.append(f"{name}\n")
        folder = suite / name
        folder.mkdir(parents=True)
        with (folder / "checkpoint.pt").open("wb") as file:  # nothing here reads it, so it need not take space
            file.truncate((source / "checkpoint.pt").stat().st_size)
        for file, content in copied.items():
            (folder / file).write_bytes(content)
        (folder / "config.yaml").write_text(config.replace("seed: 0", f"seed: {seed}"))
        error = summary["test_shipped"] * (1 + (number * 7919 % 1000) / 1000)
        row = {**summary, "model": model, "method": method, "seed": seed, "test_shipped": error}
        (folder / "summary.json").write_text(json.dumps(row, indent=1))
    (suite / RUNS).write_text("".join(listed))
    sizes = [path.stat().st_size for path in source.iterdir()]
    return len(sizes), sum(sizes)


def measure(*command: str, **variables: str) -> dict[str, float]:
    """Run a command; return its time by the clock and of the processor, in seconds.

    Raises:
        RuntimeError: It failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, **variables})
    _, code, usage = os.wait4(process.pid, 0)
    if code:
        raise RuntimeError(f"{command} ended with {os.waitstatus_to_exitcode(code)}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "CPU seconds": round(usage.ru_utime + usage.ru_stime, 2),
    }


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, nargs="+", default=[1000, 10_000])
    options = parser.parse_args()
    ace = (sys.executable, "-m", "ace.cli")
    rows: list[dict[str, object]] = [{"what": "ace --help", **measure(*ace, "--help")}]
    for runs in options.runs:
        with tempfile.TemporaryDirectory() as out:
            files, size = fill(Path(out), runs)
            for name in ("status", "table"):
                row = measure(*ace, name, f"{out}/suite")
                rows.append({"what": f"ace {name}", "runs": runs, **row, "files a run": files, "bytes a run": size})
            memory = load_results(f"{out}/suite").memory_usage(deep=True).sum()
            rows[-1]["MB of its frame"] = round(memory / 1e6, 1)
    with tempfile.TemporaryDirectory() as out:
        config = load_run("nbody", (*SMALL, "steps=1"))
        write_config(config, Path(out))
        row = measure(sys.executable, "-m", "benchmarks.train", out, **environment(config))
        rows.append({"what": "a run of one step", "runs": 1, **row})
    table = pd.DataFrame(rows).astype({"runs": "Int64", "files a run": "Int64", "bytes a run": "Int64"})
    print(table.to_string(index=False))
    replace_file(PATH, table.to_csv(index=False).encode())


if __name__ == "__main__":
    main()
