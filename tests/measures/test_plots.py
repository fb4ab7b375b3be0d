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


def test_agreement_by_exit_has_title_and_marks(drawn, tmp_path):
    """Guards against a picture without model and machine, a tick at exit 1.5, axes that begin above 0 and
    exaggerate, exits that learnt among exits that did not, and panels of other scores beside the one that
    decides.
    """
    table = pandas.DataFrame({"exit_layer": [1, 2], "loss": [2.0, 1.0], "agreement": [0.1, 0.2]})
    plots.agreement_by_exit(table, [2], "a model\na machine", tmp_path / "exits")
    (figure,) = drawn
    figure.canvas.draw()
    (axes,) = figure.axes
    assert figure.get_suptitle() == "a model\na machine"
    assert axes.get_xlabel() == "exit layer"
    assert axes.get_ylabel() == "tokens on which the exit agrees with the last layer"
    assert all(tick == int(tick) for tick in axes.get_xticks())
    assert (axes.get_xlim()[0], axes.get_ylim()[0]) == (0, 0)
    marked = [line.get_xydata().tolist() for line in axes.lines if line.get_label() == "trained exits"]
    assert marked == [[[2, 0.2]]]
    assert [text.get_text() for text in axes.get_legend().texts] == ["trained exits"]


def test_bars_of_kinds(drawn, tmp_path):
    """Guards against other software in the colors of this program, and a comparison without its baseline."""
    rows = [("plain", "ours", 1.0), ("fast", "ours", 2.0), ("other", "theirs", 1.5)]
    table = pandas.DataFrame(rows, columns=["side", "by", "value"]).assign(low=None, high=None)
    plots.bars(table.set_index("side"), "tokens/s", "a title", tmp_path / "bars", line=1.0)
    (figure,) = drawn
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [1.0, 2.0, 1.5]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["plain", "fast", "other"]
    ours, fast, theirs = (bar.get_facecolor() for bar in axes.patches)
    assert ours == fast != theirs
    assert [line.get_xdata() for line in axes.lines if line.get_linestyle() == "--"] == [[1.0, 1.0]]
    assert [text.get_text() for legend in figure.legends for text in legend.texts] == ["ours", "theirs"]


def test_bars_of_one_name_stand_together(drawn, tmp_path):
    """Guards against a bar that hides another."""
    rows = [("a", "x", 1.0), ("b", "x", 2.0), ("a", "y", 3.0), ("b", "y", 4.0)]
    table = pandas.DataFrame(rows, columns=["row", "by", "value"]).assign(low=None, high=None)
    plots.bars(table.set_index("row"), "", "", tmp_path / "bars")
    places = {bar.get_width(): (bar.get_y(), bar.get_height()) for bar in drawn[0].axes[0].patches}
    assert places == {value: pytest.approx((y, 0.4)) for value, y in ((1, -0.4), (2, 0.6), (3, 0), (4, 1))}


def test_heat_maps_have_title_units_and_the_figures_of_the_table(drawn, tmp_path):
    """Guards against a heading that is cut at the edges, cells with other figures than the table, estimates
    that look measured, and a frame without a meaning or around another figure than it names.
    """
    row = {"exit_layer": 3, "num_speculations": 2, "speedup": 1.234, "acceptance_rate": 0.567}
    table = pandas.DataFrame([row, {**row, "num_speculations": 4, "speedup": 1.5}])
    framed = ((3, 2), "best measured speed-up")
    plots.heat_maps(table, "predicted", framed, "x" * 100 + "\n" + "y" * 100, tmp_path / "sweep", 1.1)
    (figure,) = drawn
    figure.canvas.draw()
    title = figure._suptitle.get_window_extent()
    assert 0 <= title.x0 < title.x1 <= figure.bbox.width
    assert figure.axes[0].get_title().startswith("predicted speed-up over decoding without drafts")
    assert [text.get_text() for legend in figure.legends for text in legend.texts] == [framed[1]]
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [
        ["1.23\nmeasured 1.10", "1.50"],
        ["57%"] * 2,
    ]
    frames = [[patch.get_xy() for patch in axes.patches] for axes in figure.axes]
    assert frames == [[(-0.48, -0.46)]] * 2  # around the first cell, which is not the fastest
    for axes in figure.axes:
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("draft length [tokens]", "exit layer")
