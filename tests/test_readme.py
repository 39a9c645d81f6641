"""What the documents promise: their Python runs, their commands parse, the files and names that they give exist."""

from __future__ import annotations

import csv
import re
import runpy
import shlex
import tomllib
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from draw_pictures import SOURCES, is_there, stamp
from fill_tables import filled

import localgrad as lg
from localgrad import cli
from localgrad.core.couplings import COUPLINGS
from localgrad.core.heads import HEADS
from localgrad.core.methods import METHODS
from localgrad.run import commands, launch
from localgrad.run.compare import grid
from localgrad.run.recipe import settle

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/api.md", "docs/code.md", "docs/commands.md",
    "docs/examples.md", "docs/experiments.md", "docs/methods.md", "docs/memory.md", "docs/networks.md",
    "docs/reliability.md", "docs/scaling.md", "docs/tasks.md", "docs/trainers.md",
)  # fmt: skip


def read(page: str) -> str:
    return (ROOT / page).read_text()


def fenced(page: str, language: str) -> list[str]:
    """The code blocks of a page that are marked with a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def shell_lines(page: str) -> list[list[str]]:
    """The page's shell commands as words, without comments."""
    return [words for block in fenced(page, "sh") for line in block.splitlines() if (words := shlex.split(line, True))]


# The code of one page is that of examples/: see test_trainers.py. A snippet of text: see core/test_language_model.py.
RUN = [page for page in PAGES if page != "docs/trainers.md"]
SNIPPETS = [
    pytest.param(p, code, id=f"{p}-{i}")
    for p in RUN
    for i, code in enumerate(fenced(p, "python"))
    if "read_text" not in code
]
COMMANDS = [pytest.param(w[1:], id=" ".join(w[1:3])) for p in PAGES for w in shell_lines(p) if w[0] == "localgrad"]


def test_there_is_something_to_check() -> None:
    assert {str(s.values[0]) for s in SNIPPETS} == {
        "README.md",
        "CONTRIBUTING.md",
        "docs/methods.md",
        "docs/networks.md",
        "docs/tasks.md",
    }
    assert {str(c.values[0][0]) for c in COMMANDS} == set(cli.COMMANDS)  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize(("page", "code"), SNIPPETS)
def test_python_runs(page: str, code: str, tmp_path: Path) -> None:
    """On random images; each block's loss is finite and every parameter of the network has moved or has a gradient."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    script = tmp_path / "snippet.py"
    script.write_text(code)
    names = runpy.run_path(str(script), init_globals={"x": x, "y": y, "loader": [(x, y), (x, y)]})
    exact = "fit" in names
    model, out = names["fit"].model if exact else names["model"], names["out"]
    assert isinstance(model, lg.LocalModel)
    assert len(out.losses) == len(model.blocks)
    assert (len(model.blocks) == 1) == exact
    assert all(torch.isfinite(loss) for loss in out.losses)
    (logits,) = out.logits.values() if isinstance(out.logits, dict) else (out.logits,)
    assert logits.shape[:2] == (8, 10)
    assert model.backbone is names["backbone"]
    if "opt" in names:
        trained = {id(p) for group in names["opt"].param_groups for p in group["params"] if names["opt"].state[p]}
    else:
        trained = {id(p) for p in model.parameters() if p.grad is not None}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("words", COMMANDS)
def test_command_parses(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flags and values are what the command takes, and none of them is without effect (a warning is an error here)."""
    seen: list[Any] = []
    chosen = {"method": "dgl", "coupling": "man", "head": "1c2f", "blocks": "4", "recompute": "all"}
    chosen |= {"step_as_you_go": False, "batch_size": 64, "accumulate": 1}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"plan": chosen}))
    monkeypatch.chdir(tmp_path)

    def instead(command: Any) -> int:
        seen.append(command)
        return 0

    monkeypatch.setattr(commands, f"run_{words[0]}", instead)
    monkeypatch.setattr(launch, "launch", lambda args, *_: instead(cli._parse(args[0], args[1:])))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` sets it
    assert cli.main(words) == 0
    if words[0] == "train":
        settle(seen[0].recipe)
    if words[0] == "compare":
        assert len(grid(seen[0])) > 1


def test_flags_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    helps = ""
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        helps += capsys.readouterr().out
    known = set(re.findall(r"--[a-z][a-z-]+", helps)) | {"--recipe", "--plan"}
    for page in PAGES:
        assert set(re.findall(r"`(--[a-z][a-z-]+)", read(page))) <= known, page


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page: str) -> None:
    text = read(page)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        place = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert place.exists(), f"{page} links to {target}"
        headings = re.findall(r"^#+ (.+)$", place.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {h.lower().replace(" ", "-") for h in headings}, target
    for name in re.findall(r"`((?:src|tests|docs|examples|core|run|scale)/[\w./-]*)`", text):
        assert (ROOT / name).exists() or (ROOT / "src/localgrad" / name).exists(), f"{page} names {name}"


@pytest.mark.parametrize("page", [*PAGES, "results/README.md", "Makefile"])
def test_benchmarks_that_are_named_exist(page: str) -> None:
    for name in re.findall(r"benchmarks/[\w.]+", read(page)):
        assert (ROOT / name).exists(), f"{page} names {name}"


def test_tables_are_those_of_the_results() -> None:
    for page, known in (
        ("README.md", "| DGL + deep MAN | 16 | 11."),
        ("docs/experiments.md", "| bp | dgl K=16 | +4."),
        ("docs/memory.md", "| BP | 1 | 1.00 |"),
        ("docs/memory.md", "| DGL + MAN | 55 | even | 176 MiB |"),
        ("docs/networks.md", "| regnet | `regnetx_002` | 14 |"),
        ("docs/scaling.md", "| BP, 1F1B |  | 2 | 2 |"),
    ):
        assert known in read(page)
        assert filled(read(page)) == read(page), "run make results"


def test_figures_in_the_text_are_those_of_the_results() -> None:
    """What experiments.md says in words: two decimals are errors, differences or times, whole MiB are peaks."""
    files = [f"accuracy_fashion_small{of}.csv" for of in ("", "_runs", "_pairs")] + ["time_fashion_small.csv"]
    rows = [row for name in files for row in csv.DictReader(read(f"results/{name}").splitlines())]
    columns = ("error_mean", "error_std", "error", "difference", "low", "high", "times_bp")
    known = {f"{abs(float(row[name])):.2f}" for row in rows for name in columns if row.get(name)}
    known |= {value for row in rows for value in re.findall(r"=([\d.]+)", row.get("setting", ""))}
    known |= {f"{int(row['peak_bytes']) / 2**20:.0f} MiB" for row in rows if row.get("peak_bytes")}
    published = {"14.08", "9.11", "6.37"}
    text = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", read("docs/experiments.md"), flags=re.DOTALL)
    said = set(re.findall(r"(?<![\d.])\d+\.\d\d(?!\d)|\d+ MiB", text))
    assert published < said
    assert said - published <= known


def test_pictures_are_drawn_from_the_results() -> None:
    assert set(SOURCES) == {"accuracy", "probes", "frontier", "depth", "race"}
    there = {picture for picture in SOURCES if is_there(picture)}
    assert there >= set(SOURCES) - {"race"}
    for picture in there:
        assert stamp(picture) in read(f"docs/{picture}.svg"), "run make results"


def test_make_targets_and_extras_exist() -> None:
    made = {words[1] for page in PAGES for words in shell_lines(page) if words[0] == "make"}
    assert {"demo", "test"} <= made
    assert made <= set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert set(re.findall(r"\[(\w+)\](?![(:])", read("README.md"))) == set(project["optional-dependencies"])


def test_tables_and_cards_name_what_there_is() -> None:
    cells = set(re.findall(r"^\| `([\w+-]+)` \|", read("docs/methods.md"), re.MULTILINE))
    assert cells == {*METHODS, *COUPLINGS}
    cards = re.findall(r"^## (.+)$", read("docs/methods.md"), re.MULTILINE)
    assert cards == [*METHODS, *COUPLINGS, "Any loss", "Published figures, not ours"]
    rooms = "|".join(path.stem for path in (ROOT / "src/localgrad/core").glob("*.py"))
    for room, name in re.findall(rf"`({rooms})\.(\w+)`", read("docs/methods.md")):
        source = read(f"src/localgrad/core/{room}.py")
        assert re.search(rf"^(?:def|class) {name}\b", source, re.MULTILINE), f"{room}.{name}"
    for name in re.findall(r"lg\.(\w+)", "".join(map(read, PAGES))):
        assert name in lg.__all__, name
    assert {"0c1f", "1c2f", "2c2f"} <= set(HEADS)


def test_picture_is_valid_and_readable() -> None:
    root = ElementTree.fromstring(read("docs/step.svg"))
    sizes = [float(e.attrib["font-size"]) for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert sizes
    assert min(sizes) >= 13


def test_licence_and_citation() -> None:
    licence = read("LICENSE")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == lg.__version__ == tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert citation["license"] == "Apache-2.0"
    assert all({"type", "title", "authors"} <= set(reference) for reference in citation["references"])
    assert f"## [{lg.__version__}]" in read("CHANGELOG.md")
