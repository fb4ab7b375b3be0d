"""Pictures name what they show."""

import pandas
import pytest

from measures import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, _: figures.append(figure))
    return figures


def test_curves_over_exits_have_title_and_units(drawn, tmp_path):
    """Guards against a picture without model, machine and units, a tick at exit 1.5, axes that begin above 0
    and exaggerate, and exits that learnt among exits that did not.
    """
    table = pandas.DataFrame({"exit_layer": [1, 2], "loss": [2.0, 1.0], "accuracy": [0.1, 0.2]})
    plots.curves_by_exit(table, ["loss", "accuracy"], [2], "a model\na machine", tmp_path / "exits")
    (figure,) = drawn
    figure.canvas.draw()
    assert figure.get_suptitle() == "a model\na machine"
    assert [axes.get_xlabel() for axes in figure.axes] == ["exit layer"] * 2
    units = ["loss [nats per token]", "accuracy [share of tokens]"]
    assert [axes.get_ylabel() for axes in figure.axes] == units
    assert all(tick == int(tick) for axes in figure.axes for tick in axes.get_xticks())
    assert [(axes.get_xlim()[0], axes.get_ylim()[0]) for axes in figure.axes] == [(0, 0)] * 2
    marked = [
        line.get_xydata().tolist()
        for axes in figure.axes
        for line in axes.lines
        if line.get_label() == "trained exits"
    ]
    assert marked == [[[2, 1.0]], [[2, 0.2]]]
    assert [text.get_text() for text in figure.axes[-1].get_legend().texts] == ["trained exits"]


def test_heat_maps_have_title_units_and_the_figures_of_the_table(drawn, tmp_path):
    """Guards against a heading that is cut at the edges, cells with other figures than the table, estimates
    that look measured, and a frame without a meaning.
    """
    row = {"exit_layer": 3, "num_speculations": 2, "speedup": 1.234, "acceptance_rate": 0.567}
    table = pandas.DataFrame([row, {**row, "num_speculations": 4, "speedup": 1.5}])
    framed = ((3, 2), "best measured speed-up")
    plots.heat_maps(table, "predicted", framed, "x" * 100 + "\n" + "y" * 100, tmp_path / "sweep")
    (figure,) = drawn
    figure.canvas.draw()
    title = figure._suptitle.get_window_extent()
    assert 0 <= title.x0 < title.x1 <= figure.bbox.width
    assert figure.axes[0].get_title().startswith("predicted speed-up over autoregressive decoding")
    assert [text.get_text() for legend in figure.legends for text in legend.texts] == [framed[1]]
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [
        ["1.23", "1.50"],
        ["57%"] * 2,
    ]
    frames = [[patch.get_xy() for patch in axes.patches] for axes in figure.axes]
    assert frames == [[(-0.48, -0.46)]] * 2  # around the first cell, which is not the fastest
    for axes in figure.axes:
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("draft length [tokens]", "exit layer")
