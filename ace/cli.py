"""The ``ace`` command: run benchmark tasks and suites from a checkout, and look at their results."""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ace.errors import AceError

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: all runs done; some run failed; wrong command line, configuration or data; interrupted."""

DOWNLOADS = {
    "mocap": ("motion", "download_motion"),
    "modelnet10": ("shapes", "download_modelnet10"),
    "modelnet40": ("shapes", "download_modelnet40"),
    "qm9": ("molecules", "download_qm9"),
    "md": ("molecules", "download_md"),
    "rotmnist": ("tasks.rotmnist", "download"),
    "smoke2d": ("tasks.smoke", "generate"),
}
"""Data that can be downloaded or generated, to the module of the benchmarks and the function there that does it."""

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train equivariant models through a relaxation that dual ascent removes, and compare with other methods.\n\n"
    "A run is task × model × method × seed, a suite is a set of runs. Exit codes: 0 all done, 1 some run failed, "
    "2 wrong command line, configuration or data, 130 interrupted.",
    epilog="Start with:  ace suite smoke --out results/smoke  &&  ace table results/smoke",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings, such as method=cr, lr=1e-3 or model.hidden=32."),
]
Folder = Annotated[Path, typer.Argument(help="A suite's folder, or any folder above or below.")]


class Format(StrEnum):
    """Formats of a table."""

    markdown = "markdown"
    latex = "latex"
    csv = "csv"


class Image(StrEnum):
    """Formats of a figure."""

    png = "png"
    pdf = "pdf"
    svg = "svg"


def _command(function: Callable[P, R]) -> Callable[P, R]:
    """Register a command; an error that ace foresaw is one message and an exit code, not a traceback."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # end workers whichever way we are ended
        try:
            return function(*args, **kwargs)
        except (AceError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(USAGE) from None
        except KeyboardInterrupt:
            print("interrupted; the same command resumes", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

    return app.command()(guarded)


def _benchmarks(name: str) -> Any:
    """Import a module of the benchmarks, which a checkout has and the installed package has not."""
    try:
        return importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.split(".")[0] == "benchmarks":
            raise AceError(
                "the benchmarks are not part of the installed package: run this in a checkout of the repository, "
                "after pip install -e '.[bench]'"
            ) from None
        raise AceError(f"the benchmarks need {missing}: pip install -e '.[bench]'") from None


@_command
def tasks() -> None:
    """List the tasks, whether their data are there, and the models and methods to run on them.

    [bold]Example:[/bold]  ace tasks
    """
    registry, config, models = _benchmarks("tasks"), _benchmarks("config"), _benchmarks("models")
    table = Table("task", "models", "data", box=None, pad_edge=False)
    explanations = []
    for name, entry in registry.TASKS.items():
        available, how = entry.available()
        table.add_row(name, ", ".join(entry.models), "ready" if available else "missing, see below")
        explanations += [f"{name}: {how}"] if how else []
    console = Console(soft_wrap=True)
    console.print(table)
    print(f"\nmethods: {', '.join(config.CHOICES['method'])}")
    if absent := [f"{name} ({entry.package})" for name, entry in models.MODELS.items() if not entry.installed]:
        print(f"models whose package is not installed here: {', '.join(absent)}")
        print("make test-hosts makes environments that have them: docs/benchmarks.md, Models")
    for explanation in explanations:
        print(explanation)


@_command
def run(
    task: Annotated[str, typer.Argument(help="Name of a task (see ace tasks), or a YAML file.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder for the run's own folder.")] = Path("results/runs"),
) -> None:
    """Train one run; the same command resumes it, or shows its result when it is done.

    [bold]Examples:[/bold]  ace run nbody method=ace model=egnn seed=0 steps=1000

    ace run mocap-run method=ace-resilient method.rho=0.1 augment=true

    torchrun --nproc-per-node 4 -m ace.cli run qm9 batch_size=256
    """
    config = _benchmarks("config").load_run(task, overrides or ())
    folder = out / config.folder
    first = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun
    if first:
        print(f"{config.label}: {folder}")
    train = _benchmarks("train")
    try:
        with _progress(first) as progress:
            bar = progress.add_task(config.label, total=config.steps)
            summary = train.run(config, folder, lambda step: progress.update(bar, completed=step))
    except train.RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    if not first:
        return
    for key in ("valid_shipped", "test_shipped", "test_relaxed", "test_restored"):
        print(f"{key:<19} {summary[key]:.5g}")
    print(f"{'equivariance_error':<19} {summary['equivariance_error']:.1e}")
    print(f"{'seconds':<19} {summary['seconds']:.1f}")


@_command
def suite(
    config: Annotated[str, typer.Argument(help="Name of a suite in configs/suites, or a YAML file.")],
    overrides: Overrides = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Number of runs at a time on this machine, each a process; default 1.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run on a Ray cluster, such as 10.0.0.1:6379, or auto for the one here."),
    ] = None,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs that each run asks the Ray cluster for: 1, 0.25, ...")] = 0.0,
    print_commands: Annotated[
        bool, typer.Option("--print-commands", help="Run nothing; print a shell command for each run not done.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the suite; default results/NAME.")] = None,
) -> None:
    """Run a suite; the same command resumes it: what is done is kept, what was interrupted goes on.

    [bold]Examples:[/bold]  ace suite configs/suites/quick.yaml --jobs 2 --out results/quick

    ace suite quick --ray auto --out /shared/quick

    ace suite quick --print-commands --out /shared/quick > commands.txt
    """
    if sum([jobs is not None, ray is not None, print_commands]) > 1:
        raise AceError("give one of --jobs, --ray and --print-commands")
    if gpus and ray is None:
        raise AceError("--gpus is for --ray; on this machine the GPUs are shared out among the --jobs by themselves")
    whole = _benchmarks("config").load_suite(config, overrides or ())
    module, executors = _benchmarks("suite"), _benchmarks("executors")
    folder = out or Path("results") / Path(config).stem
    execute = executors.Processes(jobs or 1) if ray is None else executors.Ray(ray, gpus)
    runs, left_out = module.prepare(whole, folder)
    for line in left_out:
        print(line, file=sys.stderr)
    if print_commands:
        for line in module.shell_commands(runs, folder):
            print(line)
        return
    before = sum((folder / run.folder / "summary.json").exists() for run in runs)
    print(f"{len(runs)} runs in {folder}, {before} of them done already")
    with _progress() as progress:
        bar = progress.add_task("runs", total=len(runs), completed=before)

        def report(outcome: Any) -> None:
            progress.advance(bar)
            done = int(progress.tasks[0].completed)
            progress.console.print(_line(outcome, done, len(runs)), markup=False, highlight=False, soft_wrap=True)

        outcomes = module.run_suite(runs, folder, execute, report)
    unfinished = sum(outcome.status != "done" for outcome in outcomes)
    if unfinished:
        print(f"{unfinished} of {len(runs)} runs are not done; the same command retries them", file=sys.stderr)
        raise typer.Exit(FAILED)


@_command
def status(folder: Folder) -> None:
    """Show how far each run has come: done, failed, interrupted, running or pending.

    [bold]Example:[/bold]  ace status results/quick
    """
    frame = _benchmarks("suite").status(folder)
    for row in frame.itertuples():
        print(f"{row.status:<12} {row.run}{'  ' + row.detail if row.detail else ''}")
    counts = frame["status"].value_counts()
    print(" · ".join(f"{word} {count}" for word, count in counts.items()) or f"no runs in {folder}")
    if counts.get("failed", 0):
        raise typer.Exit(FAILED)


@_command
def table(
    folder: Folder,
    format: Annotated[Format, typer.Option(help="Format of the table.")] = Format.markdown,  # noqa: A002
    metrics: Annotated[str, typer.Option(help="Columns of the summaries, separated by commas.")] = (
        "test_shipped,test_relaxed,test_restored,equivariance_error,seconds_per_step"
    ),
    wide: Annotated[bool, typer.Option("--wide", help="A row a method, a column a task; of the first metric.")] = False,
    relative_to: Annotated[
        str | None, typer.Option(metavar="METHOD", help="Divide the first metric by that of this method, seed by seed.")
    ] = None,
) -> None:
    """Compare the methods: mean ± standard error over the seeds of the runs that are done.

    The best of each task and model is bold, those that are not significantly worse are italic; of equivariance errors
    nothing is marked. Where options were swept, methods are compared for each value.

    [bold]Examples:[/bold]  ace table results/quick --format latex --metrics test_shipped,seconds

    ace table results/quick --wide --relative-to strict
    """
    from ace import comparison, results, tables

    frame, columns = results.load_results(folder), metrics.split(",")
    if relative_to is not None:
        frame = comparison.relative(frame, columns[0], relative_to)
    unmarked = [name for name in columns if name.startswith("equivariance_")]  # the lowest of these is rounding
    if wide:
        print(tables.wide_table(frame, columns[0], format.value, unmarked), end="")
    else:
        print(tables.table(frame, columns, format.value, unmarked), end="")


@_command
def ranks(
    folder: Folder,
    metric: Annotated[str, typer.Option(help="Column of the summaries, of which lower is better.")] = "test_shipped",
    out: Annotated[Path | None, typer.Option(help="The diagram; default FOLDER/figures/ranks.png.")] = None,
) -> None:
    """Rank the methods over all tasks and models: mean ranks, Friedman's test, critical-difference diagram.

    [bold]Example:[/bold]  ace ranks results/quick --out ranks.pdf
    """
    from ace import comparison, plotting, results

    frame, conditions = comparison.by_setting(results.load_results(folder))
    found = comparison.rank(frame, metric, ["task", "model", *conditions])
    out = out or folder / "figures" / "ranks.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    plotting.plot_ranks(found, out)
    print(f"{found}\n\n{out}")


@_command
def plot(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures; default FOLDER/figures.")] = None,
    suffix: Annotated[Image, typer.Option(help="Format of the images.")] = Image.png,
) -> None:
    """Draw the learning curves of each task and model, and the trajectories of each method.

    comparison.png has all methods on all tasks at a glance: the test error relative to strict training, coloured by the
    equivariance error; ranks.png, where there are several, the critical-difference diagram of [bold]ace ranks[/bold].
    Where a suite swept options such as lr or task.train, the test error is drawn against each of them instead of
    learning curves.

    [bold]Example:[/bold]  ace plot results/quick --out figures
    """
    from ace import comparison, plotting, results

    runs = results.load_results(folder)
    if runs.empty:
        raise AceError(f"no run in {folder} is done, so there is nothing to plot; see: ace status {folder}")
    out = out or folder / "figures"
    out.mkdir(parents=True, exist_ok=True)
    if "strict" in set(runs["method"]):
        path = out / f"comparison.{suffix}"
        try:
            plotting.plot_comparison(runs, path)
        except AceError as error:  # such as seeds that strict training does not have: the others can be drawn
            typer.echo(f"{path} left out: {error}", err=True)
        else:
            print(path)
    named, conditions = comparison.by_setting(runs)
    with suppress(AceError):  # too little to rank
        ranks = comparison.rank(named, cases=["task", "model", *conditions])
        plotting.plot_ranks(ranks, path := out / f"ranks.{suffix}")
        print(path)
    for (task, model), of_pair in runs.groupby(["task", "model"]):
        for option in comparison.by_setting(of_pair)[1]:
            path = out / f"{task}-{model}-{option}.{suffix}"
            sweep: Any = plotting.plot_sweep(of_pair, option).figure
            sweep.savefig(path)
            print(path)
    if conditions:
        return  # curves of different settings have no mean
    frame = results.load_histories(folder)
    comparisons = {
        "learning-curves": plotting.plot_learning_curves,
        "equivariance-error": plotting.plot_equivariance_error,
    }
    for (task, model), of_pair in frame.groupby(["task", "model"], observed=True):
        for name, draw in comparisons.items():
            path = out / f"{task}-{model}-{name}.{suffix}"
            figure: Any = draw(of_pair).figure
            figure.savefig(path)
            print(path)
        for method, of_method in of_pair.groupby("method", observed=True):
            path = out / f"{task}-{model}-{method}.{suffix}"
            plotting.plot_trajectories(of_method, path)
            print(path)


@_command
def certify(
    folder: Annotated[Path, typer.Argument(help="The folder of a run that is done.")],
    elements: Annotated[int, typer.Option(min=1, help="Random elements of each sample.")] = 8,
    confidence: Annotated[float, typer.Option(help="Of the intervals, between 0 and 1.")] = 0.95,
) -> None:
    """Certify the model that a run shipped, on the test split: equivariance error, intervals, bounds.

    The certificate is printed, and written into the folder as certificate.json.

    [bold]Example:[/bold]  ace certify results/quick/broken-vector/ace/seed0-1a2b3c4d
    """
    import torch

    from ace.certification import certify as certify_model

    model, task = _benchmarks("train").shipped_model(folder)
    with torch.no_grad():
        certificate = certify_model(
            model,
            (batch.inputs for batch in task.batches("test", 100)),
            task.group,
            inputs=task.input_types,
            outputs=task.output_type,
            elements=elements,
            confidence=confidence,
            path=folder / "certificate.json",
        )
    print(certificate)


@_command
def diagnose(
    task: Annotated[str, typer.Argument(help="Name of a task (see ace tasks), or a YAML file.")],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each kind, strict and resilient.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder; default results/diagnosis/TASK-MODEL.")] = None,
) -> None:
    """Say where the data break the symmetry: layers, transformations, and what strict equivariance costs.

    Writes diagnosis.json and diagnosis.png; the same command goes on after the last seed that is done.

    [bold]Example:[/bold]  ace diagnose broken task.strength=0.3 steps=1500 --seeds 3 --out diagnosis
    """
    config = _benchmarks("config").load_run(task, overrides or ())
    name = f"{config.task.name}-{config.model.name}"
    folder = out or Path("results/diagnosis") / name
    with _progress() as progress:
        bar = progress.add_task(name, total=2 * seeds * config.steps)
        diagnosis = _benchmarks("diagnose").diagnose(
            config, seeds, folder, lambda step: progress.update(bar, completed=step)
        )
    print(diagnosis)
    diagnosis.save(folder / "diagnosis.json")
    diagnosis.plot(folder / "diagnosis.png")
    print(f"\n{folder / 'diagnosis.json'}\n{folder / 'diagnosis.png'}")


@_command
def data(
    name: Annotated[str, typer.Argument(help=f"Which data: {', '.join(DOWNLOADS)}.")],
) -> None:
    """Download the data of a task, or generate them, and verify their checksum.

    qm9 is 104 MB, modelnet40 2 GB; smoke2d is simulated in five minutes, where PhiFlow is installed.

    [bold]Example:[/bold]  ace data mocap
    """
    if name not in DOWNLOADS:
        registry = _benchmarks("tasks").TASKS
        if name not in registry:
            raise AceError(f"no data called {name!r} to download; there is: {', '.join(DOWNLOADS)}")
        available, how = registry[name].available()
        if not available:
            raise AceError(how)
        print(f"nothing to download: the data of {name} are there, or are generated by its first run")
        return
    module, function = DOWNLOADS[name]
    print(getattr(_benchmarks(module), function)())


def _progress(shown: bool = True) -> Progress:
    """Return a progress bar, which shows in a terminal only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not (shown and sys.stdout.isatty()),
    )


def _line(outcome: Any, done: int, total: int) -> str:
    """Describe the outcome of a run in one line."""
    start = f"[{done:>{len(str(total))}}/{total}] {outcome.config.label:<40} {outcome.status:<11}"
    if outcome.status != "done":
        return f"{start} {outcome.detail}"
    summary = json.loads((outcome.folder / "summary.json").read_bytes())
    return f"{start} test {summary['test_shipped']:.4g}  {outcome.seconds:.0f} s"


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
