"""The task on molecular dynamics and its force fields: units, derivatives, outputs by name in every method."""

from __future__ import annotations

import os

import molecules
import numpy as np
import pytest
import torch
from runs import METHODS, RIVALS
from server import serving

import ace
from ace.errors import ConfigError, ConstraintNotMet, DataError
from ace.symmetry import Watch
from benchmarks import data
from benchmarks import molecules as published
from benchmarks.config import load_run
from benchmarks.models import MODELS
from benchmarks.models.forcefield import ForceField
from benchmarks.tasks import TASKS
from benchmarks.tasks.md import FORCE_WEIGHT, SOURCES, MolecularDynamics
from benchmarks.train import run

real_data = pytest.mark.skipif(not os.environ.get("ACE_DATA"), reason="ACE_DATA is not set")
NAMES = [name for name in TASKS["md"].models if MODELS[name].package is None]  # the others: tests/hosts
every_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    molecules.install(tmp_path, monkeypatch)
    monkeypatch.setitem(SOURCES, "3bpa", SOURCES["3bpa"]._replace(held=30))


@pytest.fixture
def task(made_up):
    return MolecularDynamics()


class Springs(torch.nn.Module):
    """The very energy that the made-up data come from, in the units of the task."""

    def __init__(self, task, factor=1.0):
        super().__init__()
        self.shift, self.scale = -1000 - task.mean, factor / task.scale

    def forward(self, z, pos, batch):
        energy, _ = molecules.springs(pos.unflatten(0, (-1, 4)))
        return ((energy + self.shift) * self.scale)[:, None]


class Zero(torch.nn.Module):
    def forward(self, z, pos, batch):
        return {"energy": pos.new_zeros(int(batch[-1]) + 1, 1), "forces": torch.zeros_like(pos)}


def test_forces_stay_minus_the_gradient_of_the_energy(task):
    """Scaled and shifted, the energies and forces of the task still fit one potential."""
    exact, twice = ForceField(Springs(task)), ForceField(Springs(task, factor=2.0))
    for split in ("train", "valid", "test"):
        for metric, value in task.evaluate(exact, split).items():
            assert value < {"energy_mae": 0.5, "force_mae": 0.01}[metric]  # meV: energies of -1000 eV in float32
        force = task.evaluate(Zero(), split)["force_mae"]
        assert task.evaluate(twice, split)["force_mae"] == pytest.approx(force, rel=1e-4)
    batch = next(task.batches("train", 20))
    assert task.loss(exact, batch) < 1e-3 < 1 < task.loss(twice, batch)


def test_metrics_and_loss_against_loops(task):
    arrays = published.load_md("ethanol")
    found = task.evaluate(Zero(), "test")
    energies = [1000 * abs(energy - task.mean) for energy in arrays["test_E"]]
    assert found["energy_mae"] == pytest.approx(np.mean(energies), rel=1e-4)
    assert found["force_mae"] == pytest.approx(1000 * np.abs(arrays["test_F"]).mean(), rel=1e-4)
    [batch] = task.batches("test", 160)
    lengths = [np.linalg.norm(force) for force in arrays["test_F"].reshape(-1, 3)]
    expected = (np.mean(energies) / 1000 + FORCE_WEIGHT * np.mean(lengths)) / task.scale
    assert task.loss(Zero(), batch).item() == pytest.approx(expected, rel=1e-4)
    assert task.metric == "force_mae"


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize(
    ("molecule", "sizes"),
    [
        ("ethanol", {"train": 110, "valid": 50, "test": 160}),
        ("acac", {"train": 110, "valid": 50, "test": 160, "test_600K": 160}),
        ("3bpa", {"train": 80, "valid": 50, "test": 30, "test_mixedT": 156}),
    ],
)
def test_splits_hold_each_configuration_once(molecule, sizes):
    task, arrays = MolecularDynamics(molecule), published.load_md(molecule)
    assert {split: task.size(split) for split in task.splits} == sizes
    assert set(task.further_tests) == set(sizes) - {"train", "valid", "test"}
    source = SOURCES[molecule]
    seen = {}
    for split in sizes:
        [batch] = task.batches(split, 1000)
        assert batch.inputs["z"].tolist() == arrays["z"].tolist() * sizes[split]
        rows = batch.inputs["pos"].unflatten(0, (-1, 4)).numpy()
        seen[split] = [row.tobytes() for row in rows]
        assert len(set(seen[split])) == sizes[split]
    own = [split for split in ("train", "valid", "test") if split != "test" or source.test is None]
    together = [row for split in own for row in seen[split]]
    assert set(together) == {row.tobytes() for row in arrays[f"{source.train}_R"]}
    assert len(together) == 160
    if molecule == "3bpa":
        assert not set(together) & set(seen["test_mixedT"])  # four are in both published files


@pytest.mark.usefixtures("made_up")
def test_smaller_training_sets_are_nested_and_scale_themselves():
    small, large = MolecularDynamics(train=8), MolecularDynamics(train=30)
    rows = [{row.numpy().tobytes() for row in t.splits["train"][0].pos.unflatten(0, (-1, 4))} for t in (small, large)]
    assert rows[0] < rows[1]
    for task in (small, large):
        _, energies, forces = task.splits["train"]
        assert energies.mean().item() == pytest.approx(0, abs=1e-3)
        assert forces.square().mean().item() == pytest.approx(1, rel=1e-4)
    with pytest.raises(ConfigError, match="train=111: must be between 1 and 110 for ethanol"):
        MolecularDynamics(train=111)
    with pytest.raises(ConfigError, match="molecule='water' is unknown; there are ethanol, acac, 3bpa"):
        MolecularDynamics("water")


def double(inputs):
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def assert_forces_are_the_gradient(model, inputs, step=1e-5):
    """Central differences of the summed energy, atom by atom and axis by axis."""
    forces = model(**inputs)["forces"]
    for atom in range(len(forces)):
        for axis in range(3):
            sides = []
            for sign in (1, -1):
                pos = inputs["pos"].detach().clone()
                pos[atom, axis] += sign * step
                sides.append(model(**{**inputs, "pos": pos})["energy"].sum().item())
            assert forces[atom, axis].item() == pytest.approx(-(sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-7)


@every_model
def test_forces_are_the_gradient_also_of_the_terms(task, name):
    """Terms that read the raw positions are part of the energy, so their slope is part of the forces."""
    model = molecules.relaxed(task, name).double()
    inputs = double(next(task.batches("test", 1)).inputs)
    assert_forces_are_the_gradient(model, inputs)
    with ace.restored(model):
        assert_forces_are_the_gradient(model, inputs)


@every_model
def test_gradients_of_a_loss_on_forces(task, name):
    """Double backward against central differences in the weights, in the direction of the gradient."""
    model = molecules.relaxed(task, name).double()
    batch = next(task.batches("test", 3))
    inputs = double(batch.inputs)
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def loss():
        return model(**inputs)["forces"].square().mean()

    slopes = torch.autograd.grad(loss(), weights, allow_unused=True)
    moves = [torch.zeros_like(w) if s is None else s for w, s in zip(weights, slopes, strict=True)]
    size = torch.stack([move.square().sum() for move in moves]).sum().sqrt()
    sides = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            torch._foreach_add_(weights, moves, alpha=step / size.item())
        sides.append(loss().item())
        with torch.no_grad():
            torch._foreach_sub_(weights, moves, alpha=step / size.item())
    assert size.item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("name", NAMES[:1])
def test_no_grad_changes_nothing_but_the_graph(task, name):
    model = MODELS[name].build(**molecules.SMALL[name])
    with_graph = model(**next(task.batches("test", 4)).inputs)
    with torch.no_grad():
        without = model(**next(task.batches("test", 4)).inputs)
    for key in ("energy", "forces"):
        assert with_graph[key].requires_grad
        assert not without[key].requires_grad
        torch.testing.assert_close(with_graph[key], without[key], rtol=1e-4, atol=1e-5)


@every_model
def test_plain_model_is_equivariant_before_and_after(task, name):
    torch.manual_seed(0)
    changed = molecules.relaxed(task, name)
    torch.manual_seed(0)
    model = MODELS[name].build(**molecules.SMALL[name])
    plain = model(**next(task.batches("test", 12)).inputs)
    assert molecules.error(task, model) < 1e-11
    assert molecules.error(task, changed) > 1e-3
    with pytest.warns(ConstraintNotMet):
        restored = ace.restore(changed)
    again = restored(**next(task.batches("test", 12)).inputs)
    assert all(torch.equal(again[key], plain[key]) for key in plain)


def test_transform_moves_forces_and_not_energies(task):
    model = MODELS["schnet-forces"].build(**molecules.SMALL["schnet-forces"])
    batch = next(task.batches("train", 6))
    elements = task.group.sample(6, seed=1)
    moved = task.transform(batch, *elements)
    assert torch.equal(moved.target["energy"], batch.target["energy"])
    for number, element in enumerate(elements):
        mine = batch.inputs["batch"] == number
        turned = batch.target["forces"][mine].double() @ element.matrix.T
        torch.testing.assert_close(moved.target["forces"][mine].double(), turned, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(task.loss(model, moved), task.loss(model, batch), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", [*METHODS, *RIVALS])
@pytest.mark.usefixtures("made_up")
def test_every_method_trains_on_outputs_by_name(tmp_path, method):
    small = [f"model.{key}={value}" for key, value in molecules.SMALL["schnet-forces"].items()]
    words = ["task.molecule=acac", "task.train=8", "steps=4", "eval_every=2", "batch_size=4", f"method={method}"]
    summary = run(load_run("md", [*words, *small]), tmp_path / "run")
    measured = ("test_shipped", "test_energy_mae", "test_600K_force_mae", "test_600K_energy_mae")
    assert all(summary[key] > 0 for key in measured)
    assert "test_force_mae" not in summary  # that is test_shipped
    ships_relaxed = summary["parameters_inference"] > summary["parameters_train"] or summary["max_gamma"] > 0
    assert summary["equivariance_error_float64"] < 1e-11 or ships_relaxed


def test_the_error_that_a_tolerance_constrains(task):
    """Forces count relative to forces and energies relative to energies, of each sample; no_grad or not."""
    model = molecules.relaxed(task, "schnet-forces").double()
    inputs = double(next(task.batches("train", 6)).inputs)
    watch = Watch(model, task.input_types, task.output_type)

    def measured():
        with watch.watching():
            model(**inputs)
        return watch.squares(task.group, step=0)

    difference, size = measured()
    assert size.mean().item() == pytest.approx(2)  # one for each output
    assert (difference > 1e-8).all()
    difference.mean().backward()
    assert max(w.grad.abs().max().item() for w in model.parameters() if w.grad is not None) > 0
    with torch.no_grad():
        torch.testing.assert_close(measured()[0], difference.detach())
    with ace.restored(model):
        assert measured()[0].max() < 1e-24


XYZ = """\
1
Properties=species:S:1:pos:R:3:forces:R:3 energy=-13.5 config_type=IsolatedAtom pbc="F F F"
H 0 0 0 0 0 0
"""


def xyz(arrays, name):
    """The text that is published for a set."""
    symbols = [published.ELEMENTS[z] for z in arrays["z"]]
    text = XYZ
    for positions, energy, forces in zip(*(arrays[f"{name}_{part}"] for part in "REF"), strict=True):
        text += f'{len(symbols)}\nLattice="50.0 0.0 0.0" config_type=MD energy={float(energy)!r} pbc="F F F"\n'
        for symbol, place, force in zip(symbols, positions, forces, strict=True):
            text += " ".join([symbol, *(repr(float(x)) for x in (*place, *force))]) + "\n"
    return text


@pytest.fixture
def origin(made_up, tmp_path):
    """Address of a server with the published files of the made-up data, and its folder."""
    pytest.importorskip("pooch", reason="downloads need the extra 'bench'")
    root = tmp_path / "server"
    for name, (_, sets) in published.MD_FILES.items():
        for part, file in sets.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(xyz(molecules.md(name), part))
    with serving(root) as address:
        yield address, root


def test_download_converts_and_verifies(origin, tmp_path, monkeypatch):
    address, root = origin
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "elsewhere"))
    available, message = TASKS["md"].available()
    assert not available
    assert "Run `ace data md`" in message
    assert published.download_md(address) == tmp_path / "elsewhere" / "md"
    assert TASKS["md"].available() == (True, "")
    for name in published.MD_FILES:
        for key, array in published.load_md(name).items():
            np.testing.assert_array_equal(array, molecules.md(name)[key], strict=True)
    path = root / "dataset_acac" / "test_MD_600K.xyz"
    text = path.read_text()
    for wrong, refusal in (
        (text.replace("energy=-9", "energy=-8"), r"published numbers of acac: .* Try again.* put acac\.npz"),
        ("2\n", r"test_MD_600K\.xyz is not laid out as published .* Run `ace data md` again"),
    ):
        path.write_text(wrong)
        with pytest.raises(DataError, match=refusal):
            published.download_md(address)
    path.unlink()
    with pytest.raises(DataError, match=r"test_MD_600K\.xyz could not be downloaded.* Try again.* put acac\.npz"):
        published.download_md(address)


@pytest.mark.usefixtures("made_up")
def test_each_molecule_is_available_by_itself(tmp_path):
    assert TASKS["md"].available() == published.md_available("3bpa") == (True, "")
    (tmp_path / "md" / "acac.npz").unlink()
    available, others = TASKS["md"].available()  # of the default
    assert available
    assert others == "task.molecule=acac: its data are not there. Run `ace data md` to download it."
    assert not published.md_available("acac")[0]
    with pytest.raises(DataError, match=r"acac\.npz was looked for .* Run `ace data md`"):
        MolecularDynamics("acac")
    (tmp_path / "md" / "rmd17_ethanol_botnet.npz").unlink()
    available, how = TASKS["md"].available()
    assert not available
    assert how.startswith("rmd17_ethanol_botnet.npz was looked for")


def test_altered_data_are_refused(task, tmp_path):
    arrays = molecules.md("ethanol")
    arrays["train_F"][0, 0, 0] += 0.01
    data.save_arrays(tmp_path / "md" / "rmd17_ethanol_botnet.npz", arrays)
    with pytest.raises(DataError, match="does not hold the published numbers of rmd17_ethanol_botnet"):
        MolecularDynamics()


@pytest.mark.data
@real_data
@pytest.mark.parametrize(
    ("molecule", "sizes", "force"),
    [
        ("ethanol", {"train": 950, "valid": 50, "test": 1000}, 878),
        ("acac", {"train": 450, "valid": 50, "test": 650, "test_600K": 650}, 768),
        ("3bpa", {"train": 350, "valid": 50, "test": 100, "test_mixedT": 469}, 708),
    ],
)
def test_real_data(molecule, sizes, force):
    """Sizes, and the mean absolute force of the test split in meV/Å; forces of a configuration cancel."""
    task = MolecularDynamics(molecule)
    assert {split: task.size(split) for split in task.splits} == sizes
    assert task.evaluate(Zero(), "test")["force_mae"] == pytest.approx(force, rel=0.02)
    for batch in task.batches("test", 100):
        net = torch.zeros(len(batch), 3).index_add(0, batch.inputs["batch"], batch.target["forces"])
        assert net.abs().max() < 1e-5


@pytest.mark.data
@real_data
@pytest.mark.parametrize("name", NAMES)
def test_real_forces_are_learnt(name):
    task = MolecularDynamics("ethanol")
    torch.manual_seed(0)
    model = MODELS[name].build(**molecules.LEARNING[name])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for batch in task.batches("train", 8, shuffle_seed=0):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    assert task.evaluate(model, "valid")["force_mae"] < 0.85 * task.evaluate(Zero(), "valid")["force_mae"]
