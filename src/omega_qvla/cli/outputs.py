"""What a command writes: claimed before the work, and never replaced unasked.

One rule for every command: an output that is there already is refused unless ``--overwrite`` was
given; interrupted work is refused unless it is continued (``--resume``) or discarded by name
(``--overwrite``).  While a command runs it has a claim on its outputs (``claims.py``), so
a second one is refused at its start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from omega_qvla.claims import Claim, require_free_file
from omega_qvla.errors import OmegaError, OutputError
from omega_qvla.files import put_back

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen


@contextmanager
def claimed_files(files: Sequence[Path], overwrite: bool) -> Iterator[None]:
    """Claim the files that a command will write.

    Raises:
        OutputError: one is there already and ``overwrite`` is not given, is no regular file, is
            named twice, or is being written by another process.
        ResourceError: it cannot be written there.
    """
    places = [path.resolve() for path in files]
    for path in files:
        if places.count(path.resolve()) > 1:
            raise OutputError(f"{path} is named for two outputs; give each a file of its own")
    with ExitStack() as claims:
        for path in files:
            require_free_file(path, overwrite)
            claims.enter_context(Claim(path))
            require_free_file(path, overwrite)  # who had it before may just have written it
        yield


def require_free_artifact(out: Path, overwrite: bool) -> None:
    """Refuse a directory that holds an artifact, unless it may be replaced.

    The caller has the claim on it: an artifact that a killed writer moved aside is put back.

    Raises:
        OutputError: it holds an artifact; says of what.
        NotAnArtifactError: it holds something else.
    """
    from omega_qvla.artifact import preflight

    put_back(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    preflight(out, 0)
    if not overwrite:
        raise OutputError(
            f"{out} holds an artifact{_recipe_in(out)}; give --overwrite to replace it once the "
            "new one is complete, or another --out"
        )


def _recipe_in(artifact: Path) -> str:
    from omega_qvla.artifact import read_description

    try:
        config = read_description(artifact).config
        return f" ({config['policy']['family']}, recipe {config['recipe']['name']})"
    except (OmegaError, KeyError, TypeError):
        return ", a damaged one"


def prepare_journal(screen: Screen, journal: Path, *, resume: bool, overwrite: bool) -> None:
    """Decide what becomes of the finished sites of an interrupted run, and say so.

    Raises:
        OutputError: there are some, and neither option was given.
        ResumeError: the directory holds something that is not a journal.
    """
    from omega_qvla.quantization.journal import discard_journal, finished_sites

    finished = finished_sites(journal)
    if resume and finished:
        screen.say(f"continuing: {finished} finished site(s) in {journal}")
    elif resume:
        screen.say(f"nothing to continue in {journal}; starting with the first site")
    elif finished and not overwrite:
        raise OutputError(
            f"{journal} has {finished} finished site(s) of an interrupted run: continue with "
            "--resume, or start again with --overwrite"
        )
    else:
        discard_journal(journal)
