"""The figures of the report. Each function turns rows into a figure of plotly."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from localgrad.core.errors import UserError
from localgrad.run.tables import label_of

try:
    from plotly import graph_objects as go
except ImportError:
    raise UserError("plotly is not installed: pip install 'localgrad[plot]'") from None

Rows = Sequence[Mapping[str, Any]]
MIB = 2**20
# Okabe and Ito's colours can be told apart by people who confuse red and green, the markers by those who see no colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot")
LINE = 40  # A line of a legend has at most this many characters.
BINS = 600  # A timeline has about this many points, each the maximum of several.


def error_against_memory(rows: Rows, error: str = "test error, %") -> go.Figure:
    """Draws rows of `tables.summarize`."""
    figure = _figure("peak memory of a step, MiB", error)
    for i, row in enumerate(rows):
        spread = {"error_y": {"type": "data", "array": [row["error_std"]]}} if row["error_std"] != "" else {}
        point = {"x": [row["peak_bytes"] / MIB], "y": [row["error_mean"]]}
        figure.add_scatter(**point, **spread, mode="markers", name=_text(label_of(dict(row))), marker=_marker(i, 10))
    return figure.update_xaxes(rangemode="tozero")


def time_against_memory(rows: Rows) -> go.Figure:
    """Draws rows of benchmarks/frontier.py."""
    figure = _figure("peak memory of a step, MiB", "time of a step, times BP")
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kind, planned, _ = row["row"].partition(", in ")
        alone = "PyTorch alone" if kind.startswith("PyTorch: ") else "BP" if kind == "BP" else "others"
        series.setdefault(kind if planned else alone, []).append(row)
    for i, (name, mine) in enumerate(series.items()):
        mine.sort(key=lambda row: int(row["peak_bytes"]))
        figure.add_scatter(
            x=[int(row["peak_bytes"]) / MIB for row in mine], y=[float(row["times_bp"]) for row in mine],
            text=[_text(row["row"]) for row in mine], name=_text(name), marker=_marker(i, 8),
            mode="markers" if name in ("others", "PyTorch alone") else "lines+markers",
        )  # fmt: skip
    return figure.update_xaxes(type="log", dtick=0.30103, tickformat=".0f")


def by_epoch(curves: Mapping[str, Sequence[float]], what: str) -> go.Figure:
    """Draws a curve for each name, of its values at the ends of epochs 1, 2, ..."""
    figure = _figure("epoch", what)
    for i, (name, values) in enumerate(curves.items()):
        epochs = list(range(1, len(values) + 1))
        figure.add_scatter(x=epochs, y=list(values), name=_text(name), mode="lines+markers", marker=_marker(i, 7))
    return figure.update_xaxes(dtick=1 if max(map(len, curves.values()), default=0) < 30 else None)


def blocks_by_epoch(losses: Sequence[Sequence[float]]) -> go.Figure:
    """Draws a curve for each block, from light for the first to dark for the last. losses: [epochs][blocks]."""
    figure = _figure("epoch", "training loss")
    series = list(zip(*losses, strict=True))
    for k, values in enumerate(series):
        shade = k / max(1, len(series) - 1)
        colour = f"rgb({round(222 - 222 * shade)},{round(160 - 46 * shade)},{round(60 + 118 * shade)})"
        last = " (the network's own)" if k == len(series) - 1 else ""
        epochs = list(range(1, len(values) + 1))
        figure.add_scatter(x=epochs, y=list(values), name=f"block {k}{last}", mode="lines", line={"color": colour})
    return figure.update_xaxes(dtick=1 if len(losses) < 30 else None)


def timeline(steps: Mapping[str, Sequence[int]]) -> go.Figure:
    """Draws the bytes that were live during a step, one curve for each run."""
    figure = _figure("the step's allocations, first to last, %", "live memory, MiB")
    for i, (name, live) in enumerate(steps.items()):
        size = max(1, len(live) // BINS)
        most = [max(live[j : j + size]) / MIB for j in range(0, len(live), size)]
        percent = [round(100 * j / max(1, len(most) - 1), 2) for j in range(len(most))]
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        line = {"color": COLOURS[i % len(COLOURS)], "width": 1.5, "dash": dash}
        figure.add_scatter(x=percent, y=[round(m, 2) for m in most], name=_text(name), mode="lines", line=line)
    return figure.update_yaxes(rangemode="tozero")


def separability(tables: Mapping[str, Rows]) -> go.Figure:
    """Draws rows of `probe.separability` by run. Depth is in percent, so that networks of different depth compare."""
    figure = _figure("depth of the unit, % of the network", "accuracy of a linear classifier, %")
    for i, (name, rows) in enumerate(tables.items()):
        depth = [100 * (k + 1) / len(rows) for k in range(len(rows))]
        text = [f"{row['unit']}, block {row['block']}" for row in rows]
        values = [float(row["top1"]) for row in rows]
        figure.add_scatter(x=depth, y=values, text=text, name=_text(name), mode="lines+markers", marker=_marker(i, 7))
    return figure


def cka(rows: Rows, name: str) -> go.Figure:
    """Draws rows of `probe.similarity` as a heat map."""
    mine, theirs = (list(dict.fromkeys(row[column] for row in rows)) for column in ("unit", "against_unit"))
    values = [float(row["cka"]) if row["cka"] else None for row in rows]
    figure = _figure(_text(f"units of {rows[0]['against']}"), _text(f"units of {name}"))
    grid = [values[i : i + len(theirs)] for i in range(0, len(values), len(theirs))]
    figure.add_heatmap(x=theirs, y=mine, z=grid, zmin=0, zmax=1, colorscale="Viridis", colorbar={"title": "CKA"})
    return figure.update_xaxes(type="category").update_yaxes(type="category").update_layout(height=520)


def activations(rows: Rows) -> go.Figure:
    """Draws rows of `probe.activations`: a row for each image and a column for each unit, with maps of equal size."""
    images, units = (list(dict.fromkeys(row[column] for row in rows)) for column in ("image", "unit"))
    maps: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        maps.setdefault((row["image"], row["unit"]), []).append(row)
    grid = {"rows": len(images), "columns": len(units), "pattern": "independent", "xgap": 0.06, "ygap": 0.06}
    figure = _figure("", "").update_layout(grid=grid, height=130 * len(images) + 60)
    for i, ((image, unit), cells) in enumerate(maps.items()):
        number = "" if i == 0 else str(i + 1)
        width = max(int(cell["column"]) for cell in cells) + 1
        values = [float(cell["value"]) for cell in cells]
        lines = [values[j : j + width] for j in range(0, len(values), width)]
        colours = "Greys_r" if unit == "image" else "Viridis"
        where = {"xaxis": f"x{number}", "yaxis": f"y{number}", "name": f"class {cells[0]['label']}, {_text(unit)}"}
        figure.add_heatmap(z=lines, zmin=0, zmax=1, colorscale=colours, showscale=False, **where)
        title = _text(unit) if image == images[-1] else ""
        bare = {"showticklabels": False, "ticks": "", "showgrid": False, "zeroline": False, "automargin": True}
        figure.update_layout({f"xaxis{number}": {**bare, "title": title, "constrain": "domain"}})
        figure.update_layout({f"yaxis{number}": {**bare, "autorange": "reversed", "scaleanchor": f"x{number}"}})
    return figure


def tsne(rows: Rows) -> go.Figure:
    """Draws rows of `probe.embedding`, one colour for each class."""
    figure = _figure("", "")
    for i, label in enumerate(sorted({int(row["label"]) for row in rows})):
        mine = [row for row in rows if int(row["label"]) == label]
        x, y = ([round(float(row[axis]), 2) for row in mine] for axis in ("x", "y"))
        figure.add_scatter(x=x, y=y, mode="markers", name=f"class {label}", marker=_marker(i, 5))
    figure.update_layout(showlegend=len({row["label"] for row in rows}) <= 20)
    return figure.update_xaxes(showticklabels=False).update_yaxes(showticklabels=False).update_layout(height=520)


def data_of(figure: Any) -> list[dict[str, Any]]:
    """Returns the data of a figure as rows: series, x, y, and the text and spread of a point if it has them."""
    rows = []
    for trace in figure.data:
        if trace.type == "heatmap":
            series = {"series": html.unescape(trace.name)} if trace.name else {}
            for i, line in enumerate(trace.z):
                for j, value in enumerate(line):
                    x, y = (j if trace.x is None else trace.x[j]), (i if trace.y is None else trace.y[i])
                    rows.append({**series, "y": y, "x": x, "value": value})
            continue
        for x, y, text in zip_longest(trace.x, trace.y, trace.text or ()):
            spread = {} if trace.error_y.array is None else {"spread": trace.error_y.array[0]}
            point = {"point": html.unescape(text)} if text else {}
            rows.append({"series": html.unescape(trace.name), "x": x, "y": y, **point, **spread})
    return rows


def leave(figure: Any, names: Collection[str]) -> bool:
    """Hides all curves but those with these names, if there are more than colours. Returns whether it did."""
    others = [trace for trace in figure.data if html.unescape(trace.name) not in names]
    if len(figure.data) <= len(COLOURS) or len(others) in (0, len(figure.data)):
        return False
    for trace in others:
        trace.visible = "legendonly"
    return True


def with_short_lines(figure: Any) -> go.Figure:
    """Breaks the names in a figure's legend into lines that fit a narrow page."""
    for trace in figure.data:
        if trace.name:
            lines = textwrap.wrap(re.sub(r",(?=\S)", ", ", html.unescape(trace.name)), LINE)
            trace.name = "<br>".join(map(_text, lines))
    return figure


def _text(name: str) -> str:
    """Escapes a name, because plotly would read markup in it."""
    return html.escape(name, quote=False)


def _figure(x: str, y: str) -> go.Figure:
    clear = "rgba(0,0,0,0)"  # The background of the page shows through, light or dark.
    figure = go.Figure(layout={"template": "none", "paper_bgcolor": clear, "plot_bgcolor": clear})
    figure.update_layout(height=420, margin={"l": 10, "r": 10, "t": 20, "b": 10}, hovermode="closest")
    figure.update_layout(modebar={"bgcolor": clear, "color": "#808890", "activecolor": "#0072B2"})
    # The legend is below the picture, because a phone has no room beside it.
    figure.update_layout(
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "itemsizing": "constant"},
        showlegend=True,
    )
    axis = {"automargin": True, "gridcolor": "rgba(128,128,128,.3)", "zeroline": False}
    return figure.update_xaxes(title=x, **axis).update_yaxes(title={"text": y, "standoff": 12}, **axis)


def _marker(i: int, size: int) -> dict[str, Any]:
    """The marker of series i. No two of the first 49 look alike."""
    shift = i // len(COLOURS)
    return {"color": COLOURS[i % len(COLOURS)], "symbol": MARKERS[(i + shift) % len(MARKERS)], "size": size}
