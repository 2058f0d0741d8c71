"""The one training loop: a configuration in, a folder with everything about the run out.

``python -m benchmarks.train FOLDER`` trains the run whose ``config.yaml`` lies in the folder, from its last
checkpoint if there is one. What a step does depends on the configuration and the number of the step only, so
a run that was killed and resumed is bitwise the uninterrupted one.

Under torchrun several processes train one run: each does all that one process does, but for its part of the loss; the
first alone writes.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ace
from ace import checkpoint
from ace.distributed import rank, world_size
from ace.errors import AceError, ConfigError, DataError, NonFiniteLoss, NotWritten
from ace.groups import SO3
from ace.history import replace_file
from ace.probing import evaluating
from ace.symmetry import Watch
from benchmarks import processes
from benchmarks.compiling import compile_in_place
from benchmarks.config import RunConfig, load_run
from benchmarks.locks import locked
from benchmarks.methods import METHODS, Method
from benchmarks.models import MODELS
from benchmarks.seeds import Use, derived_seed
from benchmarks.tasks import TASKS, Batch, Task

ELEMENTS = 8
"""Group elements in the measurement of the equivariance error of the shipped model."""
PROBE = 100
"""Samples in each measurement of the equivariance error during training, each moved by one element."""
CALIBRATION = 10
"""Training batches on which the statistics of BatchNorm are re-estimated where relaxation terms are taken off."""
MEASURED = 400
"""Samples in the measurement by sample of the shipped model, at most, each moved by four elements."""

ENVIRONMENTS = {
    "equiformer_pytorch": "shared",
    "escnn": "escnn",
    "mace": "mace",
    "nequip": "shared",
    "se3_transformer_pytorch": "shared",
}
"""Package of a model -> the environment in ``.venvs`` that has it, where it was made."""

Progress = Callable[[int], None]


class RunFailed(AceError):
    """A run ended with an error, which is kept in its folder."""


def run(config: RunConfig, folder: Path, progress: Progress | None = None, patience: float = 0.5) -> dict[str, Any]:
    """Train, or go on training, one run.

    Args:
        config: The run.
        folder: Where its files are; made as needed.
        progress: Called with the number of steps done after each step, in the first process.
        patience: Seconds to wait for another process that is working on the run.

    Returns:
        The summary, which is also in ``summary.json``. A run that is done is not repeated.

    Raises:
        Locked: Another process is working on the run.
        ConfigError: An option was set that follows from the data.
        DataError: The data are missing or damaged.
        RunFailed: Anything else that ended the run: a non-finite loss, a full disk, a checkpoint of another
            configuration. As with the two before, the traceback is kept in ``error.txt``.
    """
    with processes.joined(config.device), ExitStack() as held:
        writes = rank() == 0
        done = processes.from_first(
            processes.together(lambda: _enter(folder, config, held, patience) if writes else None)
        )
        if done is not None:
            return done
        try:
            # the first process of each machine generates the data that are missing there, the others find them
            task = processes.together(lambda: build_task(config) if processes.local_rank() == 0 else None)
            training = processes.together(lambda: _Training(config, folder, task or build_task(config)))
            _check_start(training, processes.from_first(training.step))
            summary = training.run(progress if writes else None)
            if writes:
                replace_file(folder / "summary.json", json.dumps(summary, indent=1).encode())
        except Exception as error:
            if writes:
                # On a full disk this cannot be written either; without it the run still is not done.
                _try_to_write(folder / "error.txt", traceback.format_exc())
            if isinstance(error, ConfigError | DataError):
                raise
            where = f"traceback: {folder / 'error.txt'}" if writes else f"in process {rank()}"
            raise RunFailed(f"{type(error).__name__}: {error} ({where})") from error
    return summary


def _check_start(training: _Training, step: int) -> None:
    """Refuse a process that starts elsewhere than the first one."""
    if training.step != step:
        raise DataError(
            f"process {rank()} is at step {training.step}, the first at {step}: it does not see {training.checkpoint}"
        )


def _enter(folder: Path, config: RunConfig, held: ExitStack, patience: float) -> dict[str, Any] | None:
    """Lock the folder of a run and prepare it; return the summary if the run is done."""
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(folder, patience))
    if (folder / "summary.json").exists():
        return json.loads((folder / "summary.json").read_bytes())
    replace_file(folder / "config.yaml", config.to_yaml().encode())
    (folder / "error.txt").unlink(missing_ok=True)
    return None


def shipped_model(folder: Path) -> tuple[nn.Module, Task]:
    """Return the model that a finished run shipped, and its task; nothing in the folder is changed.

    Raises:
        AceError: The run is not done, or its checkpoint is gone.
        CheckpointMismatch: The checkpoint is damaged, or of another configuration.
    """
    missing = [name for name in ("config.yaml", "summary.json", "checkpoint.pt") if not (folder / name).exists()]
    if missing:
        raise AceError(
            f"{folder} is no run that is done: it has no {' and no '.join(missing)}; see: ace status {folder}"
        )
    config = load_run(folder / "config.yaml")
    training = _Training(config, folder, build_task(config))
    training.select()
    return training.method.finish(training.calibration()), training.task


def build_task(config: RunConfig) -> Task:
    """Make the task of a run, its data generated or loaded; its group is no larger than that of the model.

    Raises:
        DataError: The data are missing or damaged.
    """
    task = TASKS[config.task.name].factory(**config.task.model_dump(exclude={"name"}))
    if MODELS[config.model.name].proper:
        task.group = SO3()
    return task


def build_model(config: RunConfig, task: Task) -> nn.Module:
    """Make the model of a run; its weights depend on the seed only, not on the method.

    Raises:
        ConfigError: An option was set that follows from the data, or the model's package is not installed.
    """
    entry = MODELS[config.model.name]
    if not entry.installed:
        raise ConfigError(
            f"model {config.model.name!r} comes from the package {entry.package}, which is not installed here. "
            f"{how_to_install(str(entry.package))}"
        )
    options = config.model.model_dump(exclude={"name"})
    decided = task.model_options(config.model.name)
    wrong = [f"model.{key} is {options[key]}" for key in decided if options.get(key, decided[key]) != decided[key]]
    if wrong:
        raise ConfigError(f"{'; '.join(wrong)}: leave it out, it follows from the data of {task.name}: {decided}")
    torch.manual_seed(config.seed)
    return entry.build(**{**options, **decided})


def how_to_install(package: str) -> str:
    """What to do where the package of a model is not installed.

    Example:
        >>> how_to_install("escnn")
        'Run `make test-hosts`, which makes environments for such models, then the same with .venvs/escnn/bin/ace.'
    """
    if package not in ENVIRONMENTS:
        return "Install it in this environment."
    return (
        "Run `make test-hosts`, which makes environments for such models, then the same with "
        f".venvs/{ENVIRONMENTS[package]}/bin/ace."
    )


def training_batches(config: RunConfig, task: Task, start: int = 0) -> Iterator[tuple[int, Batch]]:
    """Iterate over the training batches without end.

    The order within an epoch depends on (seed, epoch); what the task draws anew, and the augmentation, on (seed, step).

    Args:
        config: The run.
        task: Its task.
        start: Number of steps done already.

    Yields:
        Epoch, from 0, and batch.
    """
    per_epoch = math.ceil(task.size("train") / config.batch_size)
    for step in itertools.count(start):
        epoch, place = divmod(step, per_epoch)
        if step == start or place == 0:
            order = task.batches("train", config.batch_size, shuffle_seed=derived_seed(config.seed, Use.ORDER, epoch))
            batches = itertools.islice(order, place, None)
        batch = task.augment(next(batches), derived_seed(config.seed, Use.TASK, step))
        if config.augment:
            [element] = task.group.sample(1, derived_seed(config.seed, Use.BATCH_ELEMENT, step))
            batch = task.transform(batch, element)
        yield epoch, batch


class _Training:
    """One run in progress: all that a checkpoint holds, as attributes."""

    def __init__(self, config: RunConfig, folder: Path, task: Task) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.checkpoint = folder / "checkpoint.pt"
        self.task = task
        self.writes = rank() == 0
        model = processes.move(build_model(config, self.task), config.device)
        self.method: Method = METHODS[config.method.name](config, model, self.task)
        self.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.probe = next(self.task.batches("valid", PROBE)).inputs
        self.history = (
            ace.History(folder / "history.csv", config.log_every)
            if self.writes
            else ace.History(every=config.steps + 1)
        )
        self.step = 0
        self.best: dict[str, Any] = {"step": 0, "value": math.inf, "rank": [2.0, 0.0], "model": {}}
        self.average: dict[str, Tensor] = {}
        self.seconds = {"steps": 0.0, "cpu": 0.0, "all": 0.0}  # the processor's time does not depend on what else runs
        if self.checkpoint.exists():
            self.load()
        self.history.truncate(self.step)
        self.started = time.perf_counter() - self.seconds["all"]
        if config.compile:
            compile_in_place(self.method.model)

    def run(self, progress: Progress | None) -> dict[str, Any]:
        """Take the remaining steps, then measure what is shipped."""
        try:
            self.train(progress)
        finally:  # how a run ended is worth seeing, however it ended
            with suppress(NotWritten):
                self.history.flush()
        with torch.compiler.set_stance("force_eager"):  # a few passes, in other sizes, in another precision
            return self.summary()

    def train(self, progress: Progress | None) -> None:
        """Take the remaining steps."""
        config = self.config
        batches = training_batches(config, self.task, self.step)
        while self.step < config.steps:
            start, start_cpu = time.perf_counter(), time.process_time()
            epoch, batch = next(batches)
            record = self.method.step(batch)
            self.seconds["steps"] += time.perf_counter() - start
            self.seconds["cpu"] += time.process_time() - start_cpu
            self.step += 1
            last = self.step == config.steps
            every = (config.log_every, config.eval_every, config.checkpoint_every)
            reads = last or any(self.step % steps == 0 for steps in every)
            if reads:  # what follows would wait for the GPU to end its steps
                self.seconds["steps"] += self.wait()
            self.update_average()
            self.history.append(record, epoch)
            if last or self.step % config.eval_every == 0:
                with self.averaged(), torch.compiler.set_stance("force_eager"):
                    self.evaluate(epoch)
            if last or self.step % config.checkpoint_every == 0:
                self.save()
            if reads:
                self.wait()
            if progress is not None:
                progress(self.step)

    def wait(self) -> float:
        """Wait until a GPU has done all that it was given so far; return the seconds that took."""
        start = time.perf_counter()
        if self.config.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the weights; quickly in the first steps, so that it forgets where it started."""
        if not self.config.average:
            return
        weights = _floating(self.method.model)
        if not self.average:
            self.average = {key: tensor.clone() for key, tensor in weights.items()}
        decay = min(self.config.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), list(weights.values()), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average, if there is one, in the place of the weights."""
        if not self.average:
            yield
            return
        live = {key: tensor.clone() for key, tensor in _floating(self.method.model).items()}
        self.method.model.load_state_dict({**self.method.model.state_dict(), **self.average})
        try:
            yield
        finally:
            self.method.model.load_state_dict({**self.method.model.state_dict(), **live})

    def evaluate(self, epoch: int) -> None:
        """Measure on the validation split, and keep the weights if what would be shipped is the best so far.

        Models that the method does not admit come after all others, the most symmetric of them first.
        """
        relaxed = self.measure("valid", restored=False)
        restored = self.measure("valid", restored=True) if _max_gamma(self.method.model) else relaxed
        error = self.errors_by_sample(self.probe, draws=1).square().mean().sqrt().item()
        admitted = self.method.admits(error)
        self.history.log(
            self.step,
            epoch,
            valid_relaxed=relaxed,
            valid_restored=restored,
            equivariance_error=error,
            admitted=float(admitted),
        )
        value = relaxed if self.method.ships_relaxed else restored
        rank = [0.0, value] if admitted else [1.0, error]
        if math.isfinite(value) and rank < self.best["rank"]:
            weights = {key: tensor.detach().clone() for key, tensor in self.method.model.state_dict().items()}
            self.best = {"step": self.step, "value": value, "rank": rank, "model": weights}

    def measure(self, split: str, restored: bool) -> float:
        """Return the task's metric of the relaxed or of the restored model."""
        model = self.method.model
        with ace.restored(model, recalibrate=self.calibration()) if restored else nullcontext():
            return self.task.evaluate(model, split)[self.task.metric]

    def calibration(self) -> Iterator[dict[str, Tensor]] | None:
        """Return training inputs for the statistics of BatchNorm without the terms; None where no term acts."""
        if _max_gamma(self.method.model) == 0:
            return None
        batches = itertools.islice(training_batches(self.config, self.task), CALIBRATION)
        return (batch.inputs for _, batch in batches)

    def equivariance_error(self, inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> float:
        """Return the mean relative error over sampled elements of the task's group."""
        task = self.task
        report = ace.equivariance_error(
            self.method.model,
            inputs,
            task.group,
            inputs=task.input_types,
            outputs=task.output_type,
            elements=ELEMENTS,
            dtype=dtype,
        )
        return float(report)

    def errors_by_sample(self, inputs: dict[str, Tensor], draws: int) -> Tensor:
        """Return the errors of samples moved by elements of their own, relative to the root mean square of f.

        The root mean square of the errors is what ``EquivarianceError`` constrains.
        """
        model, task = self.method.model, self.task
        watch = Watch(model, task.input_types, task.output_type, seed=ELEMENTS)
        with evaluating(model), torch.no_grad():
            with watch.watching():
                model(**inputs)
            measured = [watch.squares(task.group, draw) for draw in range(draws)]
        return torch.cat([(difference / size.mean()).sqrt() for difference, size in measured])

    def save(self) -> None:
        """Write the history so far, then the checkpoint: a resumed run cuts what the former has more."""
        if not self.writes:
            return
        config = self.config
        self.history.flush()
        self.seconds["all"] = time.perf_counter() - self.started
        state = {
            "method": self.method.state_dict(),
            "step": self.step,
            "best": self.best,
            "average": self.average,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if config.device == "cuda" else None,
        }
        checkpoint.save(self.checkpoint, state, config=config.identity())

    def load(self) -> None:
        """Go back to the last checkpoint."""
        state = checkpoint.load(self.checkpoint, config=self.config.identity())
        self.method.load_state_dict(state["method"])
        self.step, self.best, self.seconds = state["step"], state["best"], state["seconds"]
        weights = _floating(self.method.model)
        self.average = {key: tensor.to(weights[key].device) for key, tensor in state["average"].items()}
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"])

    def select(self) -> None:
        """Load the weights that were best on the validation split."""
        if not self.best["step"]:
            raise NonFiniteLoss("no evaluation on the validation split was finite, so there is no model to ship")
        for relaxation in ace.relaxations(self.method.model).values():
            relaxation.retired = False  # the selected weights may be from before
        self.method.model.load_state_dict(self.best["model"])

    @torch.no_grad()
    def summary(self) -> dict[str, Any]:
        """Load the selected weights, ship the model, and measure it once on the test split."""
        config, method, model, example = self.config, self.method, self.method.model, self.task.example()
        final = {"final_max_gamma": _max_gamma(model), "final_projection_gap": _gap(model, example)}
        self.select()
        selected = {"max_gamma": _max_gamma(model), "projection_gap": _gap(model, example)}
        other = self.measure("test", restored=method.ships_relaxed) if selected["max_gamma"] else None
        shipped = method.finish(self.calibration())
        measured = {
            f"{split}_{name}": value
            for split in ("test", *self.task.further_tests)
            for name, value in self.task.evaluate(shipped, split).items()
        }
        value = measured.pop(f"test_{self.task.metric}")
        other = value if other is None else other
        relaxed, restored = (value, other) if method.ships_relaxed else (other, value)
        inputs = next(self.task.batches("test", 100)).inputs
        batches = itertools.islice(self.task.batches("test", 100), MEASURED // 100)
        errors = torch.cat([self.errors_by_sample(batch.inputs, draws=4) for batch in batches])
        return {
            "status": "done",
            "task": config.task.name,
            "model": config.model.name,
            "method": config.method.name,
            "seed": config.seed,
            "steps": config.steps,
            "selected_step": self.best["step"],
            "valid_shipped": self.best["value"],
            "test_shipped": value,
            "test_relaxed": relaxed,
            "test_restored": restored,
            **measured,
            "equivariance_error": self.equivariance_error(inputs),
            "equivariance_error_float64": self.equivariance_error(inputs, torch.float64),
            "equivariance_rms": errors.square().mean().sqrt().item(),
            "equivariance_p95": errors.quantile(0.95).item(),
            **selected,
            **final,
            "processes": world_size(),
            "seconds": time.perf_counter() - self.started,
            "seconds_per_step": self.seconds["steps"] / config.steps,
            "cpu_seconds_per_step": self.seconds["cpu"] / config.steps,
            "peak_memory_mb": _peak_memory(config.device),
            "parameters_train": self.parameters,
            "parameters_inference": sum(p.numel() for p in shipped.parameters()),
            "config_hash": config.hash,
            "git_commit": _git_commit(),
            **_versions(config.model.name),
            **config.options(),
        }


def _peak_memory(device: str) -> float:
    """Return the most memory that this process had, in MiB: that of its tensors on a GPU, or else all of it."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _versions(model: str) -> dict[str, str]:
    """Return the versions of what computed a run, the package of its model among it, if it comes from one."""
    package = MODELS[model].package
    names = ["numpy", "torch-geometric", *(packages_distributions().get(package, []) if package else [])]
    always = {"python": platform.python_version(), "torch": torch.__version__}
    always |= {"e3nn": version("e3nn"), "cooper": version("cooper-optim")}
    return always | {name: version(name) for name in names}


def _floating(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in model.state_dict().items() if tensor.is_floating_point()}


def _max_gamma(model: nn.Module) -> float:
    return max((relaxation.gamma.abs().item() for relaxation in ace.relaxations(model).values()), default=0.0)


def _gap(model: nn.Module, example: dict[str, Tensor]) -> float:
    return ace.projection_gap(model, example) if ace.relaxations(model) else 0.0


def _try_to_write(path: Path, text: str) -> None:
    try:
        replace_file(path, text.encode())
    except AceError as error:
        print(error, file=sys.stderr)


def _git_commit() -> str:
    """Return the commit of this checkout, with ``-dirty`` if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def main(folder: Path, patience: float = 0.5) -> int:
    """Train the run of a folder; return 0 when it is done, 1 when it failed."""
    try:
        summary = run(load_run(folder / "config.yaml"), folder, patience=patience)
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
