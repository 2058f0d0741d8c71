"""Controllers: what they are shown, what they may return, and that any of them resumes bitwise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from runs import cache, tiny  # noqa: F401
from torch import nn

import ace
from ace.errors import AceError, ConfigError
from benchmarks.methods import METHODS
from benchmarks.methods.controllers import Controller, Descent, Schedule, Statistics
from benchmarks.train import build_model, build_task, run, training_batches

pytestmark = pytest.mark.usefixtures("cache")
HERE = f"method.controller={__name__}"


class Recorder(Controller):
    """Returns what it is told to, and keeps what it is shown."""

    reads = ("gradient", "ratio", "error")
    gammas = ((0.5, 0.25), (0.75, 0.0), (1.0, 1.0))

    def __init__(self, layers):
        self.layers, self.seen = layers, []

    def step(self, statistics):
        self.seen.append(statistics)
        return torch.tensor(self.gammas[len(self.seen) - 1])


class Silent(Recorder):
    reads = ()


class Greedy(Recorder):
    reads = ("weather", "loss")


class Wrong(Controller):
    def __init__(self, layers, value):
        self.value = value

    def step(self, statistics):
        return torch.tensor(self.value)


class Learned(Controller):
    """A recurrent state for each layer, and a map to γ that learns from the task through γ."""

    reads = ("gradient", "ratio")

    def __init__(self, layers, rate=0.05):
        self.cell, self.out = nn.GRUCell(2, 4), nn.Linear(4, 1)
        self.network = nn.ModuleList([self.cell, self.out])
        self.optimizer = torch.optim.SGD(self.network.parameters(), rate)
        self.hidden, self.before = torch.zeros(layers, 4), None

    def step(self, statistics):
        if self.before is not None:
            inputs, hidden = self.before
            self.optimizer.zero_grad()
            self.gammas(inputs, hidden)[0].backward(statistics.gradient)
            self.optimizer.step()
        inputs = torch.stack([statistics.gamma, statistics.ratio.log1p()], 1)
        self.before = inputs, self.hidden
        gammas, self.hidden = (tensor.detach() for tensor in self.gammas(inputs, self.hidden))
        return gammas

    def gammas(self, inputs, hidden):
        hidden = self.cell(inputs, hidden)
        return self.out(hidden).sigmoid()[:, 0], hidden

    def state_dict(self):
        return {"network": self.network.state_dict(), "hidden": self.hidden, "before": self.before}

    def load_state_dict(self, state):
        self.network.load_state_dict(state["network"])
        self.hidden, self.before = state["hidden"], state["before"]


def start(controller, *words):
    config = tiny("method=controlled", f"{HERE}:{controller}", *words)
    task = build_task(config)
    return METHODS["controlled"](config, build_model(config, task), task), config, task


def plain(layers=2, **given):
    none = torch.zeros(layers)
    values = {"gamma": torch.ones(layers), "gradient": none, "ratio": none}
    return Statistics(**{"step": 0, "steps": 10, **values, "loss": none.sum(), "error": none.sum(), **given})


def test_the_statistics_are_those_of_the_last_update():
    method, config, task = start("Recorder")
    method.model.double()
    batches = training_batches(config, task)
    expected = []
    for count in range(2):
        gammas = torch.tensor(Recorder.gammas[count], dtype=torch.float64)
        batch = next(batches)[1]
        double = {k: v.double() if v.is_floating_point() else v for k, v in batch.inputs.items()}
        batch = dataclasses.replace(batch, inputs=double, target=batch.target.double())
        expected.append(slow_statistics(method, task, batch, gammas))
        method.step(batch)
    method.controller.step(method.statistics)
    first, *seen = method.controller.seen
    assert (first.step, first.steps, first.gamma.tolist()) == (0, config.steps, [1.0, 1.0])
    assert not any(bool(getattr(first, name).any()) for name in ("loss", "gradient", "ratio", "error"))
    for count, (statistics, (loss, gradient, ratio, error)) in enumerate(zip(seen, expected, strict=True)):
        assert (statistics.step, statistics.gamma.tolist()) == (count + 1, list(Recorder.gammas[count]))
        assert statistics.loss.item() == pytest.approx(loss, rel=1e-12)
        assert statistics.gradient.tolist() == pytest.approx(gradient, rel=1e-6, abs=1e-9)
        assert statistics.ratio.tolist() == pytest.approx(ratio, rel=1e-6)
        assert 0.2 * error < statistics.error.item() < 5 * error  # other elements of the group
        assert not statistics.gradient.requires_grad
        assert not statistics.loss.requires_grad


@torch.no_grad()
def slow_statistics(method, task, batch, gammas):
    """Loss, its central differences in γ, the relative size of each term's output, and the equivariance error."""
    attached = list(ace.relaxations(method.model).values())

    def loss(values, change=0.0, layer=0):
        for number, relaxation in enumerate(attached):
            relaxation.gamma.fill_(values[number].item() + (change if number == layer else 0.0))
        return task.loss(method.model, batch).item()

    gradient = [(loss(gammas, 1e-5, i) - loss(gammas, -1e-5, i)) / 2e-5 for i in range(len(attached))]
    outputs = []
    handles = [
        method.model.get_submodule(r.path).register_forward_hook(lambda _, __, out: outputs.append(torch.cat(out, -1)))
        for r in attached
    ]
    ratio = []
    for number in range(len(attached)):  # the layers before keep their γ, so that this one sees the same
        pair = []
        for gamma in (0.0, 1.0):
            values = gammas.clone()
            values[number] = gamma
            outputs.clear()
            loss(values)
            pair.append(outputs[number])
        ratio.append(((pair[1] - pair[0]).norm() / pair[0].norm()).item())
    for handle in handles:
        handle.remove()
    value = loss(gammas)
    types = {"inputs": task.input_types, "outputs": task.output_type}
    error = ace.equivariance_error(method.model, batch.inputs, task.group, **types).mean
    return value, gradient, ratio, error


def test_only_what_is_asked_for_is_measured(monkeypatch):
    method, config, task = start("Silent")

    def never(*_, **__):
        raise AssertionError("measured though nobody asked")

    monkeypatch.setattr("benchmarks.methods.controllers.measuring", never)
    monkeypatch.setattr("benchmarks.methods.controllers.Watch.squares", never)
    method.step(next(training_batches(config, task))[1])
    assert all(relaxation.gamma.grad is None for relaxation in method.attached.values())
    assert not any(bool(getattr(method.statistics, name).any()) for name in ("gradient", "ratio", "error"))
    assert method.statistics.loss > 0


def test_the_optimizer_does_not_move_gamma():
    method, config, task = start("Recorder", "optimizer=adamw", "weight_decay=0.5")
    batches = training_batches(config, task)
    for gammas in Recorder.gammas:
        record = method.step(next(batches)[1]).cmp_state.misc
        assert record["gamma"].tolist() == list(gammas)
        assert method.gammas().tolist() == list(gammas)


@pytest.mark.parametrize("value", ["[1.0]", "1.0", "[.nan, 0.0]", "[[1.0, 1.0]]"])
def test_gammas_of_a_wrong_shape_or_value_are_refused(value):
    method, config, task = start("Wrong", f"method.options.value={value}")
    before = method.model.state_dict()
    with pytest.raises(AceError, match="2 finite numbers, one for each layer"):
        method.step(next(training_batches(config, task))[1])
    assert all(torch.equal(before[key], value) for key, value in method.model.state_dict().items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((f"{HERE}:Absent",), "Absent"),
        (("method.controller=no.such.module:Class",), r"no\.such"),
        (("method.controller=torch.nn:Linear",), "no subclass of Controller"),
        (("method.controller=torch:tensor",), "no subclass of Controller"),
        ((f"{HERE}:Wrong",), "value"),
        ((f"{HERE}:Wrong", "method.options.size=3"), "size"),
        ((f"{HERE}:Greedy",), "loss, weather: there are gradient, ratio, error"),
    ],
)
def test_a_controller_that_cannot_be_made_is_refused(words, message):
    config = tiny("method=controlled", *words)
    task = build_task(config)
    with pytest.raises(ConfigError, match=message):
        METHODS["controlled"](config, build_model(config, task), task)


def test_options_are_numbers_where_they_look_like_it():
    words = ("a=1e-3", "b=-2e4", "c=3", "d=abc", "e=2d", "f=true", "g=[1, x]")
    config = tiny("method=controlled", *(f"method.options.{word}" for word in words))
    assert config.method.options == {"a": 1e-3, "b": -2e4, "c": 3, "d": "abc", "e": "2d", "f": True, "g": [1, "x"]}
    assert type(config.method.options["c"]) is int


@pytest.mark.parametrize("controller", ["Learned", "Recorder"])
def test_restoring_is_an_option(controller):
    for restore in ("true", "false"):
        method, _, _ = start(controller, f"method.restore={restore}")
        assert method.ships_relaxed == (restore == "false")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("controller", [f"{HERE}:Learned", "method.controller=benchmarks.methods.controllers:Descent"])
def test_a_killed_run_resumes_bitwise(tmp_path, controller):
    config = tiny("method=controlled", controller, "method.options.rate=0.3", "steps=12", "eval_every=6")

    def stop(step):
        if step == 10:
            raise Killed

    with pytest.raises(Killed):
        run(config, tmp_path / "killed", stop)
    resumed, straight = run(config, tmp_path / "killed"), run(config, tmp_path / "straight")
    assert (tmp_path / "killed/history.csv").read_bytes() == (tmp_path / "straight/history.csv").read_bytes()
    assert resumed["test_shipped"] == straight["test_shipped"] == straight["test_relaxed"]
    frame = ace.History.load(tmp_path / "straight/history.csv").frame()
    gammas = frame[frame["quantity"] == "gamma"]
    assert gammas["value"].between(0, 1).all()
    assert gammas.groupby("step")["value"].std().max() > 1e-4  # each layer has a γ of its own
    assert any("rate" in option for option in straight)


def test_a_learned_controller_descends_on_the_loss_through_gamma():
    """The derivative by the chain rule through ``statistics.gradient`` is that of the loss."""
    method, config, task = start("Learned", "method.options.rate=1e-12", "lr=1e-12")
    batch = next(training_batches(config, task))[1]
    method.step(batch)
    controller = method.controller
    inputs, hidden = controller.before
    controller.step(method.statistics)
    found = torch.cat([p.grad.flatten() for p in controller.network.parameters()])
    gammas = controller.gammas(inputs, hidden)[0]
    attached = list(method.attached.values())
    for relaxation, gamma in zip(attached, gammas, strict=True):
        del relaxation.gamma
        relaxation.gamma = gamma.reshape(1)  # with its graph, where the parameter was
    expected = torch.autograd.grad(task.loss(method.model, batch), list(controller.network.parameters()))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-7)
    assert found.norm() > 1e-5


def test_descent_is_its_equation():
    controller, gammas, square = Descent(2, rate=0.1, decay=0.5), torch.tensor([0.5, 0.05]), torch.zeros(2)
    for count, gradient in enumerate([[3.0, 1.0], [-1.0, 2.0], [0.5, -40.0]], start=1):
        gradient = torch.tensor(gradient)
        square = 0.5 * square + 0.5 * gradient**2
        expected = (gammas - 0.1 * gradient / square.sqrt()).clamp(0, 1)
        gammas = controller.step(plain(step=count, gamma=gammas, gradient=gradient))
        torch.testing.assert_close(gammas, expected)
    assert torch.equal(Descent(2).step(plain(gamma=gammas)), gammas)  # no gradient, no step


def test_a_schedule_sees_the_share_that_the_update_completes():
    shares = []
    schedule = Schedule(lambda share: shares.append(share) or 0.5)
    for step in range(4):
        assert schedule.step(plain(layers=3, step=step, steps=4)).tolist() == [0.5] * 3
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert schedule.state_dict() == {}
