"""Laws of figures: axes that can be read, and no point left out."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from diffusion.commands import plots

RANGES = [(0.02, 0.2), (0.033, 0.041), (2.8, 320), (0.9, 3.1), (12, 13), (3e-4, 9e-4), (-0.001, 0.02), (0, 1), (5, 5)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_the_y_axis_has_two_numbers_at_least_and_holds_every_point(low, high):
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    values = np.linspace(low, high, 7)
    axes.plot(range(7), values)
    plots.scale_y(axes, values)
    figure.canvas.draw()
    bottom, top = axes.get_ylim()
    assert bottom <= low
    assert high <= top
    shown = [t for t, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True) if label.get_text()]
    assert sum(bottom <= tick <= top for tick in shown) >= 2
    assert axes.get_yscale() == ("log" if low > 0 and high >= 3 * low else "linear")


METRICS = "step,loss,error_tenth_1,error_tenth_2\n10,0.5,0.9,nan\n20,0.25,0.7,0.1\n"


@pytest.mark.parametrize("rows", [METRICS, METRICS + "30,0.2", METRICS.replace("0.5", "nan"), METRICS[:56]])
def test_the_record_of_a_run_is_a_picture_also_with_a_row_half_written_or_figures_missing(tmp_path, rows):
    (tmp_path / "metrics.csv").write_text(rows)
    plots.losses(tmp_path / "metrics.csv", tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (1320, 480)


def test_the_curves_of_a_run_are_its_record():
    columns = {
        "step": [10, 20, 30],
        "loss": [0.5, 0.25, 0.2],
        "error_tenth_1": [3, 2, 1],
        "error_tenth_2": [4, 4, np.nan],
    }
    left, right = plots._loss_figure({name: np.array(values) for name, values in columns.items()}).axes
    drawn = {line.get_label(): line.get_xydata().T for axes in (left, right) for line in axes.lines}
    wanted = {"_child0": columns["loss"], "1": columns["error_tenth_1"], "2": columns["error_tenth_2"]}
    assert set(drawn) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_array_equal(drawn[name], [columns["step"], values])


@pytest.mark.parametrize("rows", [None, "step,loss\n1,x\n", b"\xff\xfe"])
def test_a_plot_that_cannot_be_drawn_is_a_warning(tmp_path, rows):
    if rows is not None:
        (tmp_path / "metrics.csv").write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    with pytest.warns(UserWarning, match="no plot of the loss"):
        plots.losses(tmp_path / "metrics.csv", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_nothing_is_drawn_before_the_first_row(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n")
    plots.losses(tmp_path / "metrics.csv", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_curves_are_a_picture(tmp_path):
    series = {"a": [(10, 0.1), (5, 0.3)], "b": [(5, 0.2), (10, -0.001), (25, 0.4)]}
    plots.curves(tmp_path / "a.png", series, xlabel="calls", ylabel="distance")
    assert Image.open(tmp_path / "a.png").size == (1050, 675)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
