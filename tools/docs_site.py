# pyright: reportMissingImports=false

"""Hooks of mkdocs: what the documentation's site needs beyond its pages.

Pages link to files of the repository, which are not part of the site: such a link must lead
somewhere, and becomes plain text.  Pictures outside docs/ are copied.  The page about the command
line gets the help of every command, so that it cannot be out of date.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = "<!-- commands -->"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)\)")
_WIDTH = "100"


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures outside docs/ that pages show."""
    for file in list(files.documentation_pages()):
        for picture, _, target in _LINK.findall(file.content_string):
            path = _outside(file, target)
            if picture and path:
                files.append(File.generated(config, _copied(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Links out of docs/ as text or to a copy, and the help of the commands."""

    def rewritten(found: re.Match[str]) -> str:
        path = _outside(page.file, found[3])
        if path is None:
            return found[0]
        up = "../" * page.file.src_uri.count("/")
        return f"![{found[2]}]({up}{_copied(path)})" if found[1] else found[2]

    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    return _LINK.sub(rewritten, markdown)


def commands() -> str:
    """The help of every command, as the program prints it."""
    names = re.findall(r"^  ([a-z]+) {2,}\S", help_of(), flags=re.MULTILINE)
    if len(names) < 10:
        raise PluginError(f"`omega-qvla --help` lists only the commands {names}")
    return "\n".join(f"## {name}\n\n```text\n{help_of(name)}\n```\n" for name in names)


def help_of(*words: str) -> str:
    """What ``omega-qvla WORDS --help`` prints."""
    from omega_qvla.cli import main

    os.environ["COLUMNS"] = _WIDTH
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return stream.getvalue().strip()


def _outside(file: File, target: str) -> Path | None:
    """The file of the repository that a link names; None if it is in docs/."""
    docs = ROOT / "docs"
    path = (docs / file.src_uri).parent.joinpath(target).resolve()
    if path.is_relative_to(docs):
        return None
    if not path.exists() or not path.is_relative_to(ROOT):
        raise PluginError(f"docs/{file.src_uri}: the link to {target} leads nowhere")
    return path


def _copied(path: Path) -> str:
    return f"images/{path.name}"
