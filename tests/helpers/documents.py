"""What documents show, to be run: blocks of code by language, and commands as they are written."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from omega_qvla.cli import main

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = {
    "pip install": "wheels are built and looked into by test_house.py",
    "python3 -m venv": "the tests run in an environment that is there",
    "make ": "targets are looked up in the Makefile by test_house.py",
    "python -m pytest": "these are tests",
}
"""Beginnings of commands that are shown and not run here, and why."""


def section(document: str, heading: str) -> str:
    """The text below a heading of the second level."""
    text = (ROOT / document).read_text("utf-8")
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language, in order, indented ones included."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def commands(text: str) -> list[str]:
    """The lines of all sh blocks without comments, continued lines joined."""
    joined = "".join(blocks(text, "sh")).replace("\\\n", " ")
    lines = [shlex.join(shlex.split(line, comments=True)) for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith(tuple(NOT_RUN))]


def run(command: str) -> None:
    """A command of this project in this process; it must end with status 0."""
    program, *words = shlex.split(command)
    assert program == "omega-qvla", command
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0, command


@contextmanager
def serving(command: str) -> Iterator[int]:
    """A server started as written, on a free port; gives the port."""
    program, *words = shlex.split(command)
    assert program == "omega-qvla" and words[0] == "serve", command
    server = subprocess.Popen(
        [sys.executable, "-m", "omega_qvla.cli", *words, "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        events = (json.loads(line) for line in server.stdout)
        yield next(event["port"] for event in events if event["event"] == "ready")
    finally:
        server.terminate()
        assert server.wait(30) == 0
