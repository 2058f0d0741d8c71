"""Executors: where the runs of a suite are worked on, here in processes or on the nodes of a Ray cluster.

An executor gets runs and the folder of their suite, and says of each, as it ends, how its worker ended. What came out
is in the run's folder. A run is always a process of its own: one that dies costs that run only.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ace.errors import AceError, ConfigError
from ace.history import replace_file
from benchmarks.locks import holder, locked

if TYPE_CHECKING:  # it imports the models
    from multiprocessing.process import BaseProcess

    from benchmarks.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
PATHS = ("PYTHONPATH", "ACE_DATA", "ACE_CACHE", "ACE_PLUGINS")
"""Variables that say where code and data are: paths, or several of them as in ``PATH``."""
RETRIES = 3
"""How often a run is begun again on another node of a cluster because its own was lost."""
WINDOW = 1000
"""Runs handed to a cluster at a time: enough that its autoscaler sees what is to come, few enough to be waited for."""
PATIENCE = 60.0
"""Seconds for which a run waits for its own folder: the process of a lost node may hold the lock a little longer."""


class Ended(NamedTuple):
    """A run that no worker works on any more.

    Attributes:
        config: The run.
        how: How its worker ended, such as ``by signal 9``; it counts if the run is neither done nor failed.
        seconds: What the run took.
    """

    config: RunConfig
    how: str
    seconds: float


class Executor(Protocol):
    """Works on runs."""

    def __call__(self, runs: list[RunConfig], out: Path) -> Generator[Ended, None, None]:
        """Work on the runs of a suite; closed early, stop them and wait until nothing goes on.

        Args:
            runs: The runs.
            out: Folder of the suite.

        Yields:
            Each of the runs once, as it ends.
        """


class Processes:
    """Processes of this machine. If it has GPUs, each sees one of them: that with the fewest other workers.

    They fork from a server that has imported everything once: for a short run the imports were most of the work.

    Args:
        jobs: Number of processes at a time.
    """

    def __init__(self, jobs: int = 1) -> None:
        self.jobs = jobs
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self._context = multiprocessing.get_context("forkserver" if forks else "spawn")
        self._context.set_forkserver_preload(["benchmarks.train"])

    def __call__(self, runs: list[RunConfig], out: Path) -> Generator[Ended, None, None]:
        """See ``Executor``."""
        waiting = deque(runs)
        working: list[tuple[RunConfig, BaseProcess, float, str | None]] = []
        gpus = _visible_gpus()
        if not gpus and any(config.device == "cuda" for config in runs):
            raise ConfigError("runs have device: cuda, and torch sees no GPU here; device=cpu does without")
        try:
            while waiting or working:
                while waiting and len(working) < self.jobs:
                    config = waiting.popleft()
                    taken = [gpu for *_, gpu in working]
                    gpu = min(gpus, key=taken.count, default=None)
                    working.append((config, self._start(config, out / config.folder, gpu), time.monotonic(), gpu))
                time.sleep(0.05)
                for entry in [entry for entry in working if entry[1].exitcode is not None]:
                    working.remove(entry)
                    config, process, start, _ = entry
                    yield Ended(config, _how(process.exitcode), time.monotonic() - start)
        finally:
            for _, process, *_ in working:
                process.terminate()
            for _, process, *_ in working:
                process.join()

    def _start(self, config: RunConfig, folder: Path, gpu: str | None) -> BaseProcess:
        write_config(config, folder)
        variables = {**os.environ, **environment(config)} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        process = self._context.Process(target=_work_here, args=(folder, variables))
        process.start()
        return process


class Ray:
    """The nodes of a Ray cluster, all with this environment at this path; connected to until the runs have ended.

    A run asks for as many CPUs as it has threads. A node that sees the suite's folder works there; any other works in
    a folder of its own, whose files are sent back when the run has ended. Runs of lost nodes are begun again: from
    their last checkpoint where the folder is shared.

    Args:
        address: Of the cluster, such as ``10.0.0.1:6379``; ``auto`` for that of this machine.
        gpus: GPUs each run asks for, such as 1 or 0.25.

    Raises:
        AceError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str, gpus: float = 0.0) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise AceError("a suite on a cluster needs Ray: pip install -e '.[ray]'") from None
        handler = signal.getsignal(signal.SIGTERM)
        try:
            host, _, port = address.rpartition(":")
            if port.isdigit():  # Ray itself would wait for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level="warning")
        except (OSError, ValueError, RuntimeError) as error:
            raise AceError(f"no Ray cluster answers at {address}: {_last_line(error)}") from error
        signal.signal(signal.SIGTERM, handler)  # Ray's own would exit without a word
        self.gpus = gpus

    def __call__(self, runs: list[RunConfig], out: Path) -> Generator[Ended, None, None]:
        """See ``Executor``."""
        import ray

        waiting = deque(runs)
        working: dict[Any, RunConfig] = {}
        mark, out = holder(out), out.absolute()
        task = ray.remote(max_calls=1, max_retries=RETRIES, num_gpus=self.gpus)(_work)
        self._warn(max((config.threads for config in runs), default=0))
        try:
            while waiting or working:
                while waiting and len(working) < WINDOW:
                    config = waiting.popleft()
                    write_config(config, out / config.folder)
                    here = task.options(num_cpus=config.threads, runtime_env={"env_vars": environment(config)})
                    working[here.remote(config.to_yaml(), out, config.folder, mark)] = config
                [ref], _ = ray.wait(list(working))
                config = working.pop(ref)
                try:
                    code, seconds, files = ray.get(ref)
                    _receive(out / config.folder, files)
                    ended = Ended(config, _how(code), seconds)
                except (ray.exceptions.RayError, AceError) as error:
                    ended = Ended(config, f"by {type(error).__name__}: {_last_line(error)}", 0.0)
                yield ended
        finally:
            for ref in working:
                ray.cancel(ref)
            if working:
                ray.wait(list(working), num_returns=len(working), timeout=PATIENCE)
            ray.shutdown()

    def _warn(self, threads: int) -> None:
        """Say so if runs will wait for a node that the cluster, as it is, does not have."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= threads and node.get("GPU", 0) >= self.gpus for node in nodes):
            print(
                f"no node of the cluster has {threads} CPUs and {self.gpus:g} GPUs; runs wait for one that joins it",
                file=sys.stderr,
            )


def environment(config: RunConfig) -> dict[str, str]:
    """Return the variables that the worker of a run needs, in whatever folder it is started.

    Args:
        config: The run.

    Returns:
        Values by name; all paths are absolute.
    """
    paths = {name: os.environ[name].split(os.pathsep) for name in PATHS if os.environ.get(name)}
    paths["PYTHONPATH"] = [str(ROOT), *paths.get("PYTHONPATH", [])]
    absolute = {name: dict.fromkeys(str(Path(path).absolute()) for path in of if path) for name, of in paths.items()}
    return {"OMP_NUM_THREADS": str(config.threads), **{name: os.pathsep.join(of) for name, of in absolute.items()}}


def shell_command(config: RunConfig, folder: Path) -> str:
    """Return one line for a shell, in any folder, that works on a run.

    Args:
        config: The run.
        folder: Its folder; its ``config.yaml`` must have been written by then.
    """
    variables = [f"{name}={value}" for name, value in environment(config).items()]
    command = [sys.executable, "-m", "benchmarks.train", str(folder.absolute())]
    return shlex.join(["env", *variables, *command])


def write_config(config: RunConfig, folder: Path) -> None:
    """Make the folder of a run, with the file that its worker reads."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "config.yaml", config.to_yaml().encode())


def _work_here(folder: Path, variables: dict[str, str]) -> None:
    """Be the worker of a run: with the variables of the suite as they are now, not as the server found them."""
    os.environ.clear()
    os.environ.update(variables)
    with (folder / "log.txt").open("ab") as log:
        for output in (1, 2):
            os.dup2(log.fileno(), output)
    from benchmarks.train import main

    sys.exit(main(folder))


def _visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, in the words of ``CUDA_VISIBLE_DEVICES``."""
    import torch

    words = os.environ.get("CUDA_VISIBLE_DEVICES")
    if words is not None:
        return [word for word in words.split(",") if word]
    return [str(number) for number in range(torch.cuda.device_count())]


def _work(text: str, out: Path, name: Path, mark: str) -> tuple[int, float, dict[str, bytes]]:
    """Work on a run on a node of a cluster; return exit code, seconds, and the files if the node has no ``out``."""
    from benchmarks.train import main

    start = time.monotonic()
    shared = holder(out) == mark
    with tempfile.TemporaryDirectory() as scratch:
        folder = out / name if shared else Path(scratch)
        if not shared:
            replace_file(folder / "config.yaml", text.encode())
        with (folder / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            code = main(folder, PATIENCE)
        files = {} if shared else {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
    return code, time.monotonic() - start, files


def _receive(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files of a run that was worked on elsewhere, the summary last: its presence means the run is done."""
    if not files:
        return
    with locked(folder):
        for name in sorted(files, key="summary.json".__eq__):
            replace_file(folder / name, files[name])


def _how(code: int | None) -> str:
    assert code is not None
    return f"by signal {-code}" if code < 0 else f"with exit code {code}"


def _last_line(error: Any) -> str:
    return str(error).strip().rpartition("\n")[2]
