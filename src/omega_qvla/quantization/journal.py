"""A journal: the artifact that a quantization has not finished yet.

A directory holds ``header.json`` (what the work depends on) and one safetensors file per finished
site: the tensors that the artifact will have of it, under their names there, and what
``omega_config.json`` will say of it (``stored.py``).  Every file is written beside its place,
flushed to disk and renamed, so a kill leaves either the whole site or nothing: at most the site in
progress is computed again.  A header that differs from the present inputs is refused with the list
of differences, because mixing sites of two recipes or two checkpoints would give an artifact nobody
asked for.  The device is one of these inputs: two of them round sums differently, and sites of both
would make an artifact that no run from start to end gives.  A header without one is of the CPU,
which was once the only one.

Whoever computes sites for a journal has claimed its directory (``claims.py``): a second process is
refused before it computes any.  Reading needs no claim: what is there is finished.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from omega_qvla.artifact.layout import TensorSpec
from omega_qvla.claims import Claim
from omega_qvla.errors import ArtifactError, ResourceError, ResumeError
from omega_qvla.files import write_file
from omega_qvla.policies.base import QuantizationSite
from omega_qvla.quantization.site import QuantizedSite
from omega_qvla.quantization.stored import (
    SiteRecord,
    require_layout,
    restored_site,
    site_tensors,
)
from omega_qvla.recipe import Recipe

HEADER = "header.json"
ON_CPU = "cpu"
"""What a header says of work on the CPU."""
_SITE_SUFFIX = ".safetensors"
_OURS = re.compile(r"(header\.json|site-\d{5}\.safetensors)(\.partial)?")


class Journal:
    """Finished sites of one quantization, on disk; a context that ends with the work.

    Args:
        directory: where to keep them; created if needed.
        header: everything the result depends on (recipe, weights, calibration, version).
        recipe: that sites are quantized with.
        resume: continue what is there.

    Raises:
        ResumeError: the directory holds something else; or finished sites, and not ``resume``; or
            its header differs from ``header``.
        OutputError: another process is computing sites for it.
        ResourceError: the disk is full.
    """

    def __init__(
        self, directory: Path, header: Mapping[str, str], recipe: Recipe, *, resume: bool
    ) -> None:
        self.directory, self._recipe = directory, recipe
        self._claim: Claim | None = None
        try:
            if not (resume and (directory / HEADER).exists()):
                self._require_claim()
            self._open(header, resume)
        except BaseException:
            self.close()
            raise

    def _open(self, header: Mapping[str, str], resume: bool) -> None:
        path, finished = self.directory / HEADER, finished_sites(self.directory)
        if finished and not resume:
            raise ResumeError(
                f"{self.directory} has {finished} finished site(s) of an interrupted quantization: "
                "continue with resume, or remove it to start again"
            )
        if path.exists() and resume:
            _require_same(path, header)
            return
        if finished:
            raise ResumeError(
                f"{self.directory} has finished sites but no {HEADER} that says what of; remove it "
                "and start again"
            )
        _write(path, json.dumps(dict(header), indent=1, sort_keys=True).encode())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others compute sites for it."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def find(self, index: int, site: QuantizationSite) -> QuantizedSite | None:
        """The finished site with this index, or None if it has to be computed, by the caller.

        Raises:
            ResumeError: what is there is damaged.
            OutputError: it has to be computed, and another process is at it.
        """
        if not self._path(index).exists():
            self._require_claim()
        # Looked for again: another process may have finished it before this one had the claim.
        return self.load(index, site) if self._path(index).exists() else None

    def load(self, index: int, site: QuantizationSite) -> QuantizedSite:
        """The finished site with this index.

        Raises:
            ResumeError: it is damaged, or gone although it was there.
        """
        path = self._path(index)
        if not path.exists():
            raise ResumeError(
                f"{path}, the finished site {site.name!r}, was removed while it was needed; "
                "continue with resume, and it is computed again"
            )
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                said = file.metadata() or {}
            if said["sha256"] != _digest(tensors, said["site"]):
                raise ValueError("its bytes do not have the SHA-256 written with them")
            record = SiteRecord.model_validate(json.loads(said["site"]))
            if record.site != site:
                raise ValueError(f"it holds {record.site.name!r}, not {site.name!r}")
            found = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
            expected = record.layout(self._recipe, found)
            require_layout(found, expected)
            own = {name.rpartition(".")[2]: tensors[name] for name in expected}
            return restored_site(record, self._recipe, own)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, ArtifactError) as error:
            raise ResumeError(
                f"{path} is damaged ({error}); delete {self.directory} and start again"
            ) from error

    def store(self, index: int, quantized: QuantizedSite) -> None:
        """Record a finished site.

        Raises:
            ResourceError: the disk is full; nothing is left half-written.
        """
        text = json.dumps(SiteRecord.of(quantized, self._recipe).dump())
        kinds = site_tensors(quantized)
        tensors = {f"{quantized.site.name}.{kind}": tensor for kind, tensor in kinds.items()}
        content = save(tensors, metadata={"site": text, "sha256": _digest(tensors, text)})
        _write(self._path(index), content)

    def _require_claim(self) -> None:
        if self._claim is None:
            self._claim = Claim(self.directory)

    def _path(self, index: int) -> Path:
        return self.directory / f"site-{index:05d}{_SITE_SUFFIX}"


def finished_sites(directory: Path) -> int:
    """How many finished sites a journal has; 0 where there is none.

    Raises:
        ResumeError: the directory holds something that is not a journal.
    """
    return sum(file.suffix == _SITE_SUFFIX for file in _own_files(directory))


def discard_journal(directory: Path) -> None:
    """Remove a journal after the result has been saved; nothing happens if there is none.

    Raises:
        ResumeError: the directory holds something that is not a journal.
        OutputError: another process is computing sites for it.
    """
    if not directory.exists():
        return
    with Claim(directory):
        _remove(_own_files(directory))
        directory.rmdir()


def _own_files(directory: Path) -> list[Path]:
    """The journal's files; a directory with anything else in it is not ours to use or empty."""
    try:
        if not directory.exists():
            return []
        found = sorted(directory.iterdir())
    except OSError as error:
        raise ResumeError(f"{directory} cannot be used for a journal: {error}") from error
    foreign = [path.name for path in found if not _OURS.fullmatch(path.name)]
    if foreign:
        raise ResumeError(
            f"{directory} holds something that is not a quantization journal "
            f"({', '.join(foreign[:3])}); give another work directory"
        )
    return found


def _remove(files: list[Path]) -> None:
    """Delete a journal's files, the header last: interrupted, the rest still belongs to it."""
    for path in sorted(files, key=lambda path: path.name == HEADER):
        path.unlink()


def _digest(tensors: Mapping[str, Tensor], metadata: str) -> str:
    digest = hashlib.sha256(metadata.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_same(path: Path, header: Mapping[str, str]) -> None:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ResumeError(
            f"{path} is unreadable ({error}); remove {path.parent} and start again"
        ) from error
    if not isinstance(found, dict):
        raise ResumeError(f"{path} is not a journal header; remove {path.parent} and start again")
    before, now = {"device": ON_CPU, **found}, {"device": ON_CPU, **header}
    different = [
        f"{key}: was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if before["device"] != now["device"]:
        raise ResumeError(
            f"cannot resume {path.parent}: it was begun on another device, which rounds sums "
            f"differently ({'; '.join(different)}); go on where it was begun (device=), or remove "
            "it and start again"
        )
    if different:
        raise ResumeError(
            f"cannot resume {path.parent}: its inputs changed ({'; '.join(different)}); "
            "restore them, or remove it and start again"
        )


def _write(path: Path, content: bytes) -> None:
    try:
        write_file(path, content)
    except ResourceError as error:
        raise ResourceError(f"{error}; free some space and run again with resume") from error
