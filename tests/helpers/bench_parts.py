"""Parts of a benchmark that fail in every way there is; another process imports them by name."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from omega_qvla.errors import ResourceError


def finishes(send: Any, _: Path) -> None:
    send("rows", [1])
    send("checks", {"a": 1})
    send("rows", [2])
    send("memory_gbytes", 3.0)


def refuses(send: Any, _: Path) -> None:
    send("rows", [3])
    raise ResourceError("not enough of anything")


def breaks(send: Any, _: Path) -> None:
    raise ZeroDivisionError("by nothing")


def hangs(send: Any, _: Path) -> None:
    send("rows", [4])
    time.sleep(600)


def dies(send: Any, _: Path) -> None:
    os._exit(9)
