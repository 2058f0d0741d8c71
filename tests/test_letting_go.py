"""When `ace` let go of its terms, read off the histories of runs."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from ace.errors import AceError
from benchmarks.studies.letting_go import letting_go, report


def write(folder, name, method="ace", seed=0, *, gammas, **options):
    """A finished run with the γ of each layer after each step."""
    run = folder / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    steps = len(next(iter(gammas.values())))
    identity = {"task": "digits", "model": "cnn", "method": method, "seed": seed, "steps": steps}
    (run / "summary.json").write_text(json.dumps({**identity, **options}))
    rows = [
        {
            "step": step + 1,
            "epoch": 0,
            "layer": layer,
            "quantity": quantity,
            "value": value if quantity == "gamma" else 7.0,
        }
        for step in range(steps)
        for quantity in ("gamma", "multiplier")
        for layer, values in gammas.items()
        for value in [values[step]]
    ]
    rows += [{"step": steps, "epoch": 0, "layer": None, "quantity": "loss", "value": 1.0}]
    pd.DataFrame(rows).to_csv(run / "history.csv", index=False)


GAMMAS = {"a": [1.0, 0.5, 0.0, 0.1, 0.0], "b": [0.0] * 5}


def test_the_last_step_with_a_gamma_counts(tmp_path):
    write(tmp_path, "one", gammas=GAMMAS)
    write(tmp_path, "strict", "strict", gammas=GAMMAS)
    found = letting_go([tmp_path])
    assert set(zip(found["case"], found["steps"], found["seed"], strict=True)) == {("digits, cnn", 5, 0)}
    assert dict(zip(found["layer"], found["share"], strict=True)) == {"a": 0.8, "b": 0.0}


def test_a_run_in_two_folders_counts_once_and_options_of_the_task_tell_runs_apart(tmp_path):
    turned, upright = {"config.task.images": "rotated"}, {"config.task.images": "upright", "config.task.test": 20}
    write(tmp_path / "x", "one", gammas=GAMMAS, **turned)
    write(tmp_path / "y", "again", gammas=GAMMAS, **turned)
    write(tmp_path / "y", "other", gammas=GAMMAS, **upright)
    write(tmp_path / "y", "seed", seed=1, gammas={"a": [1.0] * 5, "b": [1.0, 0, 0, 0, 0]}, **upright)
    found = letting_go([tmp_path / "x", tmp_path / "y"])
    counts = found.groupby("case").size().to_dict()
    assert sorted(counts.values()) == [2, 4]
    assert all("images=rotated" in case or "images=upright" in case for case in counts)
    report(tmp_path, [tmp_path / "x", tmp_path / "y"])
    assert (tmp_path / "letting_go.png").stat().st_size > 5000
    assert pd.read_csv(tmp_path / "letting_go.csv").equals(found)
    last = (tmp_path / "letting_go.md").read_text().splitlines()[-1]
    assert "0.90 · 0.10" in last
    assert "0.00 to 1.00" in last


def test_without_a_run_of_ace_there_is_nothing_to_say(tmp_path):
    write(tmp_path, "one", "strict", gammas=GAMMAS)
    with pytest.raises(AceError, match="no finished run of ace"):
        letting_go([tmp_path])


def test_runs_of_other_terms_are_not_taken_for_one_another(tmp_path):
    for term in ("linear", "mlp"):
        write(tmp_path, term, gammas=GAMMAS, **{"config.method.term": term})
    with pytest.raises(AceError, match="appear more than once"):
        letting_go([tmp_path])
