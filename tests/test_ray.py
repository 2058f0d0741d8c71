"""Suites on a Ray cluster: several nodes on this machine, each with its own scheduler and processes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections import Counter

import pytest
from runs import METRICS, ROOT, cache, command, tiny  # noqa: F401

from ace import results, tables
from ace.errors import AceError
from benchmarks import executors
from benchmarks.suite import run_suite
from benchmarks.train import run

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning:ray", "ignore::ResourceWarning:subprocess"),
]

RECORDED = '''
import os
import time
from pathlib import Path

from benchmarks.methods.constrained import Ace

HERE = Path(__file__).parent


class Recorded(Ace):
    """Each start is noted; where there is a file ``block``, the first run to find it stops in its twelfth step."""

    def setup(self):
        super().setup()
        self.done = 0
        gpu, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"]
        with (HERE / "starts.txt").open("a") as file:
            file.write(f"{self.config.seed} {gpu} {threads}\\n")

    def step(self, batch):
        self.done += 1
        if self.done == 12 and self.config.seed == 0 and (HERE / "block").exists():
            import ray

            (HERE / "block").unlink()
            (HERE / "blocked.part").write_text(ray.get_runtime_context().get_node_id())
            (HERE / "blocked.part").rename(HERE / "blocked")
            while True:
                time.sleep(0.1)
        return super().step(batch)


METHODS = {"recorded": Recorded}
'''


@pytest.fixture(scope="module", autouse=True)
def variables(tmp_path_factory):
    """A token of our own, so that nobody else can give this cluster work; Ray reads these when it is imported."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        yield


@pytest.fixture(scope="module")
def cluster(variables):
    """A head without CPUs; the tests add nodes."""
    from ray.cluster_utils import Cluster

    sizes = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args={**sizes, "object_store_memory": 100 << 20})
    try:
        yield started
    finally:
        started.shutdown()


def add_node(cluster, **sizes):
    return cluster.add_node(num_cpus=1, object_store_memory=100 << 20, **sizes)


def test_an_address_where_nothing_answers_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(AceError, match=f"no Ray cluster answers at {address}"):
        executors.Ray(address)


def test_the_files_of_a_run_come_back_from_a_node_that_does_not_share_the_folder(cluster, tmp_path, monkeypatch):
    add_node(cluster)
    receive = executors._receive
    monkeypatch.setattr(executors, "holder", lambda folder: "another folder, as the nodes see it")
    received = []
    monkeypatch.setattr(executors, "_receive", lambda *of: (received.append(of), receive(*of)))
    config = tiny("method=ace")
    [outcome] = run_suite([config], tmp_path, executors.Ray(cluster.address), lambda outcome: None)
    assert (outcome.status, outcome.detail) == ("done", "")
    [(_, files)] = received
    assert {"summary.json", "checkpoint.pt"} < files.keys()
    run(config, tmp_path / "here")
    there = tmp_path / config.folder
    assert (there / "history.csv").read_bytes() == (tmp_path / "here" / "history.csv").read_bytes()
    assert {path.name for path in there.iterdir()} == {
        ".lock",
        "checkpoint.pt",
        "config.yaml",
        "history.csv",
        "log.txt",
        "summary.json",
    }
    assert json.loads((there / "log.txt").read_text()) == json.loads((there / "summary.json").read_text())


@pytest.mark.slow
def test_a_lost_node_loses_nothing_and_repeats_nothing(cluster, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    (mine / "methods").mkdir(parents=True)
    (mine / "methods" / "recorded.py").write_text(RECORDED)
    monkeypatch.setenv("ACE_PLUGINS", str(mine))
    suite = tmp_path / "my-suite.yaml"
    suite.write_text(
        "methods: [recorded, strict]\n"
        "seeds: [0, 1, 2]\n"
        "overrides: {task: {train: 40, valid: 10, test: 10}, model: {hidden: 8, layers: 2}, steps: 20,\n"
        "  batch_size: 16, eval_every: 5, checkpoint_every: 8}\n"
        "grid: [{tasks: [nbody], models: [egnn]}]\n"
    )
    starts = mine / "methods" / "starts.txt"
    command("suite", str(suite), "--jobs", "2", "--out", str(tmp_path / "serial"), check=True)
    assert Counter(line.split()[0] for line in starts.read_text().splitlines()) == {"0": 1, "1": 1, "2": 1}
    starts.unlink()

    nodes = {node.node_id: node for node in (add_node(cluster, num_gpus=1) for _ in range(2))}
    (mine / "methods" / "block").touch()
    out = tmp_path / "out"
    words = ("suite", str(suite), "--ray", cluster.address, "--gpus", "0.5", "--out", str(out))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "ace.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    blocked = mine / "methods" / "blocked"
    while not (blocked.exists() and len(list(out.rglob("summary.json"))) == 5):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    cluster.remove_node(nodes[blocked.read_text()], allow_graceful=False)
    stdout, stderr = process.communicate(timeout=240)
    assert (process.returncode, stderr) == (0, "")
    assert len(re.findall(r"^\[\d/6\] .* done ", stdout, re.MULTILINE)) == 6  # besides what Ray tells of the node

    seeds, gpus, threads = zip(*map(str.split, starts.read_text().splitlines()), strict=True)
    assert Counter(seeds) == {"0": 2, "1": 1, "2": 1}  # the lost run went on elsewhere, all others ran once
    assert (set(gpus), set(threads)) == ({"0"}, {"1"})
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}.items()
    assert results.status(out)["status"].tolist() == ["done"] * 6
    there, serial = results.load_results(out), results.load_results(tmp_path / "serial")
    assert tables.table(there, METRICS, "csv") == tables.table(serial, METRICS, "csv")
    for run_folder in serial["run"]:
        histories = [(folder / run_folder / "history.csv").read_bytes() for folder in (out, tmp_path / "serial")]
        assert histories[0] == histories[1]
