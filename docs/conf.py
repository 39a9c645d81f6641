"""The documentation site: `make docs` writes it to build/site. Pages are the Markdown files where they lie."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

import localgrad as lg

project = "localgrad"
author = "The localgrad authors"
project_copyright = f"{author}, Apache-2.0"
release = version = lg.__version__

# The source folder is the repository, so that links between files lead to the same places as they do there.
root_doc = "index"
include_patterns = ["index.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "results/README.md"]
exclude_patterns = [".*", "build", "runs", "src", "tests"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
napoleon_use_ivar = True
autodoc_inherit_docstrings = False  # or PyTorch's own would be shown for methods that have none here
autodoc_typehints_format = "short"
maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"localgrad {release}"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_show_sourcelink = False


def to_rst(app: Sphinx, what: str, name: str, thing: object, options: Any, lines: list[str]) -> None:
    """Docstrings here have Markdown's `code` and indented blocks, which reStructuredText marks in another way."""
    before, literal, out = "", False, []
    for paragraph in "\n".join(lines).split("\n\n"):
        opens = paragraph.startswith(" ") and not before.rpartition("\n")[2].startswith(" ")
        literal = paragraph.startswith(" ") and (opens or literal)
        out += ["::"] if opens else []
        out.append(paragraph if literal else re.sub(r"`([^`]+)`|\*", _inline, paragraph))
        before = paragraph
    lines[:] = "\n\n".join(out).splitlines()
    if what == "property":  # Napoleon takes what stands before a colon in the first line for a type.
        lines[:1] = lines[0].replace(": ", ":\n").splitlines()


def _inline(found: re.Match[str]) -> str:
    """Code that is a public name becomes a link to it. A star outside of code is a star, and marks no emphasis."""
    code = found[1]
    if code is None:
        return r"\*"
    return f":py:obj:`{code} <localgrad.{code}>`" if code in lg.__all__ else f"``{code}``"


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", to_rst, priority=400)  # Napoleon comes after it, at 500.
