"""Saved results that somebody edited, tore or made up: a report of them, or one of our errors."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omega_qvla.errors import ResultError
from omega_qvla.report.sources import read_sources
from omega_qvla.report.summary import summarise
from omega_qvla.report.table import markdown, results_table

pytestmark = pytest.mark.long

STRANGE = (None, True, -1, 0, 1e300, "", "text", "$x^", [], [[]], [1], {}, {"ci95": [1]})


def places(value, path=()):
    """Paths to everything inside a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items if isinstance(value, (dict, list)) else ():
        yield from (
            places(inner, (*path, key)) if isinstance(inner, (dict, list)) else [(*path, key)]
        )


def mutated(document, path, value):
    """A copy with something else in one place; nothing at all there for ``...``."""
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return changed


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_change_gives_a_report_or_one_of_our_errors(
    data, row, paired, diagnostics, bench, tmp_path
):
    loss = paired(-0.02, [-0.05, 0.01], 0.25)
    rows = [row("fp32"), row("rtn", paired_vs_reference=loss), row("gptq", "stress:30")]
    documents = [{"schema": 1, "policy": "invented", "rows": rows}, diagnostics(), bench()]
    document = data.draw(st.sampled_from(documents))
    path = data.draw(st.sampled_from([path for path in places(document) if path]))
    value = data.draw(st.sampled_from((*STRANGE, ...)))
    file = tmp_path / "changed.json"
    file.write_text(json.dumps(mutated(document, path, value)))
    try:
        sources = read_sources([file])
    except ResultError as error:
        assert "changed.json" in str(error)
        return
    assert summarise(sources).headline
    assert markdown(results_table(sources.results))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=200), cut=st.integers(0, 2000))
def test_bytes_that_are_no_result_are_refused(content, cut, diagnostics, tmp_path):
    file = tmp_path / "bytes.json"
    for whole in (content, json.dumps(diagnostics()).encode()[:cut]):
        file.write_bytes(whole)
        try:
            read_sources([file])
        except ResultError as error:
            assert "bytes.json" in str(error)
        else:
            raise AssertionError("a torn file was taken for a result")
