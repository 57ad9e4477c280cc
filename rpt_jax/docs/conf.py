"""Sphinx: the Markdown pages of this folder and a reference from the docstrings; `make docs` builds them.

In: *.md beside this file and the installed package. Out: build/docs. Nothing here is installed.
"""

import dataclasses
import re
import textwrap

import rpt_jax
from rpt_jax import settings

project = "rpt_jax"
author = "the authors of rpt_jax"
copyright = "the authors of rpt_jax, Apache-2.0"
version = release = rpt_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["*.ipynb"]
highlight_language = "none"  # blocks of docstrings are columns of text, not code
html_theme = "furo"
html_title = f"rpt_jax {release}"
myst_heading_anchors = 3  # [text](page.md#a-heading) leads to headings down to ###
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "replace"}
autodoc_preserve_defaults = True
autodoc_use_type_comments = False
maximum_signature_line_length = 100

MARKED = re.compile(r"`([^`\n]+)`|\barXiv (\d{4}\.\d{5})")  # code, or a paper


def setup(app) -> None:
    app.connect("autodoc-process-docstring", show_plain_text)


def show_plain_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text and not reStructuredText: turns each block of lines into what shows it as it is."""
    blocks = "\n".join(lines).strip("\n").split("\n\n")
    if what == "class" and dataclasses.is_dataclass(obj):
        blocks += fields(obj)
    lines[:] = "\n\n".join(shown(block) for block in blocks if block.strip()).split("\n") + [""]


def fields(record: type) -> list[str]:
    """The fields that have a comment, as one block of columns; none for a record without comments."""
    about = settings.comments(f"{record.__module__}:{record.__name__}")
    width = max(map(len, about), default=0)
    wrapped = {name: textwrap.wrap(text, 96 - width) for name, text in about.items()}
    rows = [f"{name * (not i):{width}}  {line}" for name, lines in wrapped.items() for i, line in enumerate(lines)]
    return ["\n".join(rows)] if rows else []


def shown(block: str) -> str:
    """A paragraph as one line; a block with columns, lists or indentation as it stands."""
    rows = block.strip("\n").split("\n")
    if any(re.match(r"\s|- ", row) or re.search(r"\S {2,}\S", row) for row in rows):
        return "\n".join(["::", "", *("    " + row for row in rows)])
    text, made, end = " ".join(rows), ["\\ "], 0
    for found in MARKED.finditer(text):
        made.append(escaped(text[end : found.start()]))
        code, paper = found.groups()
        made.append(f"\\ ``{code}``\\ " if code else f"`arXiv {paper} <https://arxiv.org/abs/{paper}>`__\\ ")
        end = found.end()
    return "".join(made) + escaped(text[end:])


def escaped(text: str) -> str:
    return re.sub(r"([^\w\s]|_)", r"\\\1", text)
