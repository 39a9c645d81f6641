"""One HTML file about runs: it opens from the disk, needs no network, and holds every figure's data as CSV."""

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
from localgrad.run.folder import CONFIG, METRICS, TIMELINE, finished_runs, summary_rows
from localgrad.run.recipe import COUPLINGS, METHODS, OF_METHODS, PLACES, Recipe, as_dict, differences, read_recipe
from localgrad.run.tables import (
    conditions,
    csv_text,
    error_text,
    label_of,
    paired,
    read_csv,
    read_runs,
    row_of,
    summarize,
)

Rows = list[dict[str, Any]]
TOLD = ("model", "data", "method", "coupling", "seed")  # fields of which a run's study and label speak by themselves
FIELDS = [f.name for f in fields(Recipe) if f.name not in (*TOLD, *PLACES - {"recompute"})]
PLAIN = Recipe()


@dataclass(frozen=True, eq=False)
class Ran:
    """A finished run. row: as `localgrad compare` has it in runs.csv. epochs: what it recorded of each."""

    folder: Path
    recipe: Recipe
    row: dict[str, Any]
    epochs: Rows

    @property
    def study(self) -> str:
        """What runs have in common that can be compared."""
        where = f" in {self.recipe.data_dir}" if self.recipe.data == "image-folder" else ""
        return f"{self.recipe.model} on {self.recipe.data}{where}"

    @property
    def label(self) -> str:
        return label_of(self.row)

    def probed(self, name: str, *numbers: str) -> Rows:
        """A table of its probe, empty if there is none."""
        path = self.folder / "probe" / f"{name}.csv"
        return read_csv(path, numbers) if path.exists() else []


@dataclass
class Page:
    """What is on the page so far. sections: heading -> its HTML."""

    sections: dict[str, list[str]] = field(default_factory=dict)
    figures: int = 0

    def add(self, section: str, *parts: str) -> None:
        self.sections.setdefault(section, []).extend(parts)

    def figure(self, section: str, picture: figures.go.Figure, alt: str) -> None:
        """A picture with its alternative text, which is its caption too, and its data to download."""
        self.figures += 1
        # Buttons that need nothing but the page: by default one would send the data away.
        buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]]
        config = {"responsive": True, "displaylogo": False, "showSendToCloud": False, "modeBarButtons": buttons}
        name = f"figure-{self.figures}"
        data = _download(f"{name}.csv", csv_text(figures.data_of(picture)))
        short = figures.with_short_lines(picture)
        drawn = short.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)
        caption = f"<figcaption>{html.escape(alt)} {data}</figcaption>"
        self.add(section, f'<figure aria-label="{html.escape(alt)}">{drawn}{caption}</figure>')

    def curves(self, section: str, picture: figures.go.Figure, alt: str, first: dict[str, Ran]) -> None:
        """A figure of one curve a run; of too many to tell apart, these are drawn at first."""
        if figures.leave(picture, first):
            alt += " A click on a name shows or hides its curve."
        self.figure(section, picture, alt)

    def written(self, title: str, subtitle: str) -> str:
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
    """The page's HTML. paths: run folders, or folders of such. results: a folder with accuracy_*_runs.csv and
    frontier_*.csv. Raises UserError for a path without finished runs, and for a file that is not what it should be."""
    runs = find(paths)
    page = Page()
    studies: dict[str, list[Ran]] = {}
    for ran in runs:
        studies.setdefault(ran.study, []).append(ran)
    measured = sorted(results.glob("accuracy_*_runs.csv")) if results is not None else []
    timed = sorted(results.glob("frontier_*.csv")) if results is not None else []
    if results is not None and not measured + timed:
        raise UserError(f"{results} holds neither accuracy_*_runs.csv nor frontier_*.csv: name another --results")
    tables = {f"Results: {p.stem.removeprefix('accuracy_').removesuffix('_runs')}": read_runs(p) for p in measured}
    tables = dict(sorted(tables.items(), key=lambda item: -len(item[1])))  # the largest study is what people came for
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
    said = [f"{len(runs)} runs{unfinished}", " / ".join(filter(None, machines))]
    return page.written(
        "localgrad: what it costs and brings", f"{'; '.join(said)}; written by localgrad {localgrad.__version__}."
    )


def find(paths: Sequence[Path]) -> list[Ran]:
    """The finished runs in these folders, or in theirs, each once, in the order in which a page shows them."""
    runs = []
    for folder in finished_runs(paths):
        recipe = read_recipe(folder / CONFIG)
        entries = _entries(folder / METRICS)
        blocks = len(next((entry["losses"] for entry in entries if "losses" in entry), [0]))
        row = row_of(folder, recipe.label, blocks, "", recipe.seed)
        runs.append(Ran(folder, recipe, row, [entry for entry in entries if "eval_top1" in entry]))
    runs = [replace(ran, row={**ran.row, "setting": _setting(ran, runs)}) for ran in runs]
    for i, ran in enumerate(runs):
        for other in runs[:i]:
            as_much = ran.recipe.recompute == other.recipe.recompute
            if ran.study == other.study and as_much and not differences(ran.recipe, other.recipe):
                raise UserError(f"{other.folder} and {ran.folder} are the same run: name one of them")

    def order_of(ran: Ran) -> tuple:
        """Networks and data together, methods as they are listed everywhere, then the plain settings first."""
        kind = METHODS.index(ran.recipe.method), COUPLINGS.index(ran.recipe.coupling)
        return ran.study, *kind, ran.row["blocks"], ran.row["setting"], ran.recipe.seed

    return sorted(runs, key=order_of)


def _setting(ran: Ran, runs: Sequence[Ran]) -> str:
    """In which fields a run is not what goes without saying: as most runs of its study are, or, where no value is that
    of most, none; in what a coupling is, and what is recomputed, the default. A head is a method's own; a cut by names
    is always told."""
    study = [r.recipe for r in runs if r.study == ran.study]
    words = []
    for name in sorted(FIELDS, key="blocks".__eq__):  # which may be long
        value = getattr(ran.recipe, name)
        if name == "blocks":
            says = not isinstance(ran.recipe.cut, int)
        elif name in OF_METHODS - {"head"} | {"recompute"}:
            says = value != getattr(PLAIN, name)
        else:
            alike = [recipe for recipe in study if name != "head" or recipe.label == ran.recipe.label]
            usual, count = Counter(getattr(recipe, name) for recipe in alike).most_common(1)[0]
            says = value != usual or 2 * count <= len(alike) != count
        words += [f"{name}={value}"] if says else []
    return " ".join(words)


def _one_of_each(runs: Sequence[Ran]) -> dict[str, Ran]:
    """Of the runs that differ in their seeds alone the one that was probed, or that of the lowest seed."""
    chosen: dict[str, Ran] = {}
    for ran in sorted(runs, key=lambda ran: (not ran.probed("separability"), ran.recipe.seed)):
        chosen.setdefault(ran.label, ran)
    return {f"{ran.label}, seed {ran.recipe.seed}": ran for ran in sorted(chosen.values(), key=runs.index)}


def _plain(shown: dict[str, Ran]) -> dict[str, Ran]:
    return {name: ran for name, ran in shown.items() if not ran.row["setting"]}


def _study(page: Page, section: str, runs: Rows) -> None:
    rows = summarize(runs)
    plain = [row for row in rows if row["method"] == "bp" and "recompute=" not in row["setting"]]
    body = []
    for row in rows:
        alike = [r for r in plain if conditions(r["setting"]) == conditions(row["setting"])]
        below = f"{100 - 100 * row['peak_bytes'] / alike[0]['peak_bytes']:.1f}%" if len(alike) == 1 else ""
        added = f"{row['added']:,}" if isinstance(row.get("added"), int) else ""
        body.append(
            [label_of(row), error_text(row), row["n"], mib(row["peak_bytes"]), below, added, f"{row['seconds']:.0f}"]
        )
    head = ("method", "test error, %", "n", "peak memory", "below BP", "parameters added", "seconds")
    note = (
        "Test error of the last epoch, mean ± standard deviation over n seeds; median peak of a step, and median "
        "seconds of a run on a machine that others may have used beside it."
    )
    page.add(section, f'<p class="note">{note}</p>', _table(head, body), _download("results.csv", csv_text(rows)))
    text = "Test error against peak memory of a step; bars are standard deviations over seeds. Down and left is better."
    page.figure(section, figures.error_against_memory(rows), text)
    pairs = paired(runs)
    if pairs:
        body = [[p["first"], p["second"], f"{p['difference']:+.2f}", f"{p['low']:+.2f} to {p['high']:+.2f}", p["n"]]
                for p in pairs]  # fmt: skip
        note = "Differences of test errors in points, the second's less the first's, paired by seed."
        head = ("first", "second", "difference", "95% interval", "n")
        data = _download("pairs.csv", csv_text(pairs))
        page.add(section, f"<details><summary>{note}</summary>{_table(head, body)}{data}</details>")


def _learning(page: Page, section: str, shown: dict[str, Ran]) -> None:
    errors = {name: [100 - row["eval_top1"] for row in summary_rows(ran.folder)] for name, ran in shown.items()}
    text = "Test error after each epoch, one run of each kind."
    page.curves(section, figures.by_epoch(errors, "test error, %"), text, _plain(shown))
    for name, ran in shown.items():
        losses = [entry["losses"] for entry in ran.epochs if "losses" in entry]
        if losses and len(losses[0]) > 1:
            text = f"{name}: mean training loss of each block by epoch, the first block light and the last dark."
            page.figure(section, figures.blocks_by_epoch(losses), text)


def _memory(page: Page, section: str, shown: dict[str, Ran]) -> None:
    paths = {name: ran.folder / TIMELINE for name, ran in shown.items()}
    steps = {n: [int(r["live_bytes"]) for r in read_csv(p, ("live_bytes",))] for n, p in paths.items() if p.exists()}
    if any(steps.values()):
        text = (
            "Memory over one training step. Backpropagation keeps what its forward pass makes until the backward pass "
            "has used it: one hill. A local run frees each block's before the next block runs: a hill for each block."
        )
        plain = _plain(shown)
        fewest = min((ran.row["blocks"] for ran in plain.values() if ran.row["blocks"] > 1), default=1)
        first = {name: ran for name, ran in plain.items() if ran.row["blocks"] in (1, fewest)}
        page.curves(section, figures.timeline({name: live for name, live in steps.items() if live}), text, first)


def _probes(page: Page, of: str, shown: dict[str, Ran]) -> None:
    probed = {name: rows for name, ran in shown.items() if (rows := ran.probed("separability", "top1"))}
    if probed:
        counts = sorted({(int(rows[0]["fitted"]), int(rows[0]["measured"])) for rows in probed.values()})
        images = " or ".join(f"{fitted:,} test images, measured on {measured:,} others" for fitted, measured in counts)
        text = f"How well a linear classifier reads the class from the pooled output of each unit; fitted on {images}."
        page.curves(f"Separability{of}", figures.separability(probed), text, _plain(shown))
    for name, ran in shown.items():
        if rows := ran.probed("cka"):
            text = (
                f"{name}: linear CKA of each of its units with each of {rows[0]['against']}; 1 is the same up to "
                "shift, rotation and scale, and the estimator may fall below 0."
            )
            page.figure(f"Similarity (CKA){of}", figures.cka(rows, name), text)
    for name, ran in shown.items():
        if rows := ran.probed("tsne", "x", "y", "label"):
            text = f"{name}: t-SNE of the last unit's pooled output; a point is a test image, a colour a class."
            page.figure(f"Last features (t-SNE){of}", figures.tsne(rows), text)
    for name, ran in shown.items():
        if rows := ran.probed("activations", "value", "column"):
            text = (
                f"{name}: test images of different classes, and the mean absolute activation of units over their "
                "channels, dark for none and bright for each map's most."
            )
            page.figure(f"Activation maps{of}", figures.activations(rows), text)


def _about(ran: Ran) -> str:
    """A run's recipe and what it ran on, folded."""
    fields = {**as_dict(ran.recipe), **{name: value for name, value in ran.row.items() if name not in ("setting",)}}
    table = _table(("field", "value"), [[name, value] for name, value in fields.items() if value not in (None, "")])
    name = html.escape(f"{ran.folder.resolve().name}: {ran.label}, seed {ran.recipe.seed}")
    return f"<details><summary>{name}</summary>{table}</details>"


def _table(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    """A table whose columns sort by a click on their names."""
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
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>'


def _download(name: str, text: str) -> str:
    data = base64.b64encode(text.encode()).decode()
    return f'<a download="{html.escape(name)}" href="data:text/csv;base64,{data}">CSV</a>'


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _entries(path: Path) -> Rows:
    """The lines of metrics.jsonl; a full disk may have torn or lost some."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                found.append(entry)
    return found
