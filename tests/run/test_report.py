"""The report: what it holds, and how it behaves in a browser (Chromium, where there is one)."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from tiny import BP, rows_of, tiny

from localgrad.cli import main
from localgrad.run import figures
from localgrad.run.folder import summary_rows
from localgrad.run.report import find, report
from localgrad.run.train import train

RECIPE = tiny(batch_size=32, epochs=2)
BROWSER = shutil.which("chromium")


def in_a_browser(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.slow(pytest.mark.skipif(BROWSER is None, reason="there is no chromium")(test))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BP, MAN with two seeds and with another momentum; one of them probed."""
    place = tmp_path_factory.mktemp("runs")
    train(replace(RECIPE, **BP), place / "bp")
    train(RECIPE, place / "man_s0")
    train(replace(RECIPE, seed=1), place / "man_s1")
    train(replace(RECIPE, momentum=0.5), place / "man_half")
    assert main(["probe", str(place / "man_s1"), "--against", str(place / "bp"), "--images", "100"]) == 0
    return place


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tables as they lie in results/, with what a page must not take for markup."""
    place = tmp_path_factory.mktemp("results")
    (place / "accuracy_study_runs.csv").write_text(
        "method,blocks,setting,seed,error,peak_bytes,seconds,parameters,added,machine\n"
        "bp,1,,0,9.5,10485760,100,466618,0,<b>&machine\n"
        "bp,1,,1,10.5,10485760,100,466618,0,<b>&machine\n"
        "dgl+man,16,momentum=0.9,0,13,5242880,300,466618,1356374,<b>&machine\n"
        "dgl+man,16,momentum=0.9,1,13.5,5242880,300,466618,1356374,<b>&machine\n"
    )
    (place / "frontier_net.csv").write_text(
        "row,blocks,times_bp,peak_bytes\nBP,1,1.0,1048576\nPyTorch: checkpoint,,1.45,524288\n"
        '"MAN, in half",3,1.2,524288\n"MAN, in a third",5,1.3,349525\n'
        '"MAN, K=4, even",4,1.3,400000\n'
    )
    return place


class Reader(HTMLParser):
    """Collects a page's tables, links and pictures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.tables[-1][-1][-1] += data

    def downloads(self) -> dict[str, list[dict[str, str]]]:
        found = {}
        for tag, attrs in self.tags:
            if tag == "a" and "download" in attrs:
                kind, _, data = (attrs["href"] or "").partition(",")
                assert kind == "data:text/csv;base64"
                lines = base64.b64decode(data).decode().splitlines()
                found.setdefault(str(attrs["download"]), list(csv.DictReader(lines)))
        return found


def without_script(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def figure_of(page: Reader, words: str) -> list[dict[str, str]]:
    """The data of the picture whose caption begins so."""
    captions = [attrs["aria-label"] or "" for tag, attrs in page.tags if tag == "figure"]
    (number,) = [i for i, caption in enumerate(captions, 1) if caption.startswith(words)]
    return page.downloads()[f"figure-{number}.csv"]


def test_the_table_is_of_the_runs(runs: Path) -> None:
    page = Reader(without_script(report([runs])))
    head, *body = page.tables[0]
    assert head == ["method", "test error, %", "n", "peak memory", "below BP", "parameters added", "seconds"]
    assert [row[0] for row in body] == ["bp", "dgl+man K=4", "dgl+man K=4 momentum=0.5"]
    assert [row[2] for row in body] == ["1", "2", "1"]
    last = {name: summary_rows(runs / name)[-1] for name in ("bp", "man_s0", "man_s1", "man_half")}
    assert float(body[0][1]) == pytest.approx(100 - last["bp"]["eval_top1"], abs=0.006)
    errors = [100 - last[name]["eval_top1"] for name in ("man_s0", "man_s1")]
    mean, deviation = map(float, body[1][1].split(" ± "))
    assert (mean, deviation) == pytest.approx((statistics.mean(errors), statistics.stdev(errors)), abs=0.006)
    peaks = [last["bp"]["peak_bytes"], last["man_s0"]["peak_bytes"]]
    assert body[1][4] == f"{100 - 100 * peaks[1] / peaks[0]:.1f}%"
    added = [yaml.safe_load((runs / name / "config.yaml").read_text())["model"]["added"] for name in ("bp", "man_s0")]
    assert [row[5] for row in body[:2]] == [f"{number:,}" for number in added]
    fields = {row[0]: row[1] for row in page.tables[-1][1:]}
    assert fields["momentum"] == "0.5"
    assert fields["torch"]
    assert fields["parameters"] == "77754"


def test_pairs_are_there_where_seeds_are_shared(runs: Path, results: Path) -> None:
    page = Reader(without_script(report([runs], results)))
    (pairs,) = [rows for name, rows in page.downloads().items() if name == "pairs.csv"]
    assert [(p["first"], p["second"], p["n"], float(p["difference"])) for p in pairs] == [
        ("bp", "dgl+man K=16 momentum=0.9", "2", 3.25)
    ]
    assert ["bp", "dgl+man K=16 momentum=0.9", "+3.25", "+0.07 to +6.43", "2"] in page.tables[1]


def test_every_figure_shows_what_the_run_recorded(runs: Path) -> None:
    page = Reader(without_script(report([runs])))
    curve = [float(r["y"]) for r in figure_of(page, "Test error after each epoch") if r["series"] == "bp, seed 0"]
    assert curve == [pytest.approx(100 - row["eval_top1"]) for row in summary_rows(runs / "bp")]
    timeline = figure_of(page, "Memory over one training step")
    live = [int(row["live_bytes"]) for row in rows_of(runs / "bp" / "memory_timeline.csv")]
    assert max(float(r["y"]) for r in timeline if r["series"] == "bp, seed 0") == pytest.approx(
        max(live) / 2**20, abs=0.006
    )
    losses = figure_of(page, "dgl+man K=4, seed 1: mean training loss")  # of the run that was probed
    entries = [json.loads(line) for line in (runs / "man_s1" / "metrics.jsonl").read_text().splitlines()]
    recorded = [entry["losses"] for entry in entries if "eval_top1" in entry]
    assert [float(r["y"]) for r in losses] == pytest.approx([row[k] for k in range(4) for row in recorded])
    probe = runs / "man_s1" / "probe"
    separable = figure_of(page, "How well a linear classifier")
    assert [r["y"] for r in separable] == [row["top1"] for row in rows_of(probe / "separability.csv")]
    cka = [(r["y"], r["x"], float(r["value"])) for r in figure_of(page, "dgl+man K=4, seed 1: linear CKA")]
    assert cka == [(r["unit"], r["against_unit"], float(r["cka"])) for r in rows_of(probe / "cka.csv")]
    points = figure_of(page, "dgl+man K=4, seed 1: t-SNE")
    assert sorted((r["series"], float(r["x"])) for r in points) == sorted(
        (f"class {r['label']}", round(float(r["x"]), 2)) for r in rows_of(probe / "tsne.csv")
    )
    maps = figure_of(page, "dgl+man K=4, seed 1: test images")
    recorded = [(f"class {r['label']}, {r['unit']}", float(r["value"])) for r in rows_of(probe / "activations.csv")]
    assert [(r["series"], float(r["value"])) for r in maps] == recorded


def test_every_picture_has_its_words_and_its_data(runs: Path, results: Path) -> None:
    page = Reader(without_script(report([runs], results)))
    captions = [attrs["aria-label"] or "" for tag, attrs in page.tags if tag == "figure"]
    # Two studies, the frontier, test errors, blocks' losses of two kinds, the timeline, four of the probe.
    assert len(captions) == 2 + 1 + 1 + 2 + 1 + 4
    assert min(map(len, captions)) > 30
    data = page.downloads()
    assert len([name for name in data if name.startswith("figure-")]) == len(captions)
    study = data["figure-1.csv"]
    assert [(r["series"], float(r["x"]), float(r["y"])) for r in study] == [
        ("bp", 10, 10),
        ("dgl+man K=16 momentum=0.9", 5, 13.25),
    ]
    assert float(study[0]["spread"]) == pytest.approx(0.707, abs=1e-3)
    assert [(r["series"], r["point"]) for r in data["figure-3.csv"]] == [
        ("BP", "BP"),
        ("PyTorch alone", "PyTorch: checkpoint"),
        ("MAN", "MAN, in a third"),
        ("MAN", "MAN, in half"),
        ("others", "MAN, K=4, even"),
    ]


def test_what_is_in_the_tables_is_no_markup(runs: Path, results: Path) -> None:
    page = without_script(report([runs / "bp"], results))
    assert "<b>&machine" not in page
    assert "&lt;b&gt;&amp;machine" in page


def test_names_are_no_markup_in_pictures(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs / "man_s1", copy)
    cka = copy / "probe" / "cka.csv"
    cka.write_text(cka.read_text().replace(",bp,", ',<a href="https:elsewhere">x<,'))
    page = report([copy]).replace("\\u003c", "<").replace("\\u003e", ">").replace('\\"', '"')
    assert "https:elsewhere" in page
    assert '<a href="https:elsewhere' not in page


def test_the_page_asks_for_nothing_from_elsewhere(runs: Path) -> None:
    page = report([runs])
    assert "default-src 'none'" in page
    scripts = re.findall(r"<script[^>]*>", page)
    assert [tag for tag in scripts if tag not in ("<script>", '<script type="text/javascript">')] == []
    for _, attrs in Reader(without_script(page)).tags:
        for name in ("src", "href", "srcset", "action"):
            assert (attrs.get(name) or "#").startswith(("data:", "#"))


def test_runs_are_found_in_folders_and_named_by_what_differs(runs: Path) -> None:
    found = find([runs, runs / "bp"])
    assert [ran.label for ran in found] == ["bp", "dgl+man K=4", "dgl+man K=4", "dgl+man K=4 momentum=0.5"]
    assert [ran.row["blocks"] for ran in found] == [1, 4, 4, 4]


def with_recipe(runs: Path, place: Path, **changes: object) -> None:
    """A copy of the run bp (or man_s0, for a local method) whose recipe says otherwise."""
    shutil.copytree(runs / ("man_s0" if "momentum" in changes or "blocks" in changes else "bp"), place)
    config = yaml.safe_load((place / "config.yaml").read_text())
    config["recipe"] |= changes
    (place / "config.yaml").write_text(yaml.safe_dump(config))


def test_recomputing_is_told_and_compared(runs: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        with_recipe(runs, tmp_path / f"{seed}", recompute="all", seed=seed)
    page = Reader(without_script(report([runs, tmp_path])))
    assert [(row[0], row[4]) for row in page.tables[0][1:3]] == [("bp", "0.0%"), ("bp recompute=all", "0.0%")]
    assert ["bp recompute=all", "dgl+man K=4"] in [row[:2] for row in page.tables[1]]


def test_conditions_that_differ_are_told_and_not_compared(runs: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        with_recipe(runs, tmp_path / f"other{seed}", batch_size=16, seed=seed)
    page = Reader(without_script(report([runs / "man_s0", runs / "man_s1", runs / "man_half", tmp_path])))
    _, *body = page.tables[0]
    assert [row[0] for row in body] == ["bp batch_size=16", "dgl+man K=4", "dgl+man K=4 momentum=0.5"]
    assert [row[4] for row in body] == ["0.0%", "", ""]
    assert "pairs.csv" not in page.downloads()


def test_without_a_majority_every_value_is_told(runs: Path, tmp_path: Path) -> None:
    with_recipe(runs, tmp_path / "a", lr=0.1)
    with_recipe(runs, tmp_path / "b", lr=0.2)
    with_recipe(runs, tmp_path / "c", blocks="layer1.0", lr=0.1)
    labels = [ran.label for ran in find([tmp_path])]
    assert labels == ["bp", "bp lr=0.2", "dgl+man K=4 blocks=layer1.0"]
    labels = [ran.label for ran in find([tmp_path / "a", tmp_path / "b"])]
    assert labels == ["bp lr=0.1", "bp lr=0.2"]


def test_a_coupling_that_is_not_the_default_is_told_however_common(runs: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        with_recipe(runs, tmp_path / f"{seed}", momentum=0.5, branches="ema", seed=seed)
    labels = {ran.label: ran.recipe.momentum for ran in find([runs / "man_s0", tmp_path])}
    assert labels == {"dgl+man K=4": 0.995, "dgl+man K=4 momentum=0.5 branches=ema": 0.5}
    assert {ran.label for ran in find([tmp_path])} == {"dgl+man K=4 momentum=0.5 branches=ema"}


def test_an_older_and_a_damaged_run_are_shown_as_far_as_they_go(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "man_s0", tmp_path / "old")
    config = yaml.safe_load((tmp_path / "old" / "config.yaml").read_text())
    del config["model"]
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = tmp_path / "old" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-30])
    (tmp_path / "old" / "memory_timeline.csv").unlink()
    page = Reader(without_script(report([tmp_path / "old", runs / "man_s1"])))
    assert [row[:1] + row[2:3] for row in page.tables[0][1:]] == [["dgl+man K=4", "2"]]
    (tmp_path / "old" / "metrics.jsonl").unlink()
    assert "dgl+man" in report([tmp_path / "old"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["nowhere"], "nowhere holds no finished run"),
        ([], "there is no run to look at"),
        (["{runs}", "--results", "nowhere"], "nowhere holds neither accuracy_"),
        (["{runs}", "--results", "{bad}"], "accuracy_bad_runs.csv is not the table that it should be"),
        (["{runs}", "--out", "{runs}/none/report.html"], "cannot write to"),
        (["{runs}", "--out", "{runs}"], "is a folder: name a file"),
        (["{runs}", "{copy}"], "are the same run: name one of them"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    flags: list[str], says: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "bp", tmp_path / "copy")
    (tmp_path / "accuracy_bad_runs.csv").write_text("method,blocks,seed,error,peak_bytes,seconds\nbp,1,0,x,1,1\n")
    places = {"runs": runs, "bad": tmp_path, "copy": tmp_path / "copy"}
    assert main(["report", *(flag.format(**places) for flag in flags)]) == 2
    assert says in capsys.readouterr().err
    assert not (runs / "none").exists()


# Its pictures, as far as a page does not show them


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


# In a browser


def browse(page: Path, script: str, *flags: str) -> tuple[str, list[str]]:
    """The document after a script has run in it, and what the console said."""
    assert BROWSER is not None
    copy = page.with_name("in_browser.html")
    copy.write_text(
        page.read_text().replace("</body>", f"<script>addEventListener('load', () => {{{script}}})</script></body>")
    )
    options = "--headless=new --no-sandbox --disable-gpu --virtual-time-budget=30000 --window-size=390,800"
    command = [BROWSER, *options.split(), *flags, "--enable-logging=stderr", "--dump-dom", copy.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return ended.stdout, [line for line in ended.stderr.splitlines() if ":CONSOLE" in line]


@pytest.fixture(scope="module")
def page(runs: Path, results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With runs whose names are longer than a phone is wide."""
    place = tmp_path_factory.mktemp("page") / "report.html"
    units = [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(5)]
    for i in range(5):
        with_recipe(runs, place.with_name("long") / str(i), blocks=",".join(units[i:]))
    assert (
        main(["report", str(runs), str(place.with_name("long")), "--results", str(results), "--out", str(place)]) == 0
    )
    return place


@in_a_browser
def test_the_browser_draws_every_picture_and_complains_of_nothing(page: Path) -> None:
    script = """
        const drawn = [...document.querySelectorAll('.js-plotly-plot')];
        const inked = drawn.filter(p => p.querySelector('svg.main-svg path, svg.main-svg image'));
        const wide = document.documentElement.scrollWidth;
        const cut = drawn.filter(plot => [...plot.querySelectorAll('.legendtext')].some(
            text => text.getBoundingClientRect().bottom > plot.getBoundingClientRect().bottom));
        const scrolled = drawn.filter(plot => plot.querySelector('.legend .scrollbar')?.getBBox().height > 0);
        document.body.dataset.found = [drawn.length, inked.length, wide, cut.length + scrolled.length].join(' ');
    """
    document, console = browse(page, script)
    drawn, inked, wide, cut = (int(n) for n in re.findall(r'data-found="([^"]*)"', document)[0].split())
    assert console == []
    assert drawn == inked == 11 + 5
    assert cut == 0, "each legend shows all its names"
    assert wide <= 500, "a phone must not scroll sideways"  # Chromium's windows are no narrower than 500


@in_a_browser
def test_a_click_sorts_a_table_and_another_turns_it(page: Path) -> None:
    script = """
        const table = document.querySelector('table'), button = table.querySelectorAll('th button')[3];
        const column = () => [...table.tBodies[0].rows].map(row => parseFloat(row.cells[3].textContent));
        button.click(); const up = column(), said = button.closest('th').getAttribute('aria-sort');
        button.click(); const down = column();
        table.querySelector('th button').click();
        const names = [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
        document.body.dataset.found = [up.join(' '), said, down.join(' '), names.join(' | ')].join(';');
    """
    document, console = browse(page, script)
    up, said, down, names = re.findall(r'data-found="([^"]*)"', document)[0].split(";")
    assert console == []
    sizes = [float(n) for n in up.split()]
    assert sizes == sorted(sizes) == [float(n) for n in down.split()][::-1]
    assert len(set(sizes)) > 1
    assert said == "ascending"
    assert names == "bp | dgl+man K=16 momentum=0.9"


@in_a_browser
def test_dark_pages_have_light_ink(page: Path) -> None:
    script = """setTimeout(() => { document.body.dataset.found = [getComputedStyle(document.body).backgroundColor,
        document.querySelector('.js-plotly-plot').layout.font.color].join(';') }, 3000)"""
    light, _ = browse(page, script)
    dark, _ = browse(page, script, "--blink-settings=preferredColorScheme=0")
    found = [re.findall(r'data-found="([^"]*)"', document)[0].split(";") for document in (light, dark)]
    assert found == [["rgb(255, 255, 255)", "#1d2126"], ["rgb(21, 24, 28)", "#e4e8ec"]]
