"""The task on QM9 and its models: batches against loops, units, invariance before relaxing and after, the download."""

from __future__ import annotations

import copy
import csv
import io
import os
import zipfile

import molecules
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.nn.models import SchNet as PyGSchNet

import ace
from ace.errors import ConfigError, ConstraintNotMet, DataError
from benchmarks import data
from benchmarks import molecules as published
from benchmarks.config import load_run
from benchmarks.models import MODELS
from benchmarks.models.graphs import radius_graph
from benchmarks.models.molecular import MolecularSEGNN
from benchmarks.models.schnet import SchNet
from benchmarks.tasks import TASKS
from benchmarks.tasks.qm9 import QM9, TARGETS
from benchmarks.train import run

real_data = pytest.mark.skipif(not os.environ.get("ACE_DATA"), reason="ACE_DATA is not set")
every_model = pytest.mark.parametrize("name", TASKS["qm9"].models)
SPLITS = ("train", "valid", "test")


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    molecules.install(tmp_path, monkeypatch)
    return molecules.qm9()


class Constant(torch.nn.Module):
    """Predicts the same number for each molecule."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, z, pos, batch):
        return torch.full((int(batch[-1]) + 1, 1), self.value)


def test_batches_hold_each_molecule_once(made_up):
    task = QM9("mu")
    for number, split in enumerate(SPLITS):
        rows = iter(np.flatnonzero(made_up["split"] == number))
        for batch in task.batches(split, 7):
            for molecule in range(len(batch)):
                row = next(rows)
                atoms = slice(made_up["atom_offset"][row], made_up["atom_offset"][row + 1])
                mine = batch.inputs["batch"] == molecule
                assert batch.inputs["z"][mine].tolist() == made_up["Z"][atoms].tolist()
                np.testing.assert_array_equal(batch.inputs["pos"][mine], made_up["pos"][atoms])
                expected = (made_up["targets"][row, 0] - task.mean) / task.std
                assert batch.target[molecule].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert next(rows, None) is None
    assert [task.size(split) for split in SPLITS] == [40, 8, 12]


@pytest.mark.parametrize("name", ["mu", "gap", "Cv"])
def test_error_is_in_the_published_unit(made_up, name):
    """A constant that is the mean of the training molecules, against a loop over the raw numbers."""
    values = made_up["targets"][:, list(TARGETS).index(name)] * (27211.386246 if name == "gap" else 1)
    guess = values[made_up["split"] == 0].mean()
    expected = np.mean([abs(value - guess) for value in values[made_up["split"] == 2]])
    assert QM9(name).evaluate(Constant(0.0), "test") == {"mae": pytest.approx(expected, rel=1e-5)}


def test_statistics_are_those_of_the_training_molecules(made_up, tmp_path, monkeypatch):
    before = QM9("alpha", train=20)
    used = before.molecules["train"].numpy()
    made_up["targets"][np.setdiff1d(np.arange(60), used)] += 100
    monkeypatch.setitem(data.CHECKSUMS, "qm9_30k", data.checksum(made_up))
    data.save_arrays(tmp_path / "qm9" / "qm9_30k.npz", made_up)
    after = QM9("alpha", train=20)
    assert (after.mean, after.std) == (before.mean, before.std)
    targets = after.targets[after.molecules["train"]]
    assert targets.mean().item() == pytest.approx(0, abs=1e-5)
    assert targets.std(correction=0).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", ["U0", "U", "H", "G"])
def test_energies_do_not_depend_on_the_zero_of_each_element(made_up, tmp_path, monkeypatch, name):
    before = QM9(name)
    counts = [np.bincount(part, minlength=10) for part in np.split(made_up["Z"], made_up["atom_offset"][1:-1])]
    made_up["targets"] += (np.stack(counts) @ np.linspace(-500, 300, 10))[:, None]
    monkeypatch.setitem(data.CHECKSUMS, "qm9_30k", data.checksum(made_up))
    data.save_arrays(tmp_path / "qm9" / "qm9_30k.npz", made_up)
    after = QM9(name)
    torch.testing.assert_close(after.targets, before.targets, rtol=1e-4, atol=1e-4)
    assert after.std == pytest.approx(before.std, rel=1e-6)


@pytest.mark.usefixtures("made_up")
def test_smaller_training_sets_are_nested_and_evaluation_is_the_same():
    small, large, whole = (set(QM9(train=count).molecules["train"].tolist()) for count in (5, 17, None))
    assert small < large < whole
    assert len(large) == 17
    assert torch.equal(QM9(train=5).molecules["test"], QM9().molecules["test"])


@pytest.mark.usefixtures("made_up")
def test_targets_go_by_name_or_number():
    for number, name in enumerate(TARGETS):
        assert torch.equal(QM9(number).targets, QM9(name).targets)
        assert QM9(number).target == name
    assert load_run("qm9", ["task.target=3"]).task.target == 3
    for wrong in ("dipole", 12, -1):
        with pytest.raises(ConfigError, match=rf"target={wrong!r} is unknown; there are mu, alpha"):
            QM9(wrong)
    for wrong in (0, 41):
        with pytest.raises(ConfigError, match=f"train={wrong}: must be between 1 and 40"):
            QM9(train=wrong)


@every_model
@pytest.mark.usefixtures("made_up")
def test_plain_model_is_invariant_before_and_after(name):
    task = QM9()
    torch.manual_seed(0)
    model = MODELS[name].build(**molecules.SMALL[name])
    torch.manual_seed(0)
    changed = molecules.relaxed(task, name)
    example = next(task.batches("test", 12)).inputs
    plain = model(**example)
    assert molecules.error(task, model) < 1e-12
    assert molecules.error(task, changed) > 1e-4
    with pytest.warns(ConstraintNotMet):
        restored = ace.restore(changed)
    assert torch.equal(restored(**example), plain)
    assert restored.state_dict().keys() == model.state_dict().keys()


@every_model
@pytest.mark.usefixtures("made_up")
def test_transform_leaves_the_loss_of_the_plain_model_alone(name):
    task = QM9("r2")
    model = MODELS[name].build(**molecules.SMALL[name])
    batch = next(task.batches("train", 9))
    moved = task.transform(batch, *task.group.sample(len(batch), seed=2))
    assert (moved.inputs["pos"] - batch.inputs["pos"]).norm() > 1
    assert torch.equal(moved.target, batch.target)
    with torch.no_grad():
        torch.testing.assert_close(task.loss(model, moved), task.loss(model, batch), rtol=1e-4, atol=0)


@every_model
@pytest.mark.usefixtures("made_up")
def test_a_molecule_does_not_see_the_others_nor_the_order_of_its_atoms(name):
    task = QM9()
    model = MODELS[name].build(**molecules.SMALL[name]).double()
    together = next(task.batches("test", 5))
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in together.inputs.items()}
    predicted = model(**inputs)
    for molecule in range(5):
        mine = torch.nonzero(inputs["batch"] == molecule)[:, 0]
        shuffled = mine[torch.randperm(len(mine))]
        alone = model(inputs["z"][shuffled], inputs["pos"][shuffled], torch.zeros(len(mine), dtype=torch.long))
        torch.testing.assert_close(alone[0], predicted[molecule], rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("made_up")
def test_schnet_is_the_one_of_the_package():
    """The package's class with a neighbour list that goes through all pairs, and our weights."""
    mine = SchNet(cutoff=3.0, readout="mean", **molecules.SMALL["schnet"])
    [batch] = QM9().batches("test", 12)

    def pairs(pos, batch):
        near = [
            (j, i)
            for i in range(len(pos))
            for j in range(len(pos))
            if i != j and batch[i] == batch[j] and torch.dist(pos[i], pos[j]) < 3.0
        ]
        source, target = edges = torch.tensor(near).T
        return edges, (pos[source] - pos[target]).norm(dim=-1)

    theirs = PyGSchNet(cutoff=3.0, readout="mean", interaction_graph=pairs, **molecules.SMALL["schnet"])
    theirs.load_state_dict(mine.network.state_dict())
    torch.testing.assert_close(mine(**batch.inputs), theirs(**batch.inputs))


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    cutoff=st.none() | st.floats(0.1, 3),
    seed=st.integers(0, 99),
)
def test_edges_join_all_pairs_within_the_cutoff(sizes, cutoff, seed):
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    pos = torch.randn(len(batch), 3, generator=torch.Generator().manual_seed(seed))
    expected = {
        (j, i)
        for i in range(len(pos))
        for j in range(len(pos))
        if i != j and batch[i] == batch[j] and (cutoff is None or torch.dist(pos[i], pos[j]) < cutoff)
    }
    found = radius_graph(pos, batch, cutoff).T.tolist()
    assert sorted(map(tuple, found)) == sorted(expected)


def test_readouts_differ_by_the_number_of_atoms():
    add, mean = (MolecularSEGNN(features=8, layers=1, readout=readout) for readout in ("add", "mean"))
    mean.load_state_dict(copy.deepcopy(add.state_dict()))
    molecule = torch.tensor([8, 1, 1, 6]), torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(add(*molecule), 4 * mean(*molecule))


@pytest.mark.parametrize(("name", "method"), [("schnet", "cr"), ("schnet", "projection"), ("segnn-molecular", "ace")])
@pytest.mark.usefixtures("made_up")
def test_runs(tmp_path, name, method):
    small = [f"model.{key}={value}" for key, value in molecules.SMALL[name].items()]
    words = [f"model={name}", *small, f"method={method}", "steps=4", "eval_every=2", "batch_size=8", "task.target=gap"]
    summary = run(load_run("qm9", words), tmp_path / "run")
    assert summary["equivariance_error_float64"] < 1e-12 or method == "projection"
    assert summary["test_shipped"] > 0


def pack(folder, arrays):
    """The package that has these molecules, a third of them in each table, as pip finds it in the folder."""
    symbols, rows = published.ELEMENTS, []
    for row, index in enumerate(arrays["index"]):
        atoms = slice(arrays["atom_offset"][row], arrays["atom_offset"][row + 1])
        targets = dict(zip(published.QM9_COLUMNS, arrays["targets"][row].tolist(), strict=True))
        elements, places = [symbols[z] for z in arrays["Z"][atoms]], arrays["pos"][atoms].tolist()
        rows.append({"SMILES": "C,N", "Index": index, "Elements": elements, "XYZ_Ang": places, **targets})
    folder.mkdir(exist_ok=True)
    about = "qm9pack-1.0.3.dist-info"
    with zipfile.ZipFile(folder / "qm9pack-1.0.3-py3-none-any.whl", "w") as archive:
        for table, part in zip(published.QM9_TABLES, range(3), strict=True):
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows[20 * part : 20 * (part + 1)])
            archive.writestr(table, text.getvalue())
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: qm9pack\nVersion: 1.0.3\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")


def chosen(arrays, rows, split):
    """Some molecules, one after the other."""
    bounds = arrays["atom_offset"]
    atoms = [number for row in rows for number in range(bounds[row], bounds[row + 1])]
    sizes = [bounds[row + 1] - bounds[row] for row in rows]
    return {
        **{name: arrays[name][rows] for name in ("index", "targets")},
        **{name: arrays[name][atoms] for name in ("Z", "pos")},
        "atom_offset": np.array([sum(sizes[:count]) for count in range(len(rows) + 1)], dtype=np.int32),
        "split": np.array(split, dtype=np.uint8),
    }


@pytest.fixture
def packed(made_up, tmp_path, monkeypatch):
    """Sixty molecules where pip looks for packages, of which the default draws 25; an empty cache."""
    made_up["pos"][0] = 0.0, 1.0, 1e-7
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(published.deal_qm9, "__defaults__", (25,))
    pack(tmp_path / "packages", made_up)
    generator = np.random.default_rng(20250531)
    drawn, order = sorted(generator.permutation(60)[:25].tolist()), generator.permutation(25).tolist()
    whole = np.random.default_rng(20250531).permutation(60).tolist()
    expected = {
        "qm9_30k": chosen(made_up, drawn, [np.digitize(order.index(row), [20, 22]) for row in range(25)]),
        "qm9_full": chosen(made_up, list(range(60)), [np.digitize(whole.index(row), [50, 55]) for row in range(60)]),
    }
    for name, arrays in expected.items():
        monkeypatch.setitem(data.CHECKSUMS, name, data.checksum(arrays))
    return made_up, expected


def test_download_has_what_the_default_needs_and_all(packed, tmp_path):
    for full in (False, True):
        with pytest.raises(DataError, match="Run `ace data qm9`"):
            QM9(full=full)
    assert not TASKS["qm9"].available()[0]
    assert published.download_qm9() == tmp_path / "cache" / "qm9"
    assert TASKS["qm9"].available() == (True, "")
    for full, expected in zip((False, True), packed[1].values(), strict=True):
        arrays = published.load_qm9(full)
        for name, array in expected.items():
            np.testing.assert_array_equal(arrays[name], array, strict=True)
    assert [QM9("homo").size(split) for split in SPLITS] == [20, 2, 3]
    assert [QM9("homo", full=True).size(split) for split in SPLITS] == [50, 5, 5]


def test_what_is_not_the_published_package_is_refused(packed, tmp_path):
    made_up, _ = packed
    made_up["targets"][7, 3] += 1e-6
    pack(tmp_path / "packages", made_up)
    with pytest.raises(DataError, match=r"qm9pack==1\.0\.3 does not hold the published numbers of qm9_.* Try again"):
        published.download_qm9()
    [wheel] = (tmp_path / "packages").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        kept = {name: archive.read(name) for name in archive.namelist() if "part2" not in name}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in kept.items():
            archive.writestr(name, content)
    with pytest.raises(DataError, match=r"qm9pack-1\.0\.3-.*whl is not laid out as published .*part2.* Try again"):
        published.download_qm9()
    wheel.unlink()
    with pytest.raises(DataError, match=r"pip could not download qm9pack==1\.0\.3 \(.*No matching.* put qm9_30k\.npz"):
        published.download_qm9()
    assert not (tmp_path / "cache").exists()


def test_missing_and_altered_data(made_up, tmp_path):
    path = tmp_path / "qm9" / "qm9_30k.npz"
    assert TASKS["qm9"].available() == (True, "")
    made_up["pos"][3, 1] += 1e-3
    data.save_arrays(path, made_up)
    with pytest.raises(DataError, match="does not hold the published numbers of qm9_30k"):
        QM9()
    path.unlink()
    with pytest.raises(DataError, match=r"qm9_30k\.npz was looked for at .*ace data qm9"):
        QM9()
    available, message = TASKS["qm9"].available()
    assert not available
    assert "ace data qm9" in message


@pytest.mark.data
@real_data
def test_real_data_have_the_published_scale():
    """Standard deviations of the targets over molecules hardly depend on which are drawn (MoleculeNet's table)."""
    task = QM9("U0")
    assert [task.size(split) for split in SPLITS] == [24000, 3000, 3000]
    assert task.std == pytest.approx(1097, rel=0.01)  # what elements do not explain: 0.0405 Hartree
    for name, std in {"mu": 1.53, "alpha": 8.2, "homo": 600, "lumo": 1270, "gap": 1290, "zpve": 900, "Cv": 4.1}.items():
        assert QM9(name).std == pytest.approx(std, rel=0.03)
    sizes = torch.cat([batch.inputs["batch"].bincount() for batch in task.batches("test", 500)])
    assert (sizes.min() >= 3, sizes.max() <= 29) == (True, True)


@pytest.mark.data
@real_data
@pytest.mark.parametrize(("name", "steps"), [("schnet", 400), ("segnn-molecular", 40)])
def test_real_molecules_are_learnt(name, steps):
    task = QM9("alpha")
    torch.manual_seed(0)
    model = MODELS[name].build(**molecules.LEARNING[name])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _, batch in zip(range(steps), task.batches("train", 16, shuffle_seed=0), strict=False):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    assert task.evaluate(model, "valid")["mae"] < 0.8 * task.evaluate(Constant(0.0), "valid")["mae"]
