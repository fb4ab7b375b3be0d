"""Pictures name what they show."""

import errno

import numpy
import pandas
import pytest

from measures import plots
from runs.failures import Failed


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved."""
    figures = []
    monkeypatch.setattr("measures.plots.Figure.savefig", lambda _, path, **__: path.touch())
    monkeypatch.setattr("measures.plots.pyplot.close", figures.append)
    return figures


def texts(parts):
    return [part.get_text() for part in parts]


@pytest.mark.parametrize("interval", [None, (1.1, 1.4)])
def test_paired_ratios(drawn, tmp_path, interval):
    """Guards against intervals of two sides that overlap though one won each pair, and a gain of a few."""
    plots.paired_ratios(numpy.array([1.3, 0.9, 1.2]), interval, "speed-up", "a title", tmp_path / "ratios")
    (axes,) = drawn[0].axes
    points = axes.collections[0]
    assert points.get_offsets().tolist() == [[0.9, 1], [1.2, 2], [1.3, 3]]
    worse, *better = points.get_facecolors().tolist()
    assert worse != better[0] == better[1]
    (label,) = [text for legend in drawn[0].legends for text in texts(legend.texts)]
    between = ", 90 % confidence interval 1.10-1.40" if interval else ""
    assert label == f"median 1.20{between}; above 1 in 2 of 3"


def test_a_picture_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    """Guards against a picture that is cut short by a full disk, and an error that does not name it."""

    def full(_, path, **__):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "ratios.png").write_bytes(b"earlier")
    monkeypatch.setattr("measures.plots.Figure.savefig", full)
    with pytest.raises(Failed, match=f"cannot write {tmp_path}/ratios.png: No space left on device"):
        plots.paired_ratios(numpy.array([1.3]), None, "speed-up", "a title", tmp_path / "ratios")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("ratios.png", b"earlier")]


def test_heat_maps_have_the_figures_of_the_table(drawn, tmp_path):
    """Guards against a cut heading, and other figures than the table's."""
    row = {"exit_layer": 3, "num_speculations": 2, "speedup": 1.234, "acceptance_rate": 0.567}
    other = {**row, "num_speculations": 4, "speedup": None, "mean_accepted_length": 3.0}
    table = pandas.DataFrame([{**row, "mean_accepted_length": 2.0}, other])
    plots.heat_maps(table, "x" * 100 + "\n" + "y" * 100, tmp_path / "sweep")
    (figure,) = drawn
    figure.canvas.draw()
    title = figure._suptitle.get_window_extent()
    assert 0 <= title.x0 < title.x1 <= figure.bbox.width
    assert [texts(axes.texts) for axes in figure.axes] == [["2.00\nx 1.23", "3.00"], ["57%"] * 2]
    for axes in figure.axes:
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("draft length [tokens]", "exit layer")
