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


def test_curves_are_a_picture(tmp_path):
    series = {"a": [(10, 0.1), (5, 0.3)], "b": [(5, 0.2), (10, -0.001), (25, 0.4)]}
    plots.curves(tmp_path / "a.png", series, xlabel="calls", ylabel="distance")
    assert Image.open(tmp_path / "a.png").size == (1050, 675)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
