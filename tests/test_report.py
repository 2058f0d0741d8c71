"""From the folder of a suite to its page, and from the CSV to the same page again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from runs import cache, narrow, tiny  # noqa: F401
from scipy import stats

from ace.comparison import by_setting
from ace.errors import AceError
from ace.tables import table
from benchmarks.report import against_strict, gather, main
from benchmarks.studies import diagnosis, published, rates
from benchmarks.studies.published import beside
from benchmarks.train import run

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PAGES = sorted(path.name.removesuffix("-wide.md") for path in RESULTS.glob("*-wide.md"))


@pytest.fixture(scope="module")
def suite(cache, tmp_path_factory):  # noqa: F811
    """Two methods, two seeds; of the first seed also at another learning rate."""
    folder = tmp_path_factory.mktemp("suite")
    for method in ("strict", "ace"):
        for words in (["seed=0"], ["seed=1"], ["seed=0", "lr=0.01"]):
            config = tiny(f"method={method}", *words)
            run(config, folder / ("rates" if "lr=0.01" in words else "plain") / config.folder)
    return folder


def test_the_page_is_rebuilt_from_the_csv_alone(suite, tmp_path):
    main(["tiny", str(tmp_path), "--runs", str(suite / "plain")])
    names = {path.name for path in tmp_path.iterdir()}
    written = {"tiny.csv", "tiny-tables.md", "tiny-wide.md", "tiny-wide.tex", "tiny-wide.csv"}
    assert names == written | {"tiny-nbody-egnn.png", "tiny-comparison.png"}
    pages = {name: (tmp_path / name).read_bytes() for name in names}
    main(["tiny", str(tmp_path)])
    main(["tiny", str(tmp_path), "--runs", str(suite / "plain")])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".png"} == {
        name: page for name, page in pages.items() if not name.endswith(".png")
    }
    runs = pd.read_csv(tmp_path / "tiny.csv")
    assert runs["method"].tolist() == ["strict", "strict", "ace", "ace"]
    assert "### nbody, egnn" in pages["tiny-tables.md"].decode()
    [ratio] = [line for line in pages["tiny-wide.md"].decode().splitlines() if line.startswith("| strict")][:1]
    assert "1.000 ± 0.000" in ratio


def test_a_swept_option_is_a_condition_and_has_a_figure(suite, tmp_path):
    main(["tiny", str(tmp_path), "--runs", str(suite)])
    assert (tmp_path / "tiny-nbody-egnn-lr.png").stat().st_size > 5000
    assert not (tmp_path / "tiny-nbody-egnn.png").exists()  # curves of different rates have no mean
    text = table(gather(tmp_path / "tiny.csv", None), "test_shipped")
    assert [line.split("|")[3].strip() for line in text.splitlines()[2:]] == ["0.001", "0.001", "0.01", "0.01"]


def test_numbers_may_be_relative_to_a_method_that_is_named(suite, tmp_path):
    main(["tiny", str(tmp_path), "--runs", str(suite / "plain"), "--relative-to", "ace"])
    page = (tmp_path / "tiny-wide.md").read_text()
    assert "relative to ace with the same seed" in page
    assert "strict training" not in page
    by_method = pd.read_csv(tmp_path / "tiny-wide.csv", index_col="method").filter(like="mean")
    assert by_method.loc["ace"].tolist() == [1.0]
    assert by_method.loc["strict"].item() != 1.0
    with pytest.raises(AceError, match="no run of 'cr'"):
        main(["tiny", str(tmp_path), "--relative-to", "cr"])


def test_a_run_replaces_the_same_one_of_an_earlier_folder(suite, tmp_path):
    main(["tiny", str(tmp_path), "--runs", str(suite)])
    before = gather(tmp_path / "tiny.csv", None)
    again = tmp_path / "again"
    [source] = (suite / "rates").glob("nbody-egnn/ace/*")
    again.mkdir()
    (again / "config.yaml").write_text("")
    summary = json.loads((source / "summary.json").read_bytes()) | {"test_shipped": 7.0}
    (again / "summary.json").write_text(json.dumps(summary))
    after = gather(tmp_path / "tiny.csv", again)
    assert len(after) == len(before)
    changed = (after["test_shipped"] != before["test_shipped"]).to_numpy()
    assert after[changed][["method", "seed", "config.lr"]].to_numpy().tolist() == [["ace", 0, 0.01]]
    with pytest.raises(AceError, match="no runs"):
        gather(tmp_path / "other.csv", None)


def test_a_folder_of_one_method_joins_the_others(suite, tmp_path):
    """With its curves, if they are among those drawn; else the figure stays as it is."""
    main(["plain", str(tmp_path), "--runs", str(suite / "plain" / "nbody-egnn" / "strict")])
    figure = tmp_path / "plain-nbody-egnn.png"
    before = figure.read_bytes()
    config = tiny("method=projection", "seed=0")
    run(config, tmp_path / "more" / config.folder)
    main(["plain", str(tmp_path), "--runs", str(tmp_path / "more")])
    assert set(gather(tmp_path / "plain.csv", None)["method"]) == {"strict", "projection"}
    assert figure.read_bytes() == before
    main(["plain", str(tmp_path), "--runs", str(suite / "plain" / "nbody-egnn" / "ace")])
    assert figure.read_bytes() != before


def test_a_folder_without_the_option_that_was_swept_leaves_the_settings_apart(tmp_path):
    """Runs of strict training know nothing of the weights of a penalty."""
    identity = {"task": "nbody", "model": "egnn", "seed": 0, "status": "done"}
    rows = [{**identity, "method": "penalty", "config.method.weight": w, "config_hash": f"p{w}"} for w in (1, 2)]
    pd.DataFrame(rows).to_csv(tmp_path / "tiny.csv", index=False)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "config.yaml").write_text("")
    (tmp_path / "runs" / "summary.json").write_text(json.dumps({**identity, "method": "strict", "config_hash": "s"}))
    frame = gather(tmp_path / "tiny.csv", tmp_path / "runs")
    assert frame["config_hash"].tolist() == ["s", "p1", "p2"]


def test_an_option_that_is_a_word_elsewhere_is_the_same_in_both(tmp_path):
    def row(task, seed, **options):
        text = {f"config.{name}": value for name, value in options.items()}
        return {"task": task, "model": "egnn", "method": "strict", "seed": seed, "status": "done", **text}

    rows = [row("nbody", 0, **{"task.test": 2000}), row("digits", 0, **{"task.test": "rotated"})]
    pd.DataFrame([{**r, "config_hash": r["task"]} for r in rows]).to_csv(tmp_path / "tiny.csv", index=False)
    for number, new in enumerate([row("nbody", 1, **{"task.test": 2000}), row("molecules", 1)]):
        folder = tmp_path / "runs" / str(number)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("")
        (folder / "summary.json").write_text(json.dumps({**new, "config_hash": str(number)}))
    named, conditions = by_setting(gather(tmp_path / "tiny.csv", tmp_path / "runs"))
    assert conditions == []
    assert len(named) == 4


def test_differences_to_strict_are_paired():
    generator = np.random.default_rng(0)
    strict, ace = generator.uniform(1, 2, (2, 5))
    rows = [("strict", seed, value) for seed, value in enumerate(strict)]
    rows += [("ace", seed, value) for seed, value in enumerate(ace)]
    runs = pd.DataFrame(rows, columns=["method", "seed", "test_shipped"]).assign(task="t", model="m")
    [line] = narrow(against_strict(runs)).splitlines()[2:]
    p = stats.ttest_rel(np.log(ace), np.log(strict)).pvalue
    difference = ace - strict
    assert line == (
        f"| ace | 5 | {difference.mean():+.3g} ± {stats.sem(difference):.2g} "
        f"({100 * difference.mean() / strict.mean():+.0f} %) | {p:.2g} |"
    )


def test_a_run_that_failed_has_a_row_without_results_until_it_succeeds(suite, tmp_path):
    [source] = (suite / "plain").glob("nbody-egnn/ace/seed1-*")
    failed = tmp_path / "failed" / source.relative_to(suite / "plain")
    failed.mkdir(parents=True)
    (failed / "config.yaml").write_bytes((source / "config.yaml").read_bytes())
    (failed / "error.txt").write_text("NonFiniteLoss: loss is nan at step 3")
    frame = gather(tmp_path / "tiny.csv", tmp_path / "failed")
    assert frame["status"].tolist() == ["failed"]
    frame.to_csv(tmp_path / "tiny.csv", index=False)
    frame = gather(tmp_path / "tiny.csv", suite / "plain")
    assert frame["status"].tolist() == ["done"] * 4

    rest = frame[(frame["method"] == "strict") | (frame["seed"] == 0)]
    rest.to_csv(tmp_path / "tiny.csv", index=False)
    frame = gather(tmp_path / "tiny.csv", tmp_path / "failed")
    assert table(frame, "test_shipped").count("(1 of 2)") == 1
    main(["tiny", str(tmp_path), "--runs", str(tmp_path / "failed")])
    assert "(1 of 2)" in (tmp_path / "tiny-wide.md").read_text()


def test_published_numbers_stand_beside_ours_in_their_units():
    runs = pd.DataFrame(
        [("t", "m", "ace", seed, 500, 0.02 + 0.01 * seed, 3.0) for seed in range(2)],
        columns=["task", "model", "method", "seed", "steps", "test_shipped", "domain"],
    )
    rows = [
        ("t", "m", "ace", "test_shipped", 0.01, "7 ± 1", "A", "shorter"),
        ("t", "m", "ace", "domain", 1.0, "2", "B", "none"),
        ("t", "m", "cr", "test_shipped", 1.0, "2", "C", "none"),
    ]
    columns = ["task", "model", "method", "metric", "unit", "published", "source", "difference"]
    published = pd.DataFrame(rows, columns=columns)
    lines = narrow(beside(published, [runs.assign(task="other"), runs])).splitlines()[2:]
    assert lines == [
        "| t | m | ace | 0.01 | 7 ± 1 (A) | 2.5 ± 0.5 (2 seeds, 500 steps) | shorter |",
        "| t | m | ace | domain, 1 | 2 (B) | 3 ± 0 (2 seeds, 500 steps) | none |",
        "| t | m | cr | 1 | 2 (C) | – | none |",
    ]


def test_the_pages_of_the_documentation_are_found():
    assert {"polish", "quick", "rates", "results", "strength"} <= set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_files_of_a_page_are_those_of_its_csv(name, tmp_path):
    """All but the figures; ``python -m benchmarks.report NAME docs/results`` makes those anew that are not."""
    text = {".csv", ".md", ".tex"}
    committed = {path.name: path.read_bytes() for path in RESULTS.glob(f"{name}[-.]*") if path.suffix in text}
    [reference] = set(re.findall("relative to (.+) with the same seed", committed[f"{name}-wide.md"].decode()))
    (tmp_path / f"{name}.csv").write_bytes(committed[f"{name}.csv"])
    main([name, str(tmp_path), "--relative-to", "strict" if reference == "strict training" else reference])
    if f"{name}-sensitivity.md" in committed:
        rates.report(tmp_path)
    assert [file for file, content in committed.items() if (tmp_path / file).read_bytes() != content] == []


def test_the_committed_tables_of_two_studies_are_those_of_their_csv(tmp_path):
    for name in ("published", *published.SUITES):
        (tmp_path / f"{name}.csv").write_bytes((RESULTS / f"{name}.csv").read_bytes())
    published.report(tmp_path)
    assert (tmp_path / "published.md").read_bytes() == (RESULTS / "published.md").read_bytes()
    assert diagnosis.report(pd.read_csv(RESULTS / "diagnosis.csv")).encode() == (RESULTS / "diagnosis.md").read_bytes()
