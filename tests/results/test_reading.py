"""Saved results are read as they were written, and the page about them says all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from omega_qvla.errors import ResultError
from omega_qvla.files import write_json
from omega_qvla.results.document import Document
from omega_qvla.results.reading import KINDS, load_as, load_comparison, parse, read_bytes
from omega_qvla.results.rows import Comparison, Row
from omega_qvla.results.speed import LayerRates

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SAVED = {
    "comparison": [
        "benchmark-v1.json",
        *(
            f"{policy}-{what}.json"
            for policy in ("tiny-pi05", "tiny-gr00t")
            for what in ("ablations", "many-observations", "default", "paper-scope", "unseen")
        ),
    ],
    "diagnostics": ["tiny-pi05-diagnostics.json"],
    "policy speed": ["cpu-pi05-chunk.json", "cpu-gr00t-chunk.json"],
    "kernels": ["cpu-kernels.json", "cpu-kernels-avx2.json"],
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in SAVED.items() for name in names]
)
def test_every_measured_result_is_read_and_written_without_loss(kind: str, name: str) -> None:
    content = read_bytes(RESULTS / name)
    found_kind, found = parse(content, name)
    assert found_kind == kind and isinstance(found, KINDS[kind])
    assert found.to_json() == json.loads(content)


def test_a_key_that_does_not_apply_is_absent_and_one_that_was_not_measured_is_null() -> None:
    rows = load_comparison(RESULTS / "benchmark-v1.json").rows
    full, quantized = rows[0].model_dump(exclude_defaults=True), rows[-1]
    assert "recipe_hash" not in full and full["drift"] is None
    assert "unfinished" not in full and "source" not in full
    assert quantized.recipe_hash is not None


def test_what_was_read_cannot_be_changed() -> None:
    (row, *_) = load_comparison(RESULTS / "benchmark-v1.json").rows
    with pytest.raises(ValidationError, match="frozen"):
        row.recipe = "other"


def test_a_row_whose_episodes_do_not_add_up_is_refused() -> None:
    (row, *_) = load_comparison(RESULTS / "benchmark-v1.json").rows
    changed = row.model_dump() | {"episodes": row.episodes + 1}
    with pytest.raises(ValidationError, match="over all tasks"):
        Row.model_validate(changed)


def test_a_file_of_another_kind_is_named_by_what_it_holds() -> None:
    with pytest.raises(ResultError, match=r"no saved comparison \(kernels\)"):
        load_comparison(RESULTS / "cpu-kernels.json")
    with pytest.raises(ResultError, match=r"machine: Field required.*give what `x` writes"):
        load_as(LayerRates, RESULTS / "benchmark-v1.json", "`x`")


def test_a_document_survives_a_writer_that_fails(tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    document = Comparison(policy="p", rows=[])
    write_json(document.to_json(), target)
    before = target.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_json({"rows": [float("inf")]}, target)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_page_about_json_is_what_the_documents_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "json_page.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("model", sorted(Document.__subclasses__(), key=lambda one: one.__name__))
def test_every_document_says_what_each_of_its_keys_means(model: type[Document]) -> None:
    text = " ".join(base.__doc__ or "" for base in model.__mro__)
    assert [name for name in model.model_fields if name not in text] == []
