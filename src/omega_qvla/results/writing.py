"""Writing a result: the file is either the old one or the complete new one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omega_qvla.errors import ResourceError


def write_json(document: Mapping[str, Any], path: str | Path) -> None:
    """Write JSON atomically; folders that are missing are made.

    Raises:
        ResourceError: it cannot be written.
        ValueError: a number is not finite; nothing was written.
    """
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    write_file(path, text.encode("utf-8"))


def write_file(path: str | Path, content: bytes) -> None:
    """Write a file atomically; folders that are missing are made.

    Raises:
        ResourceError: it cannot be written.
    """
    target, temporary = Path(path), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ResourceError(f"cannot write {target}: {error}") from error
