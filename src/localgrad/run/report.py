"""One HTML file about runs: it opens from the disk, needs no network, and holds every figure's data as CSV."""

from __future__ import annotations

import base64
import csv
import html
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import localgrad
from localgrad.core.errors import UserError
from localgrad.run import figures
from localgrad.run.recipe import COUPLINGS, METHODS, PLACES, Recipe, as_dict, read_recipe
from localgrad.run.runlog import (
    CONFIG,
    METRICS,
    TIMELINE,
    finished_runs,
    mib,
    read_environment,
    read_sizes,
    summary_rows,
)
from localgrad.run.tables import csv_text, label_of, paired, summarize

Rows = list[dict[str, Any]]
TOLD = ("method", "coupling", "blocks", "seed")  # fields of which a run's label speaks by itself
NUMBERS = {"error": float, "peak_bytes": int, "seconds": float, "blocks": int, "seed": int}


@dataclass(frozen=True, eq=False)
class Ran:
    """A finished run. setting: in what it differs from the other runs of its method."""

    folder: Path
    recipe: Recipe
    setting: str = ""

    @property
    def row(self) -> dict[str, Any]:
        """As `localgrad compare` has it in runs.csv."""
        last = summary_rows(self.folder)[-1]
        row = {"method": self.recipe.label, "blocks": self.blocks, "setting": self.setting, "seed": self.recipe.seed}
        row |= {"error": round(100 - last["eval_top1"], 3), "peak_bytes": int(last["peak_bytes"])}
        row |= {"seconds": round(last["seconds"], 1), **read_sizes(self.folder)}
        return row | read_environment(self.folder)

    @property
    def blocks(self) -> int:
        return len(next((entry["losses"] for entry in self.entries if "losses" in entry), [0]))

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / METRICS).read_text().splitlines()]

    @property
    def label(self) -> str:
        return label_of({"method": self.recipe.label, "blocks": self.blocks, "setting": self.setting})

    def table(self, name: str) -> Rows:
        """A table of its probe, empty if there is none."""
        return _read(self.folder / "probe" / f"{name}.csv")


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
        place = f"figure-{self.figures}"
        drawn = picture.to_html(full_html=False, include_plotlyjs=False, div_id=place, config=config)
        data = _download(f"{place}.csv", csv_text(figures.data_of(picture)))
        caption = f"<figcaption>{html.escape(alt)} {data}</figcaption>"
        shown = f'<div role="img" aria-label="{html.escape(alt)}">{drawn}</div>'
        self.add(section, f"<figure>{shown}{caption}</figure>")


def report(places: Sequence[Path], results: Path | None = None) -> str:
    """The page's HTML. places: run folders, or folders of such. results: a folder with accuracy_*_runs.csv and
    frontier_*.csv. Raises UserError for a place without finished runs."""
    runs = find(places)
    page = Page()
    studies: dict[str, Rows] = {}
    for ran in runs:
        studies.setdefault(f"{ran.recipe.model} on {ran.recipe.data}", []).append(ran.row)
    if results is not None:
        tables = {path: _read(path) for path in sorted(results.glob("accuracy_*_runs.csv"))}
        if not tables and not list(results.glob("frontier_*.csv")):
            raise UserError(f"{results} holds neither accuracy_*_runs.csv nor frontier_*.csv: name another --results")
        studies |= {path.stem.removeprefix("accuracy_").removesuffix("_runs"): rows for path, rows in tables.items()}
    for title, rows in studies.items():
        _study(page, title, rows)
    for path in sorted(results.glob("frontier_*.csv")) if results is not None else ():
        text = f"Time of a step against its peak memory ({path.name}): methods, and plans made for a budget."
        page.figure("Time against memory", figures.time_against_memory(_read(path)), text)
    shown = _one_of_each(runs)
    _learning(page, shown)
    _memory(page, shown)
    _probes(page, shown)
    for ran in runs:
        page.add("Runs", _about(ran))
    machines = dict.fromkeys(str(row.get("machine", "")) for rows in studies.values() for row in rows)
    contents = "".join(f'<a href="#{_anchor(name)}">{html.escape(name)}</a>' for name in page.sections)
    body = "\n".join(
        f'<section id="{_anchor(name)}"><h2>{html.escape(name)}</h2>{"".join(parts)}</section>'
        for name, parts in page.sections.items()
    )
    subtitle = f"{len(runs)} runs; {' / '.join(filter(None, machines))}; written by localgrad {localgrad.__version__}."
    page_of = Template(files("localgrad.run").joinpath("report.html").read_text("utf-8"))
    from plotly.offline import get_plotlyjs

    return page_of.substitute(
        title="localgrad: what it costs and brings", subtitle=html.escape(subtitle), contents=contents, body=body,
        plotly=get_plotlyjs(),
    )  # fmt: skip


def find(places: Sequence[Path]) -> list[Ran]:
    """The finished runs in these folders, or in theirs, each once."""
    recipes = {folder: read_recipe(folder / CONFIG) for folder in finished_runs(places)}
    runs = [Ran(folder, recipe, _setting(recipe, list(recipes.values()))) for folder, recipe in recipes.items()]

    def place_of(ran: Ran) -> tuple:
        """Networks and data together, methods as they are listed everywhere, then the plain settings first."""
        kind = METHODS.index(ran.recipe.method), COUPLINGS.index(ran.recipe.coupling)
        return ran.recipe.model, ran.recipe.data, *kind, ran.blocks, ran.setting, ran.recipe.seed

    return sorted(runs, key=place_of)


def _setting(recipe: Recipe, others: Sequence[Recipe]) -> str:
    """In which fields a run is not as most runs of its method, model and data are."""
    alike = [as_dict(r) for r in others if (r.label, r.model, r.data) == (recipe.label, recipe.model, recipe.data)]
    usual = {name: Counter(r[name] for r in alike).most_common(1)[0][0] for name in as_dict(recipe)}
    own = {n: v for n, v in as_dict(recipe).items() if v != usual[n] and n not in (*TOLD, *PLACES)}
    return " ".join(f"{name}={value}" for name, value in own.items())


def _one_of_each(runs: Sequence[Ran]) -> dict[str, Ran]:
    """Of the runs that differ in their seeds alone the one that was probed, or that of the lowest seed."""
    shown: dict[str, Ran] = {}
    for ran in sorted(runs, key=lambda ran: (not ran.table("separability"), ran.recipe.seed)):
        several = len({(r.recipe.model, r.recipe.data) for r in runs}) > 1
        shown.setdefault(f"{ran.recipe.model} {ran.label}" if several else ran.label, ran)
    return dict(sorted(shown.items(), key=lambda item: runs.index(item[1])))


def _study(page: Page, title: str, runs: Rows) -> None:
    runs = [{name: NUMBERS.get(name, str)(value) for name, value in run.items() if value is not None} for run in runs]
    rows = summarize(runs)
    base = next((row["peak_bytes"] for row in rows if row["method"] == "bp"), None)
    body = []
    for row in rows:
        spread = f" ± {row['error_std']:.2f}" if row["error_std"] != "" else ""
        below = f"{100 - 100 * row['peak_bytes'] / base:.1f}%" if base else ""
        body.append([label_of(row), f"{row['error_mean']:.2f}{spread}", row["n"], mib(row["peak_bytes"]), below,
                     f"{int(row['added']):,}" if row.get("added") else "", f"{row['seconds']:.0f}"])  # fmt: skip
    head = ("method", "test error, %", "n", "peak memory", "below BP", "parameters added", "seconds")
    note = "Test error of the last epoch, mean ± standard deviation over n seeds; median peak of a step and time."
    section = f"Results: {title}"
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


def _learning(page: Page, shown: Mapping[str, Ran]) -> None:
    section = "Learning curves"
    errors = {name: [100 - row["eval_top1"] for row in summary_rows(ran.folder)] for name, ran in shown.items()}
    page.figure(
        section, figures.by_epoch(errors, "test error, %"), "Test error after each epoch, one run of each kind."
    )
    for name, ran in shown.items():
        losses = [entry["losses"] for entry in ran.entries if "eval_top1" in entry and "losses" in entry]
        if losses and len(losses[0]) > 1:
            text = f"{name}: mean training loss of each block by epoch, the first block light and the last dark."
            page.figure(section, figures.blocks_by_epoch(losses), text)


def _memory(page: Page, shown: Mapping[str, Ran]) -> None:
    steps = {name: [int(r["live_bytes"]) for r in _read(ran.folder / TIMELINE)] for name, ran in shown.items()}
    steps = {name: live for name, live in steps.items() if live}
    if steps:
        text = (
            "Memory over one training step. Backpropagation keeps what its forward pass makes until the backward pass "
            "has used it: one hill. A local run frees each block's before the next block runs: a hill for each block."
        )
        page.figure("Memory over one step", figures.timeline(steps), text)


def _probes(page: Page, shown: Mapping[str, Ran]) -> None:
    probed = {name: rows for name, ran in shown.items() if (rows := ran.table("separability"))}
    if probed:
        text = "How well a linear classifier reads the class from the pooled output of each unit, on held-out images."
        page.figure("Separability", figures.separability(probed), text)
    for name, ran in shown.items():
        rows = ran.table("cka")
        if rows:
            other = "itself" if rows[0]["against"] == ran.folder.name else rows[0]["against"]
            text = (
                f"{name}: linear CKA of each of its units with each of {other}; 1 is the same up to rotation and scale."
            )
            page.figure("Similarity (CKA)", figures.cka(rows, name), text)
        if points := ran.table("tsne"):
            text = f"{name}: t-SNE of the last unit's pooled output; a point is a test image."
            page.figure("Last features (t-SNE)", figures.tsne(points), text)
        picture = ran.folder / "probe" / "activations.png"
        if picture.exists():
            text = f"{name}: mean absolute activation of each block's output, a row an image, a column a block."
            data = _download(f"activations-{ran.folder.name}.csv", csv_text(ran.table("activations")))
            source = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
            image = f'<img src="{source}" alt="{html.escape(text)}">'
            page.add("Activation maps", f"<figure>{image}<figcaption>{html.escape(text)} {data}</figcaption></figure>")


def _about(ran: Ran) -> str:
    """A run's recipe and environment, folded."""
    told = {**as_dict(ran.recipe), **read_sizes(ran.folder), **read_environment(ran.folder)}
    table = _table(("field", "value"), [[name, value] for name, value in told.items() if value not in (None, "")])
    name = html.escape(f"{ran.folder.name}: {ran.label}, seed {ran.recipe.seed}")
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


def _read(path: Path) -> Rows:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
