"""Configurations: what a run and a suite are, read from YAML files and ``key=value`` words.

Several sources describe a run, the later ones winning: the file of its method, the file of its task, that
file's entry for the model, then a suite or the command line. Keys that nobody knows are refused, and all
that is wrong is reported at once, each finding with the source it came from.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial, reduce
from itertools import product
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_type_hints

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model, model_validator

from ace.comparison import OPTION
from ace.errors import ConfigError
from benchmarks import plugins
from benchmarks.methods import METHODS
from benchmarks.models import MODELS
from benchmarks.options import Options
from benchmarks.tasks import TASKS

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
"""Folder of the configurations that can be called by name: tasks/, methods/, suites/."""

WORDS = "command line"
"""Source of the ``key=value`` words."""

Flat = dict[tuple[str, ...], tuple[Any, str]]
"""Dotted key, as a tuple, to the value and the source it came from."""


def _options(name: str, build: Callable[..., Any]) -> type[Options]:
    """Make the configuration type of a constructor: its arguments with a default that are not bound already."""
    constructor, bound = (build.func, build.keywords) if isinstance(build, partial) else (build, {})
    hints = get_type_hints(constructor.__init__)
    fields: dict[str, Any] = {
        key: (hints.get(key, Any), parameter.default)
        for key, parameter in inspect.signature(build).parameters.items()
        if parameter.default is not parameter.empty and key not in bound
    }
    return create_model(name, __base__=Options, name=(Literal[name], ...), **fields)


CHOICES: dict[str, dict[str, type[Options]]] = {
    "task": {name: _options(name, entry.factory) for name, entry in TASKS.items()},
    "model": {name: _options(name, entry.build) for name, entry in MODELS.items()},
    "method": {
        name: create_model(name, __base__=entry.Options, name=(Literal[name], ...)) for name, entry in METHODS.items()
    },
}
"""What can be chosen for each part of a run, with the type of its options."""


def _one_of(part: str) -> Any:
    return Annotated[reduce(or_, CHOICES[part].values()), Field(discriminator="name")]


class _Misfit(ValueError):
    """Parts of a run, such as its method and its model, that do not go together."""

    def __init__(self, message: str, *parts: str) -> None:
        super().__init__(message)
        self.parts = parts


def _obstacle(method_name: str, model_name: str) -> str:
    """Return why a method does not apply to a model; nothing where it does."""
    method, model = METHODS[method_name], MODELS[model_name]
    if method.relaxes and not model.layers:
        return f"it relaxes layers, and {model_name!r} has none to relax"
    if method.by_types and model.read_types is None and model.turns is None:
        return "it regularises maps between e3nn irreps, which the features of its layers are not"
    return ""


class RunConfig(Options):
    """One run: a task, a model, a method, a seed, and how to train.

    Attributes:
        task: Name and data options of the task.
        model: Name and options of the model; those that follow from the data are left to the task.
        method: Name and options of the method.
        seed: Decides the initial weights, the order of the data and the augmentation.
        steps: Number of updates.
        batch_size: Samples per update.
        lr: Learning rate.
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        weight_decay: Of all weights, those of the terms included.
        clip: Largest norm of the gradient of the weights, or None.
        augment: Move every training batch by a random element of the task's group.
        average: Decay of an exponential moving average of the weights, which is then what is evaluated and shipped; 0
            for none.
        eval_every: Steps between evaluations on the validation split.
        log_every: Steps between rows of loss, γ, violation and multiplier in the history.
        checkpoint_every: Steps between checkpoints; cannot change the result.
        threads: Number of threads of PyTorch.
        device: ``cpu``, or ``cuda`` for a GPU for each process; the data and what is drawn stay on the CPU.
        compile: Whether the training steps run through ``torch.compile``; what it cannot compile runs as it is.
    """

    task: _one_of("task")  # type: ignore[valid-type]
    model: _one_of("model")  # type: ignore[valid-type]
    method: _one_of("method") = CHOICES["method"]["ace"](name="ace")  # type: ignore[valid-type]
    seed: int = Field(0, ge=0)
    steps: int = Field(10_000, gt=0)
    batch_size: int = Field(100, gt=0)
    lr: float = Field(1e-3, gt=0)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: float = Field(0.0, ge=0)
    clip: float | None = Field(None, gt=0)
    augment: bool = False
    average: float = Field(0.0, ge=0, lt=1)
    eval_every: int = Field(500, gt=0)
    log_every: int = Field(10, gt=0)
    checkpoint_every: int = Field(1000, gt=0)
    threads: int = Field(1, gt=0)
    device: Literal["cpu", "cuda"] = "cpu"
    compile: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        task, model, method = self.task.name, self.model.name, self.method.name
        running = [name for name, entry in MODELS.items() if name in TASKS[task].models or task in entry.tasks]
        if model not in running:
            raise _Misfit(f"model {model!r} does not run on {task} ({', '.join(running)} do)", "model", "task")
        if reason := _obstacle(method, model):
            fitting = ", ".join(name for name in METHODS if not _obstacle(name, model))
            raise _Misfit(
                f"method {method!r} does not apply to model {model!r}: {reason}; those that do: {fitting}",
                "method",
                "model",
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Return everything that can change the result, as plain values."""
        return self.model_dump(mode="json", exclude={"checkpoint_every", *self._usual()})

    def options(self) -> dict[str, Any]:
        """Return what can be swept, as columns of a table: dotted keys, lists and dictionaries as text.

        Example:
            >>> load_run("nbody", ["method=penalty", "method.weight=10"]).options()["config.method.weight"]
            10.0
        """
        unswept = {"checkpoint_every", "log_every", "seed", *self._usual()}
        flat = _flatten(self.model_dump(mode="json", exclude=unswept), "")
        return {
            OPTION + ".".join(key): value if isinstance(value, bool | int | float | str | None) else json.dumps(value)
            for key, (value, _) in flat.items()
            if key[-1] != "name"
        }

    def _usual(self) -> set[str]:
        """Options that came later and are left out where they change nothing: a run stays the same run."""
        return {name for name in ("device", "compile") if getattr(self, name) == RunConfig.model_fields[name].default}

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON of ``identity``, hexadecimal."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def folder(self) -> Path:
        """Folder of the run inside that of its suite."""
        pair = f"{self.task.name}-{self.model.name}"
        return Path(pair, self.method.name, f"seed{self.seed}-{self.hash[:8]}")

    @property
    def label(self) -> str:
        """Name of the run for people: ``task-model/method/seed``."""
        return f"{self.task.name}-{self.model.name}/{self.method.name}/seed{self.seed}"

    def to_yaml(self) -> str:
        """Return the file that ``load_run`` reads back as the same configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class _Block(Options):
    """One product of a suite's grid; methods and seeds default to those of the suite.

    ``sweep`` holds values of dotted keys, such as ``method.eps: [0.02, 0.05]``; each combination is a run.
    An optional block is left out where its data are missing, instead of stopping the suite.
    """

    tasks: list[str] = Field(min_length=1)
    models: list[str] = Field(min_length=1)
    methods: list[str] | None = None
    seeds: list[int] | None = None
    overrides: dict[str, Any] = Field({})
    sweep: dict[str, list[Any]] = Field({})
    optional: bool = False


class Suite(NamedTuple):
    """The runs of a suite, and which of them to leave out where their data are missing (their hashes)."""

    runs: list[RunConfig]
    optional: frozenset[str]


class SuiteConfig(Options):
    """A grid of runs: the union of blocks, each task × model × method × seed.

    Attributes:
        grid: The blocks.
        methods: Methods of the blocks that name none.
        seeds: Seeds of the blocks that name none.
        overrides: Settings of every run; those of a block win over them.
    """

    grid: list[_Block] = Field(min_length=1)
    methods: list[str] = Field([])
    seeds: list[int] = Field([0])
    overrides: dict[str, Any] = Field({})


def load_run(task: str | Path, words: Iterable[str] = ()) -> RunConfig:
    """Read the configuration of one run.

    Args:
        task: Name of a file in ``configs/tasks``, or the path of a YAML file.
        words: ``key=value`` overrides, such as ``steps=100``, ``method=cr`` or ``method.weight=0.1``.

    Returns:
        The configuration with every default filled in.

    Raises:
        ConfigError: Unknown keys, wrong values, or a file that cannot be read.

    Example:
        >>> config = load_run("nbody", ["method=cr", "method.weight=0.1"])
        >>> config.label, config.method.weight
        ('nbody-egnn/cr/seed0', 0.1)
    """
    return _resolve(task, parse_words(words))


def load_suite(path: str | Path, words: Iterable[str] = ()) -> Suite:
    """Read a suite and expand its grid.

    Args:
        path: Name of a file in ``configs/suites``, or the path of a YAML file.
        words: ``key=value`` overrides of every run.

    Returns:
        The runs, seeds outermost, so that an interrupted suite has whole comparisons.

    Raises:
        ConfigError: Unknown keys, wrong values, or a file that cannot be read.

    Example:
        >>> sorted({run.method.name for run in load_suite("smoke").runs})
        ['ace', 'ace-paper', 'ace-resilient', 'ace-tolerance', 'cr', 'strict', 'unconstrained']
    """
    path = find("suites", path)
    source = str(path)
    content = _read(path)
    try:
        suite = SuiteConfig(**content)
    except ValidationError as error:
        raise ConfigError(_report(error, SuiteConfig, lambda _: source)) from None
    shared = _flatten(suite.overrides, source)
    last = parse_words(words)
    runs: dict[str, RunConfig] = {}
    optional: set[str] = set()
    findings: dict[str, None] = {}
    for block in suite.grid:
        own = _flatten(block.overrides, source)
        seeds = suite.seeds if block.seeds is None else block.seeds
        methods = suite.methods if block.methods is None else block.methods
        swept = [dict(zip(block.sweep, values, strict=True)) for values in product(*block.sweep.values())]
        for task, model, method, seed, setting in product(block.tasks, block.models, methods, seeds, swept):
            place = _flatten({"model": model, "method": method, "seed": seed}, source)
            chosen: Flat = {tuple(key.split(".")): (value, source) for key, value in setting.items()}
            try:
                run = _resolve(task, _overlay(shared, own, place, chosen, last))
            except ConfigError as error:
                findings.update(dict.fromkeys(str(error).splitlines()))
            else:
                runs[run.hash] = run
                if block.optional:
                    optional.add(run.hash)
    if not runs and not findings:
        findings[f"{source}: no methods, so no runs; add methods: [strict, ace]"] = None
    if findings:
        raise ConfigError("\n".join(findings))
    return Suite(sorted(runs.values(), key=lambda run: run.seed), frozenset(optional))


def parse_words(words: Iterable[str]) -> Flat:
    """Parse ``key=value`` words; values are YAML.

    Raises:
        ConfigError: A word without ``=``, or whose value is not YAML.

    Example:
        >>> parse_words(["steps=100", "method=cr"])
        {('steps',): (100, 'command line'), ('method', 'name'): ('cr', 'command line')}
    """
    flat: Flat = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{WORDS}: {word!r} is not of the form key=value, such as steps=100")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{WORDS}: the value of {word!r} is not YAML: {_first_line(error)}") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        flat = _overlay(flat, _flatten(value, WORDS))
    return flat


def find(kind: str, word: str | Path) -> Path:
    """Return the path of a configuration file that was given by name or by path.

    Args:
        kind: ``tasks``, ``methods`` or ``suites``.
        word: A name without suffix, or a path.

    Raises:
        ConfigError: There is no such file; the message names the nearest.

    Example:
        >>> find("suites", "smoke").name
        'smoke.yaml'
    """
    path = Path(word)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        raise ConfigError(f"{path}: no such file")
    files = _files(kind)
    if str(word) in files:
        return files[str(word)]
    names = sorted(files)
    raise ConfigError(f"no {kind[:-1]} called {str(word)!r}{_nearest(str(word), names)}; or pass a YAML file")


def _files(kind: str) -> dict[str, Path]:
    """Return the configuration files that can be called by name; those of the repository come before those of users."""
    folders = [CONFIGS, *(folder / "configs" for folder in plugins.folders())]
    return {path.stem: path for folder in reversed(folders) for path in (folder / kind).glob("*.yaml")}


def _resolve(task: str | Path, overrides: Flat) -> RunConfig:
    """Stack the sources of a run and check the result."""
    path = find("tasks", task)
    content = _read(path)
    entries = content.pop("models", {})
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ConfigError(f"{path}: models must hold the settings of each model, such as {{segnn: {{lr: 5e-4}}}}")
    for unknown in entries.keys() - CHOICES["model"].keys():
        raise ConfigError(f"{path}: unknown model {unknown!r} under models{_nearest(str(unknown), list(MODELS))}")
    flat = _overlay(_flatten(content, str(path)), overrides)
    model, method = (str(flat.get((part, "name"), ("",))[0]) for part in ("model", "method"))
    if model in entries:
        name: Flat = {("model", "name"): (model, str(path))}
        own = _flatten(entries[model], f"{path} (models: {model})")
        flat = _overlay(_flatten(content, str(path)), name, own, overrides)
    if defaults := _files("methods").get(method or "ace"):
        chosen: Flat = {("method", "name"): (method or "ace", str(path))}
        flat = {**_flatten(_read(defaults), str(defaults)), **chosen, **flat}
    return _check(flat, str(path))


def _check(flat: Flat, file: str) -> RunConfig:
    def source(key: tuple[str, ...]) -> str:
        return next((where for name, (_, where) in flat.items() if key and name[: len(key)] == key), file)

    nested: dict[str, Any] = {}
    for key, (value, _) in flat.items():
        inner = nested
        for part in key[:-1]:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{flat[key][1]}: {'.'.join(key)!r}: {part!r} is a single value, it has no parts")
        inner[key[-1]] = value
    try:
        return RunConfig(**nested)
    except ValidationError as error:
        raise ConfigError(_report(error, RunConfig, source)) from None


def _flatten(content: Mapping[str, Any], source: str) -> Flat:
    """Flatten nested settings; the name alone may stand for a task, model or method without options."""
    flat: Flat = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat.update({(str(key), *inner): found for inner, found in _flatten(value, source).items()})
        elif key in CHOICES:
            flat[key, "name"] = (value, source)
        else:
            flat[(str(key),)] = (value, source)
    return flat


def _overlay(*layers: Flat) -> Flat:
    """Stack settings, later ones winning; another name of a part drops the options of the old one."""
    stacked: Flat = {}
    for layer in layers:
        for part in CHOICES:
            key = (part, "name")
            if key in stacked and key in layer and stacked[key][0] != layer[key][0]:
                stacked = {old: value for old, value in stacked.items() if old[0] != part}
        stacked.update(layer)
    return stacked


_parse = lru_cache(maxsize=64)(yaml.safe_load)  # a suite reads the same few files for each of its runs


def _read(path: Path) -> dict[str, Any]:
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {_first_line(error)}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold key: value lines, not a {type(content).__name__}")
    return dict(content)


def _first_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())


def _report(error: ValidationError, schema: type[BaseModel], source: Callable[[tuple[str, ...]], str]) -> str:
    """Turn the findings of pydantic into one line each: source, key, what is wrong, what would be right."""
    lines = []
    for finding in error.errors():
        place = tuple(map(str, finding["loc"]))
        choices = CHOICES.get(place[0], {}) if place and schema is RunConfig else {}
        key = place[:1] + place[2:] if choices else place  # pydantic puts the chosen name second
        name, where = ".".join(key), source(key)
        if not place:
            error = finding["ctx"]["error"]
            sources = [source((part, "name")) for part in getattr(error, "parts", ())]
            text, where = str(error), min(sources, key=lambda word: word != WORDS, default=where)
        elif finding["type"] == "extra_forbidden":
            owner = choices[place[1]] if choices else _owner(schema, place)
            text = f"unknown key {name!r}{_nearest(place[-1], [k for k in owner.model_fields if k != 'name'])}"
        elif finding["type"] == "union_tag_invalid":
            tag = str(finding["ctx"]["tag"])
            text = f"unknown {name} {tag!r}{_nearest(tag, list(choices))}"
        elif finding["type"] in {"missing", "union_tag_not_found"}:
            text = f"no {name} is given"
        else:
            text = f"{name} = {finding['input']!r}: {finding['msg'][0].lower()}{finding['msg'][1:]}"
        lines.append(f"{where}: {text}")
    return "\n".join(lines)


def _owner(schema: type[BaseModel], place: tuple[str, ...]) -> type[BaseModel]:
    return _Block if schema is SuiteConfig and len(place) > 1 else schema


def _nearest(word: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (valid: {', '.join(valid)})"
