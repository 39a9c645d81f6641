"""Rules of the repository that reading alone would not keep: no trick code, imports point down, names agree."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import localgrad as lg
from localgrad.core import couplings, heads, methods
from localgrad.run import recipe

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "localgrad"
FLOORS = ("core", "scale", "run")
PYTHON = sorted(
    path for folder in ("src", "tests", "benchmarks", "examples", "docs") for path in (ROOT / folder).rglob("*.py")
)
OURS = [path for path in PYTHON if ROOT / "tests" not in path.parents]
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".csv", ".cff", ".html", ".svg", ".sh", ""}
NOT_TRACKED = {".git", ".venv", "runs", "build", "dist", "__pycache__", ".hypothesis", ".ruff_cache", ".pytest_cache"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def offences(node: ast.AST) -> Iterator[str]:
    """What no Python file here may contain."""
    match node:
        case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
            yield name
        case ast.Call(func=ast.Attribute(attr="cuda", value=value)) if not is_torch(value):
            yield ".cuda()"
        case ast.Global():
            yield "global"
        case ast.ExceptHandler(type=None):
            yield "bare except"
        case ast.ImportFrom(names=[ast.alias(name="*")]):
            yield "import *"
        case ast.Attribute(value=ast.Name(id="pickle"), attr="load" | "loads" | "Unpickler" as name):
            yield f"pickle.{name}"
        case ast.ImportFrom(module="pickle" | "dill" | "cloudpickle" | "joblib" | "marshal" | "shelve" as name):
            yield f"from {name}"
        case ast.Call(func=ast.Attribute()) if trusts(node):
            yield "torch.load without weights_only=True"
        case ast.ImportFrom(module="torch" | "torch.serialization", names=names) if "load" in {a.name for a in names}:
            yield "from torch import load"
        case ast.keyword(arg="weights_only", value=ast.Constant(value=False)):
            yield "weights_only=False"
        case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
            yield "allow_pickle=True"
        case _:
            pass


def trusts(call: ast.Call) -> bool:
    """Whether torch.load may unpickle whatever the file holds. (weights_only=False has a rule of its own.)"""
    safe = [k.value.value for k in call.keywords if k.arg == "weights_only" and isinstance(k.value, ast.Constant)]
    return ast.unparse(call.func) in ("torch.load", "torch.serialization.load") and safe not in ([True], [False])


def is_torch(value: ast.AST) -> bool:
    return isinstance(value, ast.Name) and value.id == "torch"


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_no_trick_code(path: Path) -> None:
    assert [f"{offence}, line {node.lineno}" for node in ast.walk(tree(path)) for offence in offences(node)] == []  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_no_file_is_long(path: Path) -> None:
    """Tests may be: they mirror the modules, one file for each."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize(
    ("code", "offence"),
    [
        ("eval('1')", "eval"),
        ("exec('1')", "exec"),
        ("x.cuda()", ".cuda()"),
        ("def f():\n    global a", "global"),
        ("try:\n    a\nexcept:\n    b", "bare except"),
        ("from a import *", "import *"),
        ("pickle.load(a)", "pickle.load"),
        ("from pickle import loads", "from pickle"),
        ("torch.load(a, weights_only=False)", "weights_only=False"),
        ("torch.load(a)", "torch.load without weights_only=True"),
        ("torch.load(a, map_location='cpu', weights_only=safe)", "torch.load without weights_only=True"),
        ("torch.serialization.load(a, **how)", "torch.load without weights_only=True"),
        ("from torch import load, save", "from torch import load"),
        ("np.load(a, allow_pickle=True)", "allow_pickle=True"),
        ("model.eval(); torch.cuda.synchronize(); torch.load(a, weights_only=True)", None),
    ],
)
def test_the_rules_see_what_they_forbid(code: str, offence: str | None) -> None:
    found = [o for node in ast.walk(ast.parse(code)) for o in offences(node)]
    assert found == ([] if offence is None else [offence])


# Imports


def imports(path: Path, *, top: bool = False) -> list[tuple[str, int]]:
    """Modules that a file imports, with their lines; `top`: those that importing the file itself would load."""
    nodes = list(ast.walk(tree(path)))
    if top:
        inside = {
            id(inner)
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.If)
            for inner in ast.walk(node)
            if inner is not node
        }
        nodes = [node for node in nodes if id(node) not in inside]
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports relatively"
            assert node.module is not None
            found += [(node.module, node.lineno)]
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*/*.py")), ids=name_of)
def test_imports_point_down(path: Path) -> None:
    floor = path.parent.name
    assert floor in FLOORS
    above = [f"localgrad.{name}" for name in (*FLOORS[FLOORS.index(floor) + 1 :], "cli", "__main__")]
    wrong = [(module, line) for module, line in imports(path) if module.startswith(tuple(above))]
    assert not wrong


@pytest.mark.parametrize("path", sorted(SOURCE.glob("core/*.py")), ids=name_of)
def test_the_core_asks_nobody_for_the_package_itself(path: Path) -> None:
    assert "localgrad" not in {module for module, _ in imports(path)}


@pytest.mark.parametrize("module", ["localgrad", "localgrad.cli", "localgrad.run.recipe", "localgrad.run.recipes"])
def test_the_command_line_starts_without_torch(module: str) -> None:
    heavy = "('torch', 'torchvision', 'timm', 'sklearn', 'numpy')"
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_imports_no_torch_at_its_top() -> None:
    assert not [name for name, _ in imports(SOURCE / "cli.py", top=True) if name.partition(".")[0] == "torch"]


# Names


def test_the_recipe_offers_what_the_core_has() -> None:
    assert tuple(methods.METHODS) == recipe.METHODS
    assert tuple(couplings.COUPLINGS) == recipe.COUPLINGS
    assert ("auto", *heads.HEADS) == recipe.HEADS


@pytest.mark.parametrize("name", lg.__all__)
def test_public_names_are_there_and_documented(name: str) -> None:
    thing = getattr(lg, name)
    assert thing.__name__ == name
    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{name}(")  # what a dataclass says of itself


def test_the_public_door_lists_each_name_once_and_no_other() -> None:
    assert len(set(lg.__all__)) == len(lg.__all__)
    assert set(lg.__all__) <= set(dir(lg))
    with pytest.raises(AttributeError, match="no attribute 'loclize'"):
        _ = lg.loclize  # pyright: ignore[reportAttributeAccessIssue]


def test_every_module_says_what_it_is_for() -> None:
    assert not [name_of(path) for path in OURS if not ast.get_docstring(tree(path))]


def test_the_map_of_the_code_names_every_module_and_no_other() -> None:
    text = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE)
    floors = {path for path in SOURCE.rglob("*.py") if path.name != "__init__.py" or path.parent == SOURCE}
    assert sorted(named) == sorted(str(path.relative_to(SOURCE)) for path in floors)


def test_the_api_reference_names_every_public_name_and_no_other() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\.\. auto\w+:: (\w+)$", text, re.MULTILINE)) == sorted(lg.__all__)


@pytest.mark.parametrize("path", sorted(SOURCE.glob("core/*.py")), ids=name_of)
def test_examples_in_docstrings_are_true(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
    assert doctest.testmod(module).failed == 0


# What is asked of others


def test_pyproject_asks_for_pytorch_2_10_or_newer() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        wanted = [Requirement(text) for text in tomllib.load(file)["project"]["dependencies"]]
    (torch,) = [requirement for requirement in wanted if requirement.name == "torch"]
    allowed = [version for version in ("2.5.1", "2.9.1", "2.10.0", "2.11.0", "3.0.0") if version in torch.specifier]
    assert allowed == ["2.10.0", "2.11.0", "3.0.0"]
    assert torch.marker is None


def test_the_workflow_runs_the_commands_of_a_fresh_clone() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert {".ci/run", "make docs"} <= set(commands)
    local = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    made = {command.removeprefix("make ") for command in (*commands, *local) if command.startswith("make ")}
    assert {"test", "docs"} <= made <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


# An audit hook cannot be taken away again, and no handler of exceptions catches what it does.
OFFLINE = """
import os, sys

def hook(event, args):
    name = event.removeprefix("socket.")
    asks = name in ("connect", "bind", "sendto", "sendmsg", "getaddrinfo", "getnameinfo")
    if asks or name.startswith("gethostby") or event in ("urllib.Request", "http.client.connect"):
        os.write(2, event.encode())
        os._exit(77)

sys.addaudithook(hook)
"""
EVERYTHING = """
import importlib, pkgutil, runpy, localgrad
for argv in (["--help"], ["train", "--help"], ["list"]):
    sys.argv = ["localgrad", *argv]
    try:
        runpy.run_module("localgrad", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, end.code
for module in pkgutil.walk_packages(localgrad.__path__, "localgrad."):
    if module.name != "localgrad.__main__":
        importlib.import_module(module.name)
        print("imported", module.name)
"""


def offline(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process that ends with 77 where it would open a connection or look up a name."""
    return subprocess.run([sys.executable, "-c", OFFLINE + code], capture_output=True, text=True, timeout=120)


def test_imports_help_and_list_open_no_connection() -> None:
    done = offline(EVERYTHING)
    assert done.returncode == 0, done.stderr
    own = {path.relative_to(SOURCE.parent).with_suffix("") for path in SOURCE.glob("*/*.py") if path.stem[0] != "_"}
    assert {".".join(path.parts) for path in own} <= {*done.stdout.split()}
    assert all(word in done.stdout for word in ("usage: localgrad COMMAND", "--on-bad-image", "scikit-learn"))


@pytest.mark.parametrize(
    ("code", "event"),
    [
        ("socket.create_connection(('127.0.0.1', 9))", "socket.getaddrinfo"),
        ("socket.socket().connect(('127.0.0.1', 9))", "socket.connect"),
        ("socket.socket().bind(('127.0.0.1', 0))", "socket.bind"),
        ("socket.socket(type=socket.SOCK_DGRAM).sendto(b'a', ('127.0.0.1', 9))", "socket.sendto"),
        ("socket.gethostbyname('localhost')", "socket.gethostbyname"),
        ("import urllib.request as r; r.urlopen('http://127.0.0.1:9')", "urllib.Request"),
    ],
)
def test_a_connection_would_be_seen(code: str, event: str) -> None:
    done = offline(f"import socket\ntry: {code}\nexcept BaseException: pass")
    assert (done.returncode, done.stderr) == (77, event)


# Places


def tracked() -> Iterator[Path]:
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_TRACKED and not name.endswith(".egg-info")]
        for path in (Path(folder, name) for name in files if name not in NOT_TRACKED):  # .git is a file in a worktree
            if path.suffix in TEXT and path.stat().st_size < 2**20:
                yield path


def test_no_file_knows_a_machine_or_a_registry() -> None:
    folders = [f"/{name}/" for name in ("work", "root", "home", "Users")]
    hosts = ["pypi" + ".org", "python" + "hosted.org", "download." + "pytorch.org", "index" + "-url"]
    found = [
        (name_of(path), word)
        for path in tracked()
        for word in (*folders, *hosts)
        if word in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert not found


def test_lines_end_in_a_line_feed_alone() -> None:
    assert not [name_of(path) for path in tracked() if b"\r" in path.read_bytes()]


def test_no_benchmark_has_the_name_of_a_room_or_of_a_package() -> None:
    """Its folder comes first on the path of a script and of the tests. `coverage` is what pytest-cov imports."""
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert not names & {path.stem for path in SOURCE.rglob("*.py")}
    assert not [name for name in names if name == "coverage" or name in sys.stdlib_module_names]


def test_every_benchmark_tells_its_command_and_what_it_writes() -> None:
    for path in (ROOT / "benchmarks").glob("*.py"):
        if "__main__" in path.read_text(encoding="utf-8"):
            told = ast.get_docstring(tree(path)) or ""
            assert f"python benchmarks/{path.name}" in told, path.name
            assert "Writes" in told, path.name


def test_no_file_has_a_name_that_windows_reserves() -> None:
    assert not [name_of(path) for path in PYTHON if path.stem.lower() in {"aux", "con", "nul", "prn"}]
