"""The loops of docs/own_loop.md train as `roll` does, in Lightning and Accelerate too; interrupted, they go on."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, DistributedSampler
from toys import batches as toy_batches
from toys import regression, relaxed_network

import ace

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
sys.path.insert(0, str(EXAMPLES))

import accelerate_loop  # noqa: E402
import bare_loop  # noqa: E402
import lightning_module  # noqa: E402
import lorentz  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),  # after the update is right
]
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
EPOCHS = 4


def rolled(epochs=EPOCHS, accumulate=1, batch_size=32, scaler=None, sampler=None, **cast):
    """What `roll` makes of the examples' model and data: the relaxed model and the history."""
    torch.manual_seed(0)
    batches, _ = lorentz.loaders(batch_size)
    if sampler is not None:
        batches = DataLoader(batches.dataset, batch_size, sampler=sampler)
    relaxed = ace.relax(lorentz.Force())

    def loss(model, batch):
        with torch.autocast("cpu", enabled=bool(cast), **cast):
            return lorentz.loss(model, batch)

    adam = torch.optim.Adam(relaxed.parameters(), 1e-2)
    steps = len(batches) * epochs // accumulate
    optimizer = ace.PrimalDual(ace.Problem(relaxed, loss), adam, steps, accumulate=accumulate, scaler=scaler)
    history = ace.History()
    for epoch in range(epochs):
        batches.sampler.set_epoch(epoch)
        for count, batch in enumerate(batches, start=1):
            rollout = optimizer.roll(batch)
            if count % accumulate == 0:
                history.append(rollout, epoch=epoch)
    return relaxed, history


def paths(history):
    """Every value of γ, violation, λ and loss; of the losses of an accumulation the last."""
    frame = history.frame()
    frame = frame[~frame["quantity"].astype(str).str.startswith("valid")]
    return frame.astype({"layer": str, "quantity": str}).groupby(["step", "layer", "quantity"])["value"].last()


def assert_same(trained, expected, tolerance=0.0):
    (model, history), (other, its_history) = trained, expected
    own, weights = ace.base_state_dict(model), ace.base_state_dict(other)
    torch.testing.assert_close(own, weights, rtol=0, atol=tolerance)
    pd.testing.assert_series_equal(
        paths(history), paths(its_history), rtol=0, atol=tolerance, check_exact=not tolerance
    )
    gamma = paths(history).xs("gamma", level="quantity")
    assert gamma.max() > 0.5
    assert gamma.std() > 0.1  # it moves


@pytest.mark.parametrize("name", ["bare_loop", "lightning_module", "accelerate_loop"])
def test_the_examples_return_an_equivariant_model(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path)])
    model = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")["model"]
    assert model.state_dict().keys() == lorentz.Force().state_dict().keys()
    assert lorentz.error(model).max < 1e-5
    scores = ace.History.load(tmp_path / "history.csv").frame().query("quantity == 'valid_restored'")["value"].tolist()
    assert len(scores) == 20
    assert scores[-1] < 0.01 * scores[0]
    assert str(lorentz.error(model)) in capsys.readouterr().out


@pytest.fixture(scope="module")
def alone():
    return rolled()


def test_a_bare_loop_resumes(tmp_path):
    model, history = bare_loop.train(tmp_path, EPOCHS)
    bare_loop.train(tmp_path / "interrupted", EPOCHS, until=1)
    resumed, its_history = bare_loop.train(tmp_path / "interrupted", EPOCHS)
    pd.testing.assert_frame_equal(history.frame(), its_history.frame(), check_exact=True)
    torch.testing.assert_close(model.state_dict(), resumed.state_dict(), rtol=0, atol=0)


def fit(folder, epochs=EPOCHS, **options):
    module, history = lightning_module.train(folder, epochs, **{**QUIET, **options})
    assert module.trainer.global_step == module.primal_dual.step
    return module, history


def test_lightning_trains_as_roll_does(tmp_path, alone):
    module, history = fit(tmp_path)
    assert_same((module.model, history), alone)
    assert module.primal_dual.step == module.primal_dual.steps == 8 * EPOCHS
    last = paths(history).loc[8 * EPOCHS]
    for (layer, quantity), value in last.drop("", level="layer").items():
        assert module.trainer.callback_metrics[f"{quantity}/{layer}"].item() == pytest.approx(value, rel=1e-6)
    assert module.trainer.callback_metrics["loss"].item() == pytest.approx(last["", "loss"], rel=1e-6)


def test_lightning_resumes_from_its_checkpoint(tmp_path, alone):
    def stop(trainer, module):
        trainer.should_stop = True

    with pytest.warns(ace.errors.ConstraintNotMet):  # restored while γ is on its way
        module, _ = fit(tmp_path, callbacks=[LambdaCallback(on_train_epoch_end=stop)])
    assert module.primal_dual.step == 8
    module, history = fit(tmp_path)
    assert_same((module.model, history), alone)
    assert module.primal_dual.step == 8 * EPOCHS


def test_lightning_counts_and_saves_by_updates(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "some", filename="{step}", every_n_train_steps=4, save_top_k=-1)
    module, _ = fit(tmp_path, accumulate=2, max_steps=10, callbacks=[checkpoints])
    assert module.primal_dual.step == module.primal_dual.steps == 10
    assert {path.stem for path in (tmp_path / "some").iterdir()} == {"step=4", "step=8"}


@pytest.mark.parametrize(
    ("options", "oracle"),
    [
        ({"accumulate": 2}, {"accumulate": 2}),
        ({"precision": "bf16-mixed"}, {"dtype": torch.bfloat16, "cache_enabled": False}),
        (
            {"plugins": MixedPrecision("16-mixed", "cpu")},
            {"dtype": torch.float16, "cache_enabled": False, "scaler": torch.amp.GradScaler("cpu")},
        ),
    ],
    ids=["accumulation", "bfloat16", "float16"],
)
def test_lightning_accumulates_and_casts_as_roll_does(tmp_path, options, oracle):
    module, history = fit(tmp_path, **options)
    assert_same((module.model, history), rolled(**oracle))


def accelerated(folder, **options):
    AcceleratorState._reset_state(reset_partial_state=True)  # the first in a process decides, else
    try:
        return accelerate_loop.train(folder, EPOCHS, cpu=True, **options)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_trains_as_roll_does_and_resumes(tmp_path, alone):
    accelerated(tmp_path, until=1)
    assert_same(accelerated(tmp_path), alone)


@pytest.mark.parametrize(
    ("options", "oracle"),
    [({"accumulate": 2}, {"accumulate": 2}), ({"mixed_precision": "bf16"}, {"dtype": torch.bfloat16})],
    ids=["accumulation", "bfloat16"],
)
def test_accelerate_accumulates_and_casts_as_roll_does(tmp_path, options, oracle):
    assert_same(accelerated(tmp_path, **options), rolled(**oracle))


def test_accelerate_updates_on_what_is_left_of_an_epoch(tmp_path):
    _, history = accelerated(tmp_path, accumulate=3)  # 8 batches: 3, 3 and 2
    assert history.frame()["step"].max() == 3 * EPOCHS


@pytest.mark.parametrize(
    ("constraint", "form"),
    [
        (ace.Exact(), {}),
        (ace.Bounded(0.05, measure="norm"), {}),
        (ace.Exact(measure="relative"), {"form": "augmented"}),
        (ace.Resilient(0.5), {"preset": "paper"}),
    ],
    ids=["exact", "bounded", "augmented", "paper"],
)
def test_a_loop_may_count_and_average_itself(constraint, form):
    def posed(accumulate):
        torch.manual_seed(0)
        problem = ace.Problem(relaxed_network(), regression, constraint)
        adam = torch.optim.Adam(problem.model.parameters(), 0.01)
        return ace.PrimalDual(problem, adam, steps=20, accumulate=accumulate, **form)

    counting, counted = posed(4), posed(1)
    for count, batch in enumerate(toy_batches(80), start=1):
        counting.roll(batch)
        counted.update(counted.cmp.evaluate(batch), backward=lambda value: (value / 4).backward(), last=count % 4 == 0)
    assert counting.step == counted.step == 20
    assert counting.cmp.multiplier.abs().max() > 0
    torch.testing.assert_close(counted.cmp.multiplier, counting.cmp.multiplier, rtol=0, atol=0)
    torch.testing.assert_close(counted.cmp.model.state_dict(), counting.cmp.model.state_dict(), rtol=0, atol=0)
    with pytest.raises(ace.errors.AceError, match="only one of the two"):
        counting.update(counting.cmp.evaluate(batch), last=True)


@pytest.mark.slow  # two processes each, which import everything again
@pytest.mark.parametrize("framework", ["lightning", "accelerate"])
def test_two_processes_are_one(framework, tmp_path, float64):
    script = tmp_path / "script.py"
    train = {
        # with a sampler of ours, or Lightning would take its own
        "lightning": f"""
import lightning_module
from torch.utils.data import DataLoader, DistributedSampler
batches, validation = lightning_module.loaders()
sampler = DistributedSampler(batches.dataset, 2, int(os.environ.get('LOCAL_RANK', 0)))
lightning_module.loaders = lambda: (DataLoader(batches.dataset, 32, sampler=sampler), validation)
model = lightning_module.train(folder, {EPOCHS}, devices=2, use_distributed_sampler=False, **{QUIET})[0].model
""",
        "accelerate": f"""
import ace, accelerate_loop
model = ace.restore(accelerate_loop.train(folder, {EPOCHS}, cpu=True)[0])
""",
    }[framework]
    script.write_text(f"""
import os, pathlib, torch
torch.set_default_dtype(torch.float64)
folder = pathlib.Path({str(tmp_path)!r})
{train}
torch.save(model.state_dict(), folder / f"{{os.environ.get('LOCAL_RANK', 0)}}.pt")
""")
    launcher = [] if framework == "lightning" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parents[1])])
    done = subprocess.run(
        [sys.executable, *launcher, script],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    sampler = DistributedSampler(range(256), 1, 0) if framework == "lightning" else None
    model, history = rolled(batch_size=64, sampler=sampler)
    recorded = ace.History.load(tmp_path / "history.csv")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
    torch.testing.assert_close(ranks[0], ace.base_state_dict(model), rtol=0, atol=1e-9)
    # the loss of a process is that of its half of the batch
    wanted, found = (paths(rows).drop("loss", level="quantity") for rows in (history, recorded))
    pd.testing.assert_series_equal(found, wanted, rtol=0, atol=1e-9)
