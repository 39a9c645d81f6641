"""One HTML file about runs. It opens without a network, and the data of each figure can be downloaded as CSV."""

from __future__ import annotations

import base64
import contextlib
import html
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import localgrad
from localgrad.core.errors import UserError
from localgrad.core.sizes import mib
from localgrad.run import figures
from localgrad.run.folder import CONFIG, METRICS, TIMELINE, finished_runs, score_of, summary_rows
from localgrad.run.recipe import COUPLINGS, METHODS, OF_METHODS, PLACES, Recipe, as_dict, differences, read_recipe
from localgrad.run.tables import (
    conditions,
    csv_text,
    error_name,
    error_text,
    label_of,
    paired,
    read_csv,
    read_runs,
    row_of,
    summarize,
)

Rows = list[dict[str, Any]]
IN_LABEL = ("model", "data", "method", "coupling", "seed")  # The study and the label of a run name these fields anyway.
FIELDS = [f.name for f in fields(Recipe) if f.name not in (*IN_LABEL, *PLACES - {"recompute"})]
DEFAULT = Recipe()


@dataclass(frozen=True, eq=False)
class Ran:
    """A finished run, with its row as in runs.csv and the entries of metrics.jsonl at the ends of its epochs."""

    folder: Path
    recipe: Recipe
    row: dict[str, Any]
    epochs: Rows

    @property
    def study(self) -> str:
        """The network and the data. Only runs of the same study are compared."""
        where = f" in {self.recipe.data_dir}" if self.recipe.data.endswith("-folder") else ""
        return f"{self.recipe.model} on {self.recipe.data}{where}"

    @property
    def label(self) -> str:
        return label_of(self.row)

    def probed(self, name: str, *numbers: str) -> Rows:
        """The rows of one of its probe's tables, or none. `numbers` are the columns that must hold numbers."""
        path = self.folder / "probe" / f"{name}.csv"
        return read_csv(path, numbers) if path.exists() else []


@dataclass
class Page:
    """The page so far. `sections` maps each heading to its parts in HTML, `figures` counts the figures."""

    sections: dict[str, list[str]] = field(default_factory=dict)
    figures: int = 0

    def add(self, section: str, *parts: str) -> None:
        self.sections.setdefault(section, []).extend(parts)

    def figure(self, section: str, picture: figures.go.Figure, alt: str) -> None:
        """Adds a figure with its caption, which is also its alternative text, and its data as a download."""
        self.figures += 1
        # These buttons work without a network. One of plotly's default buttons would send the data away.
        buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]]
        config = {"responsive": True, "displaylogo": False, "showSendToCloud": False, "modeBarButtons": buttons}
        name = f"figure-{self.figures}"
        data = _download(f"{name}.csv", csv_text(figures.data_of(picture)))
        short = figures.with_short_lines(picture)
        drawn = short.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)
        caption = f"<figcaption>{html.escape(alt)} {data}</figcaption>"
        self.add(section, f'<figure aria-label="{html.escape(alt)}">{drawn}{caption}</figure>')

    def curves(self, section: str, picture: figures.go.Figure, alt: str, first: dict[str, Ran]) -> None:
        """Adds a figure with one curve for each run. Of too many curves, only those of `first` are drawn at first."""
        if figures.leave(picture, first):
            alt += " A click on a name shows or hides its curve."
        self.figure(section, picture, alt)

    def written(self, title: str, subtitle: str) -> str:
        """The HTML of the page."""
        from plotly.offline import get_plotlyjs

        contents = "".join(f'<a href="#{_anchor(name)}">{html.escape(name)}</a>' for name in self.sections)
        body = "\n".join(
            f'<section id="{_anchor(name)}"><h2>{html.escape(name)}</h2>{"".join(parts)}</section>'
            for name, parts in self.sections.items()
        )
        page = Template(files("localgrad.run").joinpath("report.html").read_text("utf-8"))
        return page.substitute(
            title=html.escape(title), subtitle=html.escape(subtitle), contents=contents, body=body,
            plotly=get_plotlyjs(),
        )  # fmt: skip


def report(paths: Sequence[Path], results: Path | None = None) -> str:
    """Returns the HTML of the page.

    Args:
        paths: Run folders, or folders of run folders.
        results: A folder with accuracy_*_runs.csv and frontier_*.csv, which are shown too.

    Raises:
        UserError: A path holds no finished run, or a file is not what it should be.
    """
    runs = find(paths)
    page = Page()
    studies: dict[str, list[Ran]] = {}
    for ran in runs:
        studies.setdefault(ran.study, []).append(ran)
    tables, timed = _results(results) if results is not None else ({}, [])
    tables |= {f"The runs below: {title}": [ran.row for ran in group] for title, group in studies.items()}
    for title, rows in tables.items():
        _study(page, title, rows)
    for path in timed:
        text = f"Time of a step against its peak memory ({path.name}): methods, and plans made for a budget."
        rows = read_csv(path, ("times_bp", "peak_bytes"))
        page.figure("Time against memory", figures.time_against_memory(rows), text)
    for title, group in studies.items():
        of = f": {title}" if len(studies) > 1 else ""
        shown = _one_of_each(group)
        _learning(page, f"Learning curves{of}", shown)
        _memory(page, f"Memory over one step{of}", shown)
        _probes(page, of, shown)
    for ran in runs:
        page.add("Runs", _about(ran))
    machines = dict.fromkeys(str(row.get("machine", "")) for rows in tables.values() for row in rows)
    started = {p for path in paths for p in (path, *path.glob("*/")) if (p / CONFIG).is_file()}
    unfinished = f" ({len(started) - len(runs)} more are not finished)" if len(started) > len(runs) else ""
    about = [f"{len(runs)} run{'s' if len(runs) > 1 else ''}{unfinished}", " / ".join(filter(None, machines))]
    about.append(f"written by localgrad {localgrad.__version__}.")
    return page.written("localgrad: test error, memory and time of runs", "; ".join(about))


def _results(folder: Path) -> tuple[dict[str, Rows], list[Path]]:
    """The tables of a results folder by their titles, those with most runs first, and the files of times of steps."""
    measured, timed = sorted(folder.glob("accuracy_*_runs.csv")), sorted(folder.glob("frontier_*.csv"))
    if not measured + timed:
        raise UserError(f"{folder} holds neither accuracy_*_runs.csv nor frontier_*.csv: name another --results")
    tables = {f"Results: {p.stem.removeprefix('accuracy_').removesuffix('_runs')}": read_runs(p) for p in measured}
    return dict(sorted(tables.items(), key=lambda item: -len(item[1]))), timed


def find(paths: Sequence[Path]) -> list[Ran]:
    """Finds the finished runs in these folders or in their subfolders, and sorts them as the page shows them."""
    runs = []
    for folder in finished_runs(paths):
        recipe = read_recipe(folder / CONFIG)
        entries = _entries(folder / METRICS)
        blocks = len(next((entry["losses"] for entry in entries if "losses" in entry), [0]))
        row = row_of(folder, recipe.label, blocks, "", recipe.seed)
        runs.append(Ran(folder, recipe, row, [entry for entry in entries if "eval_loss" in entry]))
    runs = [replace(ran, row={**ran.row, "setting": _setting(ran, runs)}) for ran in runs]
    for i, ran in enumerate(runs):
        for other in runs[:i]:
            as_much = ran.recipe.recompute == other.recipe.recompute
            if ran.study == other.study and as_much and not differences(ran.recipe, other.recipe):
                raise UserError(f"{other.folder} and {ran.folder} are the same run: name one of them")

    def order_of(ran: Ran) -> tuple:
        """By network and data, then by method in the usual order. Default settings come first."""
        kind = METHODS.index(ran.recipe.method), COUPLINGS.index(ran.recipe.coupling)
        return ran.study, *kind, ran.row["blocks"], ran.row["setting"], ran.recipe.seed

    return sorted(runs, key=order_of)


def _setting(ran: Ran, runs: Sequence[Ran]) -> str:
    """The fields of a run that differ from what is usual, as text.

    A field of the coupling, or of recomputation, is shown if it is not the default, and a cut by names always. A head
    is compared with the other runs of the method, all other fields with the other runs of the study: a field is shown
    if it differs from the value of most of them, or if no value is that of most.
    """
    study = [r.recipe for r in runs if r.study == ran.study]
    words = []
    for name in sorted(FIELDS, key="blocks".__eq__):  # Names of units may be long, so blocks come last.
        value = getattr(ran.recipe, name)
        if name == "blocks":
            shown = not isinstance(ran.recipe.cut, int)
        elif name in OF_METHODS - {"head"} | {"recompute"}:
            shown = value != getattr(DEFAULT, name)
        else:
            others = [recipe for recipe in study if name != "head" or recipe.label == ran.recipe.label]
            usual, count = Counter(getattr(recipe, name) for recipe in others).most_common(1)[0]
            shown = value != usual or 2 * count <= len(others) != count
        words += [f"{name}={value}"] if shown else []
    return " ".join(words)


def _one_of_each(runs: Sequence[Ran]) -> dict[str, Ran]:
    """Of runs that differ only in their seeds, chooses a probed one, or else the one with the lowest seed."""
    chosen: dict[str, Ran] = {}
    for ran in sorted(runs, key=lambda ran: (not ran.probed("separability"), ran.recipe.seed)):
        chosen.setdefault(ran.label, ran)
    return {f"{ran.label}, seed {ran.recipe.seed}": ran for ran in sorted(chosen.values(), key=runs.index)}


def _usual(shown: dict[str, Ran]) -> dict[str, Ran]:
    """The runs with the usual settings, as `_setting` defines them."""
    return {name: ran for name, ran in shown.items() if not ran.row["setting"]}


def _study(page: Page, section: str, runs: Rows) -> None:
    """Adds a table of error, memory and time with its figure, and the differences paired by seed."""
    rows = summarize(runs)
    bp = [row for row in rows if row["method"] == "bp" and "recompute=" not in row["setting"]]
    body = []
    for row in rows:
        same = [r for r in bp if conditions(r["setting"]) == conditions(row["setting"])]
        below = f"{100 - 100 * row['peak_bytes'] / same[0]['peak_bytes']:.1f}%" if len(same) == 1 else ""
        added = f"{row['added']:,}" if isinstance(row.get("added"), int) else ""
        body.append(
            [label_of(row), error_text(row), row["n"], mib(row["peak_bytes"]), below, added, f"{row['seconds']:.0f}"]
        )
    error = error_name(rows)
    head = ("method", f"{error}, %", "n", "peak memory", "below BP", "parameters added", "seconds")
    note = (
        f"{_capital(error)} of the last epoch: mean ± standard deviation over n seeds. Median peak memory of a step, "
        "and how far it is below that of backpropagation (BP). Median seconds of a run; other programs may have "
        "used the machine at the same time."
    )
    page.add(section, f'<p class="note">{note}</p>', _table(head, body), _download("results.csv", csv_text(rows)))
    bars = "Bars are standard deviations over seeds. Lower left is better."
    text = f"{_capital(error)} against peak memory of a step. {bars}"
    page.figure(section, figures.error_against_memory(rows, f"{error}, %"), text)
    pairs = paired(runs)
    if pairs:
        body = [[p["first"], p["second"], f"{p['difference']:+.2f}", f"{p['low']:+.2f} to {p['high']:+.2f}", p["n"]]
                for p in pairs]  # fmt: skip
        note = f"Differences of {error}, paired by seed: the second method's minus the first's, in points."
        head = ("first", "second", "difference", "95% interval", "n")
        data = _download("pairs.csv", csv_text(pairs))
        page.add(section, f"<details><summary>{note}</summary>{_table(head, body)}{data}</details>")


def _learning(page: Page, section: str, shown: dict[str, Ran]) -> None:
    errors = {name: [100 - score_of(row)[1] for row in summary_rows(ran.folder)] for name, ran in shown.items()}
    error = error_name([ran.row for ran in shown.values()])
    text = f"{_capital(error)} after each epoch, for one seed of each kind of run."
    page.curves(section, figures.by_epoch(errors, f"{error}, %"), text, _usual(shown))
    for name, ran in shown.items():
        losses = [entry["losses"] for entry in ran.epochs if "losses" in entry]
        if losses and len(losses[0]) > 1:
            text = f"{name}: mean training loss of each block by epoch. The first block is light, the last one dark."
            page.figure(section, figures.blocks_by_epoch(losses), text)


def _memory(page: Page, section: str, shown: dict[str, Ran]) -> None:
    paths = {name: ran.folder / TIMELINE for name, ran in shown.items()}
    steps = {name: _fattest(path) for name, path in paths.items() if path.exists()}
    if any(steps.values()):
        text = (
            "Memory over one training step. Backpropagation keeps all activations until its backward pass has used "
            "them, which gives one hill. A local method frees the activations of a block before the next block runs, "
            "which gives one hill for each block."
        )
        usual = _usual(shown)
        fewest = min((ran.row["blocks"] for ran in usual.values() if ran.row["blocks"] > 1), default=1)
        first = {name: ran for name, ran in usual.items() if ran.row["blocks"] in (1, fewest)}
        page.curves(section, figures.timeline({name: live for name, live in steps.items() if live}), text, first)


def _fattest(path: Path) -> list[int]:
    """The live bytes in a measured step, on the rank that needs most of them."""
    ranks: dict[str, list[int]] = {}
    for row in read_csv(path, ("live_bytes",)):
        ranks.setdefault(row.get("rank", "0"), []).append(int(row["live_bytes"]))
    return max(ranks.values(), key=max, default=[])


def _probes(page: Page, of: str, shown: dict[str, Ran]) -> None:
    probed = {name: rows for name, ran in shown.items() if (rows := ran.probed("separability", "top1"))}
    if probed:
        counts = sorted({(int(rows[0]["fitted"]), int(rows[0]["measured"])) for rows in probed.values()})
        images = " or ".join(f"{fitted:,} test images, measured on {measured:,} others" for fitted, measured in counts)
        text = f"How well a linear classifier finds the class from the pooled output of each unit, fitted on {images}."
        page.curves(f"Separability{of}", figures.separability(probed), text, _usual(shown))
    for name, ran in shown.items():
        if rows := ran.probed("cka"):
            text = (
                f"{name}: linear CKA of each of its units with each unit of {rows[0]['against']}. At 1 both have the "
                "same features up to shift, rotation and scale. The estimate may be below 0."
            )
            page.figure(f"Similarity (CKA){of}", figures.cka(rows, name), text)
    for name, ran in shown.items():
        if rows := ran.probed("tsne", "x", "y", "label"):
            text = f"{name}: t-SNE of the last unit's pooled output. Each point is a test image, its colour the class."
            page.figure(f"Last features (t-SNE){of}", figures.tsne(rows), text)
    for name, ran in shown.items():
        if rows := ran.probed("activations", "value", "column"):
            text = (
                f"{name}: test images of different classes, and the mean absolute activation of some units over their "
                "channels, from dark (none) to bright (the maximum of each map)."
            )
            page.figure(f"Activation maps{of}", figures.activations(rows), text)


def _about(ran: Ran) -> str:
    """A folded table of a run's recipe, machine and versions."""
    fields = {**as_dict(ran.recipe), **{name: value for name, value in ran.row.items() if name not in ("setting",)}}
    table = _table(("field", "value"), [[name, value] for name, value in fields.items() if value not in (None, "")])
    name = html.escape(f"{ran.folder.resolve().name}: {ran.label}, seed {ran.recipe.seed}")
    return f"<details><summary>{name}</summary>{table}</details>"


def _table(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    """A table that is sorted by a column at a click on its name."""
    numeric = [all(re.match(r"^[-+]?[\d.]", str(row[i])) or row[i] == "" for row in body) for i in range(len(head))]
    kinds = [' class="number"' if is_number else "" for is_number in numeric]
    names = "".join(
        f'<th scope="col"{kind}><button>{html.escape(name)}</button></th>'
        for kind, name in zip(kinds, head, strict=True)
    )
    lines = "".join(
        f"<tr>{''.join(f'<td{k}>{html.escape(str(c))}</td>' for k, c in zip(kinds, row, strict=True))}</tr>"
        for row in body
    )
    start = f'<div class="wide"><table style="--columns: {len(head) - 1}">'
    return f"{start}<thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>"


def _download(name: str, text: str) -> str:
    data = base64.b64encode(text.encode()).decode()
    return f'<a download="{html.escape(name)}" href="data:text/csv;base64,{data}">CSV</a>'


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _entries(path: Path) -> Rows:
    """The entries of metrics.jsonl. Lines that a full disk has damaged are left out."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                found.append(entry)
    return found
