"""The report's pictures, as far as the page's own test does not see them."""

from __future__ import annotations

from localgrad.run import figures


def test_long_names_have_short_lines() -> None:
    cut = "blocks=layer1.0,layer1.1,layer1.2,layer1.3,layer1.4 lr=0.1"
    losses = {f"dgl K=6 {cut}, seed 1": [1.0], "a <b>": [2.0]}
    long, short = figures.with_short_lines(figures.by_epoch(losses, "loss")).to_dict()["data"]
    lines = long["name"].split("<br>")
    assert max(map(len, lines)) <= figures.LINE
    assert " ".join(lines) == f"dgl K=6 {cut}, seed 1".replace(",layer", ", layer")
    assert short["name"] == "a &lt;b&gt;"


def test_of_too_many_curves_those_of_plain_settings_are_drawn() -> None:
    losses = {f"run {i}": [1.0, 0.5] for i in range(9)}
    for count, names, drawn in (
        (9, {"run 1", "run 3"}, ["run 1", "run 3"]), (9, {"none"}, list(losses)), (7, {"run 1"}, list(losses)[:7])
    ):  # fmt: skip
        figure = figures.by_epoch(dict(list(losses.items())[:count]), "loss")
        assert figures.leave(figure, names) == (len(drawn) == 2)
        traces = figure.to_dict()["data"]
        assert [trace["name"] for trace in traces if trace.get("visible") != "legendonly"] == drawn
