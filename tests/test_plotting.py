from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ace import plotting
from ace.errors import AceError, NotWritten
from ace.history import History

LAYERED = {
    "gamma": (plotting.plot_gammas, "relaxation strength γ"),
    "violation": (plotting.plot_violations, "constraint violation"),
    "multiplier": (plotting.plot_multipliers, "multiplier λ"),
}


def frame(layers: int = 4, steps: int = 50, seed: int = 0) -> pd.DataFrame:
    """γ falls to exactly 0, deeper layers later."""
    generator, history = np.random.default_rng(seed), History()
    for step in range(1, steps + 1):
        history.log(step, loss=generator.uniform(0.5, 1) / step)
        for index in range(layers):
            gamma = max(0.0, 1 - (step + generator.uniform()) / (steps * (0.5 + 0.4 * index / layers)))
            history.log(step, layer=f"blocks.{index}", gamma=gamma, violation=gamma, multiplier=step * (1 + index))
        if step % 10 == 0:
            history.log(step, valid_relaxed=1 / step, valid_restored=2 / step, equivariance_error=0.5**step)
    return history.frame()


def runs(methods=("ace",), seeds: int = 3, **columns: str) -> pd.DataFrame:
    return pd.concat(
        [
            frame(seed=seed).assign(run=f"{method}/{seed}", method=method, **columns)
            for method in methods
            for seed in range(seeds)
        ],
        ignore_index=True,
    )


def axes():
    return Figure(layout="constrained").subplots()


def curves(ax):
    """Lines that are data, not the zero line."""
    return [line for line in ax.get_lines() if len(line.get_xdata()) > 2]


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []


def colour_bars(figure) -> list[str]:
    return [ax.get_ylabel() for ax in figure.axes if ax.get_label() == "<colorbar>"]


def render(ax) -> np.ndarray:
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="rgba", dpi=60)
    image = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    assert image.std() > 1  # not an empty image
    return image


@pytest.mark.parametrize("quantity", LAYERED)
@pytest.mark.parametrize("layers", [1, 4, 8])
def test_few_layers_are_named(quantity, layers):
    plot, label = LAYERED[quantity]
    data = frame(layers)
    ax = plot(data, axes())
    render(ax)
    assert ax.get_xlabel() == "step"
    assert ax.get_ylabel() == label
    assert legend(ax) == [f"blocks.{index}" for index in range(layers)]
    assert not colour_bars(ax.figure)
    assert len(curves(ax)) == layers
    for index, line in enumerate(curves(ax)):
        rows = data[(data["quantity"] == quantity) & (data["layer"] == f"blocks.{index}")]
        np.testing.assert_array_equal(line.get_xdata(), rows["step"])
        np.testing.assert_array_equal(line.get_ydata(), rows["value"])


@pytest.mark.parametrize("quantity", LAYERED)
@pytest.mark.parametrize("layers", [9, 60])
def test_many_layers_are_coloured_by_depth(quantity, layers):
    plot, _ = LAYERED[quantity]
    ax = plot(frame(layers, steps=20), axes())
    render(ax)
    assert legend(ax) == []
    assert colour_bars(ax.figure) == ["layer, from first to last"]
    assert len(curves(ax)) == layers
    brightness = [sum(to_rgb(line.get_color())) for line in curves(ax)]
    assert brightness == sorted(brightness)
    (bar,) = [other for other in ax.figure.axes if other is not ax]
    ticks = bar.get_yticks()
    assert ticks[0] == 1
    assert ticks[-1] <= layers
    assert 4 <= len(ticks) <= 10


def test_zero_is_marked_in_the_layer_panels():
    for plot, _ in LAYERED.values():
        ax = plot(frame(), axes())
        assert [line.get_ydata() for line in ax.get_lines() if len(line.get_xdata()) == 2] == [[0, 0]]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 0.1, 0.01], "log"),
        ([1.0, 0.1, 0.0], "symlog"),
        ([1.0, -0.1, 1e-30], "symlog"),
        ([1.0, 0.5, 0.3], "linear"),
        ([0.0, 0.0, 0.0], "linear"),
        ([np.nan, np.nan, np.inf], "linear"),
        ([np.nan, 1e-9, np.inf, 1.0], "log"),
    ],
)
def test_scales_follow_the_values(values, scale):
    history = History()
    for step, value in enumerate(values):
        history.log(step, layer="a", violation=value)
        history.log(step, equivariance_error=value)
    for plot in (plotting.plot_violations, plotting.plot_equivariance_error):
        ax = plot(history.frame(), axes())
        assert ax.get_yscale() == scale
        render(ax)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=5), st.integers(0, 10**7))
def test_any_numbers_can_be_drawn(values, start):
    history = History()
    for step, value in enumerate(values):
        history.log(start + step, layer="a", violation=value)
        history.log(start + step, loss=value)
    render(plotting.plot_violations(history.frame(), axes()))
    render(plotting.plot_learning_curves(history.frame(), axes()))


def test_learning_curves_of_one_run():
    ax = plotting.plot_learning_curves(frame(), axes())
    render(ax)
    assert legend(ax) == ["training loss", "validation, relaxed", "validation, restored"]
    assert ax.get_yscale() == "log"
    loss, relaxed, restored = curves(ax)
    assert len(loss.get_xdata()) == 50
    assert relaxed.get_linestyle() == "--"
    assert restored.get_linestyle() == "-"
    np.testing.assert_array_equal(restored.get_ydata(), [2 / step for step in range(10, 51, 10)])


def test_learning_curves_of_what_is_there():
    data = frame()
    ax = plotting.plot_learning_curves(data[data["quantity"] == "loss"], axes())
    assert legend(ax) == ["training loss"]
    negative = data.assign(value=-data["value"])
    assert plotting.plot_learning_curves(negative, axes()).get_yscale() == "linear"


def test_learning_curves_of_several_methods():
    ax = plotting.plot_learning_curves(runs(("strict", "ace", "cr")), axes())
    render(ax)
    assert legend(ax) == ["strict", "ace", "cr", "relaxed", "restored"]
    assert ax.get_ylabel() == "validation metric"
    lines = curves(ax)
    assert len(lines) == len(ax.get_lines()) == 6
    assert len({line.get_color() for line in lines}) == 3


def test_several_runs_are_a_mean_in_a_band_of_one_standard_error():
    data = runs(seeds=4)
    ax = plotting.plot_gammas(data, axes())
    render(ax)
    rows = data[(data["quantity"] == "gamma") & (data["layer"] == "blocks.2")]
    values = rows.pivot_table(index="step", columns="run", values="value").to_numpy()
    mean, error = values.mean(axis=1), values.std(axis=1, ddof=1) / 2
    np.testing.assert_allclose(curves(ax)[2].get_ydata(), mean, rtol=1e-12)
    (band,) = ax.collections[2].get_paths()
    for step, low, high in zip(range(1, 51), mean - error, mean + error, strict=True):
        edge = band.vertices[band.vertices[:, 0] == step, 1]
        np.testing.assert_allclose([edge.min(), edge.max()], [low, high], rtol=1e-12, atol=1e-15)


def test_one_run_has_no_band_and_many_layers_have_none():
    assert not plotting.plot_gammas(runs(seeds=1), axes()).collections
    many = pd.concat([frame(9, 10, seed).assign(run=str(seed)) for seed in range(2)])
    assert not plotting.plot_gammas(many, axes()).collections


def test_equivariance_errors_of_methods():
    ax = plotting.plot_equivariance_error(runs(("strict", "ace")), axes())
    render(ax)
    assert legend(ax) == ["strict", "ace"]
    assert ax.get_ylabel() == "relative equivariance error"
    assert plotting.plot_equivariance_error(frame(), axes()).get_legend() is None


@pytest.mark.parametrize("layers", [4, 60])
def test_trajectories_have_a_panel_for_everything_and_one_key(tmp_path, monkeypatch, layers):
    figures = []

    class Kept(Figure):
        def savefig(self, *args, **kwargs):
            figures.append(self)
            return super().savefig(*args, **kwargs)

    monkeypatch.setattr(plotting, "Figure", Kept)
    path = tmp_path / "trajectories.png"
    plotting.plot_trajectories(frame(layers, steps=20), path)
    (figure,) = figures
    panels = [ax.get_ylabel() for ax in figure.axes if ax.get_label() != "<colorbar>"]
    layered = [label for _, label in LAYERED.values()]
    assert panels == [*layered, "loss", "relative equivariance error"]
    assert len(figure.legends) == (layers == 4)
    assert len(colour_bars(figure)) == (layers == 60)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "quantities",
    [["loss"], ["equivariance_error"], ["gamma"], ["loss", "gamma"], ["loss", "gamma", "violation", "multiplier"]],
)
def test_trajectories_of_what_is_there(tmp_path, quantities):
    data = frame()
    path = tmp_path / "some.svg"
    plotting.plot_trajectories(data[data["quantity"].isin(quantities)], path)
    text = path.read_text()
    for quantity, (_, label) in LAYERED.items():
        assert (label in text) == (quantity in quantities)
    assert ("training loss" in text) == ("loss" in quantities)
    assert ("blocks.3" in text) == ("gamma" in quantities)


def test_a_history_plots_itself(tmp_path):
    history = History()
    history.log(1, loss=1.0)
    history.log(2, loss=0.5)
    history.plot(tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_long_names_keep_the_parts_that_differ():
    history = History()
    for index in range(3):
        history.log(1, layer=f"model.interaction_blocks.{index}.conv.weights_generator", gamma=1.0)
    assert legend(plotting.plot_gammas(history.frame(), axes())) == ["…0…", "…1…", "…2…"]
    history.log(1, layer="model.readout", gamma=1.0)
    assert legend(plotting.plot_gammas(history.frame(), axes()))[-1] == "…readout"
    alone = History()
    alone.log(1, layer="model." + "x" * 60, gamma=1.0)
    assert legend(plotting.plot_gammas(alone.frame(), axes())) == ["…" + "x" * 28]


def test_what_cannot_be_plotted_is_refused(tmp_path):
    data = frame()
    with pytest.raises(AceError, match="no row of gamma: the frame holds loss"):
        plotting.plot_gammas(data[data["quantity"] == "loss"], axes())
    with pytest.raises(AceError, match=r"mixes 2 methods \(ace, cr\)"):
        plotting.plot_violations(runs(("ace", "cr")), axes())
    mixed = pd.concat([runs(task="nbody"), runs(task="mocap")])
    for plot in (plotting.plot_learning_curves, plotting.plot_equivariance_error, plotting.plot_gammas):
        with pytest.raises(AceError, match=r"mixes 2 tasks \(mocap, nbody\)"):
            plot(mixed, axes())
    with pytest.raises(AceError, match="nothing to plot: the frame holds nothing"):
        plotting.plot_trajectories(History().frame(), tmp_path / "figure.png")
    with pytest.raises(AceError, match="must name an image format"):
        plotting.plot_trajectories(data, tmp_path / "figure.xyz")
    with pytest.raises(NotWritten, match="No such file or directory"):
        plotting.plot_trajectories(data, tmp_path / "absent" / "figure.png")
    assert not list(tmp_path.iterdir())


def test_without_axes_a_new_pyplot_figure_is_made():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    size = matplotlib.rcParams["font.size"]
    ax = plotting.plot_gammas(frame())
    (new,) = set(pyplot.get_fignums()) - set(before)
    assert pyplot.figure(new) is ax.figure
    assert matplotlib.rcParams["font.size"] == size  # the style does not leak
    pyplot.close(new)


def test_a_figure_given_axes_does_not_touch_pyplot():
    script = (
        "import sys; from matplotlib.figure import Figure; from ace import plotting; from ace.history import History;"
        "h = History(); h.log(1, layer='a', gamma=1.0); plotting.plot_gammas(h.frame(), Figure().subplots());"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
