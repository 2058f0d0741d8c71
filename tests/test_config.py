import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ace.errors import ConfigError
from benchmarks.config import CHOICES, CONFIGS, RunConfig, find, load_run, load_suite, parse_words
from benchmarks.models import MODELS
from benchmarks.tasks import TASKS

settings = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**31),
        "steps": st.integers(1, 10**6),
        "lr": st.floats(1e-12, 1e3),
        "weight_decay": st.floats(0, 1),
        "clip": st.one_of(st.none(), st.floats(1e-6, 1e6)),
        "augment": st.booleans(),
        "optimizer": st.sampled_from(["adam", "adamw", "sgd"]),
        "method": st.sampled_from(
            ["strict", "cr", {"name": "ace", "term": "mlp"}, {"name": "ace-resilient", "rho": 0.1}]
        ),
        "model": st.fixed_dictionaries({"name": st.just("egnn"), "hidden": st.integers(2, 256)}),
    },
)


def write(folder, content, name="run.yaml"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@given(settings)
def test_a_configuration_survives_its_own_file(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("config")
    run = load_run(write(folder, {"task": "nbody", "model": "egnn", **values}))
    again = load_run(write(folder, run.to_yaml(), "again.yaml"))
    assert again == run
    assert again.hash == run.hash


@given(settings, settings)
def test_hashes_are_equal_exactly_where_the_identities_are(one, two):
    first, second = (RunConfig.model_validate(_named({"task": "nbody", "model": "egnn", **v})) for v in (one, two))
    assert (first.hash == second.hash) == (first.identity() == second.identity())


def _named(values):
    return {k: {"name": v} if k in CHOICES and isinstance(v, str) else v for k, v in values.items()}


def test_only_what_can_change_the_result_is_hashed():
    base = load_run("nbody")
    assert load_run("nbody", ["checkpoint_every=7"]).hash == base.hash
    for word in ("seed=1", "lr=1e-4", "threads=2", "augment=true", "eval_every=7", "task.seed=3", "method=cr"):
        assert load_run("nbody", [word]).hash != base.hash


def test_the_hash_is_the_same_in_every_process():
    code = "from benchmarks.config import load_run; print(load_run('nbody', ['lr=3e-4']).hash)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CONFIGS.parent)
    assert done.stdout.strip() == load_run("nbody", ["lr=3e-4"]).hash


def test_sources_are_stacked():
    run = load_run("nbody", ["model=segnn", "steps=7", "method=ace-resilient", "method.rho=0.5"])
    task, method = (yaml.safe_load((CONFIGS / name).read_text()) for name in ("tasks/nbody.yaml", "methods/cr.yaml"))
    assert run.lr == task["models"]["segnn"]["lr"] != task["lr"]  # the model's entry over the task's
    assert (run.steps, run.batch_size) == (7, task["batch_size"])  # the command line over both
    assert (run.method.name, run.method.rho) == ("ace-resilient", 0.5)
    assert load_run("nbody", ["method=cr"]).method.weight == method["method"]["weight"]
    assert load_run("nbody", ["model=segnn", "lr=0.5"]).lr == 0.5


def test_another_model_drops_the_options_of_the_one_before(tmp_path):
    path = write(tmp_path, {"task": "nbody", "model": {"name": "egnn", "hidden": 16}})
    assert load_run(path).model.hidden == 16
    assert not hasattr(load_run(path, ["model=segnn"]).model, "hidden")


@pytest.mark.parametrize(
    ("word", "nearest", "source"),
    [
        ("stepz=5", "steps", "command line"),
        ("method.rh=1", "rho", "command line"),
        ("model.hiden=1", "hidden", "command line"),
        ("task.trian=1", "train", "command line"),
        ("model=segn", "segnn", "command line"),
        ("optimiser=sgd", "optimizer", "command line"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(word, nearest, source):
    with pytest.raises(ConfigError) as caught:
        load_run("nbody", ["method=ace-resilient", word])
    assert f"did you mean '{nearest}'" in str(caught.value)
    assert str(caught.value).startswith(source)


def test_an_unknown_key_of_a_file_is_refused_with_the_file(tmp_path):
    path = write(tmp_path, "task: nbody\nmodel: egnn\nbatchsize: 3\nmethod: {name: cr, wait: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2  # all findings at once
    assert all(line.startswith(str(path)) for line in lines)
    assert "did you mean 'batch_size'" in str(caught.value)
    assert "did you mean 'weight'" in str(caught.value)


@pytest.mark.parametrize(
    "word",
    [
        "steps=ten",
        "steps=0",
        "lr=-1",
        "lr=.nan",
        "lr=.inf",
        "seed=-1",
        "task=null",
        "model=[1]",
        "steps.x=1",
        "a=[",
        "steps",
        "=3",
        "model=egno",
        "task.clip=nothing",
        "optimizer=lbfgs",
    ],
)
def test_a_wrong_value_is_refused(word):
    with pytest.raises(ConfigError) as caught:
        load_run("nbody", [word])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "- a\n",
        "a: [\n",
        "steps: 3\n",
        "task: nbody\nmodels: 3\n",
        "task: nbody\nmodel: egnn\nmodels: {egn: {lr: 1}}\n",
        "task: !!python/object/apply:os.getcwd []\n",
    ],
)
def test_a_wrong_file_is_refused(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=path.name):
        load_run(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_run(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="did you mean 'nbody'"):
        load_run("nbod")


def test_words_are_yaml():
    assert parse_words(["a.b=[1, 2]", "c=true", "d=null", "e=x=y"]) == {
        ("a", "b"): ([1, 2], "command line"),
        ("c",): (True, "command line"),
        ("d",): (None, "command line"),
        ("e",): ("x=y", "command line"),
    }


def test_a_suite_is_the_union_of_its_products(tmp_path):
    path = write(
        tmp_path,
        {
            "methods": ["strict", "ace"],
            "seeds": [0, 1],
            "overrides": {"steps": 7},
            "grid": [
                {"tasks": ["nbody", "nbody-iso"], "models": ["egnn"]},
                {"tasks": ["nbody"], "models": ["egnn"], "seeds": [1]},  # again: a run counts once
                {
                    "tasks": ["nbody"],
                    "models": ["segnn"],
                    "methods": ["ace-resilient"],
                    "overrides": {"method": {"rho": 0.5}, "steps": 9},
                },
            ],
        },
    )
    runs = load_suite(path).runs
    assert len(runs) == 2 * 2 * 2 + 2
    assert {run.steps for run in runs if run.model.name == "egnn"} == {7}
    assert {(run.steps, run.method.rho) for run in runs if run.model.name == "segnn"} == {(9, 0.5)}
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert len({run.folder for run in runs}) == len(runs)
    assert {run.steps for run in load_suite(path, ["steps=3"]).runs} == {3}


def test_optional_blocks_are_known(tmp_path):
    block = {"models": ["egnn"], "methods": ["strict"]}
    path = write(
        tmp_path, {"grid": [{"tasks": ["nbody"], **block}, {"tasks": ["mocap-run"], **block, "optional": True}]}
    )
    suite = load_suite(path)
    assert [run.task.name for run in suite.runs if run.hash in suite.optional] == ["mocap-run"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"grid": [{"tasks": ["nbody"], "models": ["egnn"], "method": ["ace"]}]}, "did you mean 'methods'"),
        ({"grid": [{"tasks": ["nbody"], "models": ["egnn"]}], "seed": [0]}, "did you mean 'seeds'"),
        ({"grid": [{"tasks": ["nbody"], "models": ["egnn"]}]}, "no methods"),
        ({"grid": [], "methods": ["ace"]}, "grid"),
        ({"methods": ["ace"]}, "no grid is given"),
        ({"grid": [{"tasks": ["nbdy"], "models": ["egnn"]}], "methods": ["ace"]}, "did you mean 'nbody'"),
        ({"grid": [{"tasks": ["nbody"], "models": ["egnn"]}], "methods": ["aec"]}, "did you mean 'ace'"),
    ],
)
def test_a_wrong_suite_is_refused(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        load_suite(write(tmp_path, content))


def test_every_configuration_of_the_repository_is_valid():
    for path in (CONFIGS / "tasks").glob("*.yaml"):
        for model in TASKS[path.stem].models:
            assert load_run(path, [f"model={model}", "method=strict"]).task.name == path.stem
    for path in (CONFIGS / "methods").glob("*.yaml"):
        assert load_run("nbody", [f"method={path.stem}"]).method.name == path.stem
    for path in (CONFIGS / "suites").glob("*.yaml"):
        assert load_suite(path).runs
    assert {path.stem for path in (CONFIGS / "tasks").glob("*.yaml")} == set(TASKS)
    assert {path.stem for path in (CONFIGS / "methods").glob("*.yaml")} == set(CHOICES["method"])
    assert find("suites", "smoke").parent.name == "suites"


def test_the_device_is_part_of_the_identity_only_where_it_is_not_the_usual_one():
    plain, gpu = load_run("nbody"), load_run("nbody", ["device=cuda"])
    assert "device" not in plain.identity()
    assert gpu.identity() == {**plain.identity(), "device": "cuda"}
    assert {run.device for run in load_suite("paper").runs} == {"cuda"}


@pytest.mark.parametrize("method", ["cr", "cr-norm", "projection"])
def test_methods_that_need_irreps_are_refused_where_a_model_has_none(method, monkeypatch):
    monkeypatch.setitem(MODELS, "egnn", replace(MODELS["egnn"], read_types=None))
    with pytest.raises(ConfigError, match=f"method '{method}' does not apply to model 'egnn'"):
        load_run("nbody", [f"method={method}", "model=egnn"])
    assert load_run("nbody", ["method=ace", "model=egnn"])


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        (
            "md",
            ["method=cr", "model=mace"],
            r"command line: method 'cr' does not apply .*; those that do: strict, .*, remul",
        ),
        ("smoke2d", ["model=cnn"], r"command line: .* 'cnn' has none to relax; those that do: strict$"),
        ("nbody", ["model=egno"], r"command line: model 'egno' does not run on nbody \(egnn, segnn do\)$"),
    ],
)
def test_parts_that_do_not_go_together_are_refused_with_those_that_do(tmp_path, task, words, message):
    with pytest.raises(ConfigError) as caught:
        load_run(task, words)
    assert re.match(message, str(caught.value))
    listed = re.findall(r"those that do: (.*)", str(caught.value))
    for method in listed[0].split(", ") if listed else ():
        assert load_run(task, [*words, f"method={method}"]).method.name == method
    parts = dict(word.split("=") for word in words)
    path = write(tmp_path, {"task": task, "model": load_run(task, ["method=strict"]).model.name, **parts})
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_sweep_has_a_run_for_each_combination(tmp_path):
    file = tmp_path / "suite.yaml"
    file.write_text(
        "seeds: [0, 1]\n"
        "grid: [{tasks: [nbody], models: [egnn], methods: [ace-tolerance], "
        "sweep: {method.eps: [0.02, 0.05, 0.1], lr: [0.001, 0.01]}}]\n"
    )
    runs = load_suite(file).runs
    found = [(run.seed, run.method.eps, run.lr) for run in runs]
    assert sorted(found) == sorted((s, e, r) for s in (0, 1) for e in (0.02, 0.05, 0.1) for r in (0.001, 0.01))
    file.write_text(file.read_text().replace("method.eps", "method.epsilon"))
    with pytest.raises(ConfigError, match=r"method\.epsilon"):
        load_suite(file)
