"""Refuse source that could run code while loading data.

Usage: ``python tools/forbidden_calls.py [directory ...]`` (default ``src``).  Prints every match as
``file:line: reason`` and exits with 1 if there is one.  It reads text, not syntax trees, on
purpose: a name in a string or an alias counts, and so does a mention in a comment.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"\b(pickle|cPickle|cloudpickle|dill|joblib|shelve)\b", "formats that execute code"),
        (r"\btorch\.(jit\.)?load\b|\bweights_only\b", "torch's own checkpoint reader"),
        (r"\byaml\.(load|load_all|full_load|unsafe_load)\b", "YAML with constructors"),
        (r"allow_pickle\s*=\s*True", "numpy object arrays"),
        (r"trust_remote_code\s*=\s*True", "code from a hub"),
        (r"(?<![\w.])(eval|exec)\(", "evaluating text"),
        (r"\b__import__\(", "importing a name from data"),
    )
)


def forbidden_calls(directories: Iterable[Path]) -> list[str]:
    """Every match in the Python files below the directories, as ``file:line: reason: text``."""
    found: list[str] = []
    for directory in directories:
        for path in sorted(directory.rglob("*.py")):
            for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
                for pattern, reason in RULES:
                    if pattern.search(line):
                        found.append(f"{path}:{number}: {reason}: {line.strip()}")
    return found


def main() -> int:
    """Check the directories named on the command line."""
    directories = [Path(name) for name in sys.argv[1:] or ["src"]]
    missing = [str(directory) for directory in directories if not directory.is_dir()]
    if missing:
        print(f"not a directory: {', '.join(missing)}", file=sys.stderr)
        return 2
    found = forbidden_calls(directories)
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
