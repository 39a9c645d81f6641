"""What is made of the repository for others: the documentation site and the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import localgrad as lg

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command: str | Path, folder: Path, limit: int = 250) -> str:
    """What a command prints. It sees no PYTHONPATH, which would lead to the package in this repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Page(HTMLParser):
    """The links and anchors of an HTML page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.anchors |= {value for name, value in attrs if name == "id" and value}
        self.links |= {value for name, value in attrs if name in ("href", "src") and value}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The pages of the site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    (options,) = re.findall(r"sphinx-build (.*) build/site", (ROOT / "Makefile").read_text())
    subprocess.run([sys.executable, "-m", "sphinx", *options.split(), folder], cwd=ROOT, check=True, timeout=250)
    return {path.resolve(): Page(path) for path in folder.rglob("*.html")}


def test_links_of_the_site_lead_somewhere(site: dict[Path, Page]) -> None:
    broken = []
    for path, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = site[target].anchors if target in site else set()
            if not target.is_file() or (parts.fragment and parts.fragment not in anchors):
                broken.append(f"{path.name}: {link}")
    assert not broken
    assert sum(len(page.links) for page in site.values()) > 500


def test_the_site_describes_every_public_name(site: dict[Path, Page]) -> None:
    (reference,) = [page for path, page in site.items() if path.name == "api.html"]
    assert {f"localgrad.{name}" for name in lg.__all__} <= reference.anchors


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an empty virtual environment into which the wheel was installed. Its dependencies, gigabytes, are
    those of the environment that runs this test."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", folder=folder)
    (wheel,) = folder.glob("dist/*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", folder=folder)
    python = folder / "env" / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=folder
    )  # fmt: skip
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "env")}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "env"


def test_the_wheel_runs_the_example_of_the_readme(installed: Path) -> None:
    (example, *_) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    before = "import torch\nx, y = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))\nloader = [(x, y)]\n"
    after = "\nimport localgrad\nprint(localgrad.__file__, len(out.losses))\n"
    out = run(installed / "bin" / "python", "-W", "error", "-c", before + example + after, folder=installed)
    file, blocks = out.splitlines()[-1].split()
    assert Path(file).is_relative_to(installed)
    assert int(blocks) == 1  # `lg.fit` trains exactly here.


def test_the_wheel_holds_every_file_of_the_package(installed: Path) -> None:
    (package,) = installed.glob("lib/python*/site-packages/localgrad")
    there, here = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        for folder in (package, ROOT / "src" / "localgrad")
    )
    assert there == here
    assert run(installed / "bin" / "localgrad", "list", folder=installed).count("digits") >= 1
