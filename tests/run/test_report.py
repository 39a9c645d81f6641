"""The report: what it holds, and how it behaves in a browser (Chromium, where there is one)."""

from __future__ import annotations

import base64
import csv
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from localgrad.cli import main
from localgrad.run.recipe import Recipe
from localgrad.run.report import find, report
from localgrad.run.train import train

TINY = Recipe(model="resnet20", limit_train=64, batch_size=32, epochs=2, precision="float32", head="1c2f", lr=0.02)
BROWSER = shutil.which("chromium")
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="there is no chromium")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BP, MAN with two seeds and with another momentum; one of them probed."""
    place = tmp_path_factory.mktemp("runs")
    train(replace(TINY, method="bp", coupling="none", blocks="1", head="auto"), place / "bp")
    train(TINY, place / "man_s0")
    train(replace(TINY, seed=1), place / "man_s1")
    train(replace(TINY, momentum=0.5), place / "man_half")
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
        "row,blocks,times_bp,peak_bytes\nBP,1,1.0,1048576\ncheckpointing,1,1.45,524288\n"
        '"MAN, in half",3,1.2,524288\n"MAN, in a third",5,1.3,349525\n'
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


def test_the_table_is_of_the_runs(runs: Path) -> None:
    page = Reader(without_script(report([runs])))
    head, *body = page.tables[0]
    assert head == ["method", "test error, %", "n", "peak memory", "below BP", "parameters added", "seconds"]
    assert [row[0] for row in body] == ["bp", "dgl+man K=4", "dgl+man K=4 momentum=0.5"]
    assert [row[2] for row in body] == ["1", "2", "1"]
    assert "±" in body[1][1]
    assert "±" not in body[2][1]
    assert body[0][4:6] == ["0.0%", "0"]
    assert float(body[1][4].removesuffix("%")) == pytest.approx(
        100 - 100 * float(body[1][3].split()[0]) / float(body[0][3].split()[0]), abs=1.5
    )
    fields = {row[0]: row[1] for row in page.tables[-1][1:]}
    assert fields["momentum"] == "0.5"
    assert fields["torch"]
    assert fields["parameters"] == "272186"


def test_every_picture_has_its_words_and_its_data(runs: Path, results: Path) -> None:
    page = Reader(without_script(report([runs], results)))
    pictures = [attrs for tag, attrs in page.tags if tag == "img" or attrs.get("role") == "img"]
    assert all(len(attrs.get("alt") or attrs.get("aria-label") or "") > 30 for attrs in pictures)
    data = page.downloads()
    # Two studies, the frontier, test errors, blocks' losses of two kinds, the timeline, four of the probe.
    assert len(pictures) == 2 + 1 + 1 + 2 + 1 + 4
    assert len([name for name in data if name.startswith("figure-")]) == len(pictures) - 1
    assert len(data["activations-man_s1.csv"]) > 100
    study = data["figure-2.csv"]
    assert [(r["series"], float(r["x"]), float(r["y"])) for r in study] == [
        ("bp", 10, 10),
        ("dgl+man K=16 momentum=0.9", 5, 13.25),
    ]
    assert float(study[0]["spread"]) == pytest.approx(0.707, abs=1e-3)
    frontier = data["figure-3.csv"]
    assert [(r["series"], r["point"]) for r in frontier] == [
        ("BP", "BP"),
        ("checkpointing", "checkpointing"),
        ("MAN", "MAN, in a third"),
        ("MAN", "MAN, in half"),
    ]


def test_what_is_in_the_tables_is_no_markup(runs: Path, results: Path) -> None:
    page = without_script(report([runs / "bp"], results))
    assert "<b>&machine" not in page
    assert "&lt;b&gt;&amp;machine" in page


def test_the_page_asks_for_nothing_from_elsewhere(runs: Path) -> None:
    page = report([runs])
    assert "default-src 'none'" in page
    for tag, attrs in Reader(without_script(page)).tags:
        for name in ("src", "href"):
            assert tag == "meta" or (attrs.get(name) or "#").startswith(("data:", "#"))


def test_runs_are_found_in_folders_and_named_by_what_differs(runs: Path) -> None:
    found = find([runs, runs / "bp"])
    assert [ran.label for ran in found] == ["bp", "dgl+man K=4", "dgl+man K=4", "dgl+man K=4 momentum=0.5"]
    assert [ran.blocks for ran in found] == [1, 4, 4, 4]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["nowhere"], "nowhere holds no finished run"),
        (["{runs}", "--results", "nowhere"], "nowhere holds neither accuracy_"),
        (["{runs}", "--out", "{runs}/none/report.html"], "cannot write to"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    flags: list[str], says: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *(flag.format(runs=runs) for flag in flags)]) == 2
    assert says in capsys.readouterr().err
    assert not (runs / "none").exists()


# In a browser


def browse(page: Path, script: str, *flags: str) -> tuple[str, list[str]]:
    """The document after a script has run in it, and what the console said."""
    assert BROWSER is not None
    copy = page.with_name("in_browser.html")
    copy.write_text(
        page.read_text().replace("</body>", f"<script>addEventListener('load', () => {{{script}}})</script></body>")
    )
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=30000",
        "--window-size=390,800",
    ]
    command = [BROWSER, *options, *flags, "--enable-logging=stderr", "--dump-dom", copy.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return ended.stdout, [line for line in ended.stderr.splitlines() if ":CONSOLE" in line]


@pytest.fixture(scope="module")
def page(runs: Path, results: Path) -> Path:
    place = runs / "report.html"
    assert main(["report", str(runs), "--results", str(results), "--out", str(place)]) == 0
    return place


@in_a_browser
def test_the_browser_draws_every_picture_and_complains_of_nothing(page: Path) -> None:
    script = """
        const drawn = [...document.querySelectorAll('.js-plotly-plot')];
        const inked = drawn.filter(p => p.querySelector('svg.main-svg path, svg.main-svg image'));
        const wide = document.documentElement.scrollWidth;
        document.body.dataset.found = [drawn.length, inked.length, wide].join(' ');
    """
    document, console = browse(page, script)
    drawn, inked, wide = (int(n) for n in re.findall(r'data-found="([^"]*)"', document)[0].split())
    assert console == []
    assert drawn == inked == 10
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
    assert names == "bp | dgl+man K=4 | dgl+man K=4 momentum=0.5"


@in_a_browser
def test_dark_pages_have_light_ink(page: Path) -> None:
    script = """setTimeout(() => { document.body.dataset.found = [getComputedStyle(document.body).backgroundColor,
        document.querySelector('.js-plotly-plot').layout.font.color].join(';') }, 3000)"""
    light, _ = browse(page, script)
    dark, _ = browse(page, script, "--blink-settings=preferredColorScheme=0")
    found = [re.findall(r'data-found="([^"]*)"', document)[0].split(";") for document in (light, dark)]
    assert found == [["rgb(255, 255, 255)", "#1d2126"], ["rgb(21, 24, 28)", "#e4e8ec"]]
