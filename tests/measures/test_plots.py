"""What pictures show besides their numbers."""

import pandas
import pytest

from measures import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, _: figures.append(figure))
    return figures


def test_exits_are_whole_numbers_below_what_was_trained(drawn, tmp_path):
    """Guards against a tick at exit 1.5, and a picture that does not say what it is of."""
    table = pandas.DataFrame({"exit_layer": [1, 2], "loss": [2.0, 1.0], "accuracy": [0.1, 0.2]})
    plots.curves_by_exit(table, ["loss", "accuracy"], "a model\na machine", tmp_path / "exits")
    (figure,) = drawn
    figure.canvas.draw()
    assert figure.get_suptitle() == "a model\na machine"
    assert all(tick == int(tick) for axes in figure.axes for tick in axes.get_xticks())


def test_lines_of_100_characters_fit_above_a_sweep(drawn, tmp_path):
    """Guards against a heading that is cut at the edges of the smallest picture."""
    row = {"exit_layer": 1, "num_speculations": 1, "speedup": 1.2, "acceptance_rate": 0.5}
    plots.heat_maps(pandas.DataFrame([row]), "x" * 100 + "\n" + "y" * 100, tmp_path / "sweep")
    (figure,) = drawn
    figure.canvas.draw()
    title = figure._suptitle.get_window_extent()
    assert 0 <= title.x0 < title.x1 <= figure.bbox.width
