"""Writing what a report consists of: each file is the old one or the complete new one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from omega_qvla.results.rows import ReportError


def write_file(target: Path, content: bytes) -> None:
    """Write a file atomically; its folder is made where it is missing.

    Raises:
        ReportError: it cannot be written.
    """
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ReportError(f"cannot write {target}: {error}") from error
