import json
import math

import pandas as pd
import pytest
from runs import narrow

from ace.errors import AceError
from benchmarks.studies import pareto


def runs(method, points, seeds=(0, 1)):
    """Rows of a method: value of its option -> (error, test error of seed 0); that of seed 1 is twice as large."""
    return pd.DataFrame(
        {
            "task": "broken",
            "model": "vector",
            "method": method,
            "seed": seed,
            "steps": 10,
            "equivariance_rms": error,
            "equivariance_p95": 2 * error,
            "test_shipped": test * (1 + seed),
            "cpu_ms_per_step": 1.0,
        }
        | ({} if value is None else {f"config.method.{OPTIONS[method]}": value})
        for value, (error, test) in points.items()
        for seed in seeds
    )


OPTIONS = {"penalty": "weight", "ace-tolerance": "eps", "ace-resilient": "rho"}
STRICT = runs("strict", {None: (1e-7, 4.0)})
PENALTY = runs("penalty", {1: (0.2, 1.0), 2: (0.1, 2.0), 9: (0.01, 3.0)})


def joined(*frames):
    return pareto.complete(pareto.priced(pd.concat(frames, ignore_index=True)))


def test_seeds_are_compared_with_strict_training_from_the_same_seed():
    frame = joined(STRICT, PENALTY)
    assert frame.groupby("setting")["relative"].agg(["min", "max"]).loc["penalty, weight=1"].tolist() == [0.25, 0.25]


def test_a_seed_of_which_a_setting_is_missing_does_not_count():
    frame = joined(STRICT, runs("penalty", {1: (0.2, 1.0)}, seeds=(1,)))
    assert set(frame["seed"]) == {1}
    assert len(frame) == 2


def test_without_strict_training_nothing_is_compared():
    with pytest.raises(AceError, match="broken, vector: no run of strict training"):
        joined(PENALTY)


def test_fronts_are_joined_where_settings_are_near():
    frame = joined(STRICT, PENALTY)
    penalty = frame[frame["method"] == "penalty"]
    assert pareto.at_error(penalty, 0.1) == 0.5
    assert pareto.at_error(penalty, math.sqrt(0.1 * 0.2)) == pytest.approx(0.375)  # half way on a logarithmic axis
    assert pareto.at_error(penalty, 0.05) == 0.75  # 0.01 and 0.1 are too far apart to say what lies between
    assert pareto.at_error(penalty, 1.0) == 0.25
    assert pareto.at_error(penalty, 0.001) == 1.0  # as strict


def test_the_table_counts_the_kept_tolerances_and_names_the_best_rival():
    frame = joined(STRICT, PENALTY, runs("ace-tolerance", {0.1: (0.1, 1.0), 0.05: (0.06, 3.6)}))
    *_, loose, tight = sorted(narrow(pareto.tolerances(frame)).splitlines()[2:], reverse=True)
    assert loose.startswith("| 0.1 | 2 of 2 | 0.1 | 0.1 | 0.2 | 1.5 | 0.250 ± 0 | 0.500 (penalty) |")
    assert tight.startswith("| 0.05 | 0 of 2 | 0.06 |")
    assert tight.endswith("0.750 (penalty) |")


def test_what_is_paid_for_makes_two_methods():
    layers = runs("ace-resilient", {1: (0.2, 2.0)}).assign(**{"config.method.measure": "strength"})
    model = runs("ace-resilient", {1: (0.1, 1.0), 3: (0.05, 2.0)}).assign(**{"config.method.measure": "equivariance"})
    frame = joined(STRICT, layers, model)
    assert list(frame["method"].unique()) == ["strict", "ace-resilient", pareto.OF_MODEL]
    assert set(frame["setting"]) == {"strict", "ace-resilient", *(f"{pareto.OF_MODEL}, rho={rho}" for rho in (1, 3))}


def test_a_figure_shows_every_method(tmp_path):
    pareto.draw(joined(STRICT, PENALTY), tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 5000


def test_runs_of_a_second_folder_join_those_of_the_first(tmp_path):
    def write(folder, seed):
        for method, error, option in (("strict", 1e-7, {}), ("ace-tolerance", 0.04, {"config.method.eps": 0.05})):
            run = tmp_path / folder / f"{method}{seed}"
            run.mkdir(parents=True)
            (run / "config.yaml").write_text("")
            row = {"task": "broken", "model": "vector", "method": method, "seed": seed, "steps": 10, **option}
            row |= {"equivariance_rms": error, "equivariance_p95": error, "test_shipped": 1.0 + seed}
            (run / "summary.json").write_text(json.dumps(row | {"cpu_seconds_per_step": 1e-3, "config_hash": run.name}))

    out = tmp_path / "out"
    out.mkdir()
    for folder, seeds in (("first", (0, 1)), ("second", (1, 2))):
        for seed in seeds:
            write(folder, seed)
        pareto.report(tmp_path / folder, out)
    found = pd.read_csv(out / "pareto.csv")
    assert found.groupby("method")["seed"].agg(list).to_dict() == {"strict": [0, 1, 2], "ace-tolerance": [0, 1, 2]}
    assert "| 0.05 | 3 of 3 |" in narrow((out / "tolerance.md").read_text())
    assert (out / "pareto-broken-vector.png").stat().st_size > 10_000
