from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from omega_qvla.errors import ResultError
from omega_qvla.report.sources import read_sources
from omega_qvla.results import statistics
from omega_qvla.results.episodes import EpisodeJournal, EpisodeRecord


def journal(*episodes, **labels):
    identity = {"policy": "invented", "recipe": "rtn", "condition": "plain", "scope": "all"}
    header = {"schema": 2, "environment": "e", "execute": 5, "identity": {**identity, **labels}}
    lines = [header] + [
        asdict(EpisodeRecord(task, seed, success, 9, 2, None, 2.0))
        for task, seed, success in episodes
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_every_kind_of_saved_result_is_told_apart(row, save, put, diagnostics, bench, kernels):
    memory = diagnostics()["memory"]
    files = [
        save(row("fp32"), row("rtn")),
        put("eval.json", {"schema": 1, "row": row("omega-w4a4-static")}),
        put("diagnostics.json", diagnostics()),
        put("inspect.json", {"schema": 1, **memory, "recipe": {"name": "rtn"}, "sites": []}),
        put("policy.json", bench()),
        put("kernels.json", kernels()),
        put("journal.jsonl", journal(("reach", 0, True), recipe="gptq")),
    ]
    sources = read_sources(files)
    assert [file.kind for file in sources.files] == [
        "comparison",
        "evaluation",
        "diagnostics",
        "memory",
        "policy speed",
        "kernels",
        "journal of an unfinished run",
    ]
    assert [r.recipe for r in sources.results] == ["fp32", "rtn", "omega-w4a4-static", "gptq"]
    assert sources.memories[0][0] == "rtn (inspect)"
    assert sources.policy_speeds[0][0].machine == "invented, 1 thread"


def test_keys_of_later_versions_are_no_reason_to_refuse(put, diagnostics):
    document = diagnostics(news=1)
    document["sites"][0]["more"] = {}
    assert len(read_sources([put("d.json", document)]).diagnostics) == 1


def test_all_files_that_cannot_be_used_are_named_at_once(row, save, put, tmp_path):
    good = save(row("fp32"))
    bad = {
        "text.json": ("no json", "is not JSON"),
        "list.json": ([1], "is no saved result"),
        "other.json": ({"hello": 1, "schema": 1}, "of no known kind (keys: hello, schema)"),
        "old.json": ({"schema": 0, "policy": "p", "rows": [row("rtn")]}, "schema 0"),
        "nan.json": ('{"schema": 1, "rows": [NaN]}', "NaN, which is no number"),
        "torn.json": ('{"schema": 1, "rows": [{', "is not JSON"),
        "deep.json": ("[" * 100_000, "is not JSON"),
    }
    paths = [put(name, content) for name, (content, _) in bad.items()]
    with pytest.raises(ResultError) as caught:
        read_sources([good, *paths, tmp_path / "absent.json", tmp_path])
    message = str(caught.value)
    assert message.startswith("nothing was written")
    for name, (_, reason) in bad.items():
        line = next(line for line in message.splitlines() if name in line)
        assert reason in line
    assert "absent.json: no such file" in message and "no file" in message
    assert good.name not in message


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"noise_floor": -1.0}, "noise_floor"),
        ({"sites": []}, "sites"),
        ({"observations": "many"}, "observations"),
        ({"memory": {"components": [], "total_bytes": 1, "reference_bytes": 1}}, "components"),
        (
            {"rollouts": {"environment": "e", "execute": 5, "episodes": [{}], "films": []}},
            "rollouts.episodes.0",
        ),
    ],
)
def test_a_wrong_value_is_named_by_its_place(put, diagnostics, change, where):
    with pytest.raises(ResultError, match=where):
        read_sources([put("d.json", diagnostics(**change))])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("%%%", "not base64"),
        ("PHN2Zz48L3N2Zz4=", "neither PNG nor JPEG"),  # <svg></svg>, which could run a script
        ("A" * 1_000_000, "at most 524288"),
    ],
)
def test_only_pictures_are_taken_for_pictures(put, diagnostics, text, reason):
    document = diagnostics()
    document["rollouts"]["films"][0]["frames"][0]["png"] = text
    with pytest.raises(ResultError, match=reason):
        read_sources([put("d.json", document)])


def test_nothing_is_not_reported(save, put):
    with pytest.raises(ResultError, match="give at least one file"):
        read_sources([])
    with pytest.raises(ResultError, match="nothing to report"):
        read_sources([save()])


def test_an_empty_file_beside_a_full_one_is_noted(row, save, put):
    empty = put("empty.json", {"schema": 1, "policy": "p", "rows": []})
    sources = read_sources([save(row("fp32")), empty])
    assert sources.notes == ["empty.json holds no rows"]


def test_rows_that_contradict_each_other_are_both_kept(row, save, put):
    first = save(row("fp32"), row("rtn", successes=90))
    second = put(
        "second.json", {"schema": 1, "policy": "p", "rows": [row("fp32"), row("rtn", successes=80)]}
    )
    sources = read_sources([first, second])
    assert [r.recipe for r in sources.results] == ["fp32", "rtn [run.json]", "rtn [second.json]"]
    assert "rtn, plain: run.json, second.json differ" in sources.notes[0]


def test_mixed_versions_are_noted(put, diagnostics, bench):
    files = [put("d.json", diagnostics(library="0.2.0")), put("b.json", bench())]
    assert "several versions (0.2.0: d.json; 0.1.0: b.json)" in read_sources(files).notes[0]


def test_an_unfinished_run_counts_what_is_finished(put):
    text = journal(("a", 0, True), ("a", 1, False), ("b", 0, True), ("a", 0, False))
    sources = read_sources([put("j.jsonl", text + '{"task": "b", "se')])
    (result,) = sources.results
    # the second line of an episode does not count, and neither does a torn one
    assert result.success == {"a": (1, 2), "b": (1, 1)}
    assert result.success_mean == pytest.approx(2 / 3)
    assert result.success_ci95 == pytest.approx(statistics.wilson_interval(2, 3))
    assert (result.unfinished, result.smoke, result.action_error) == (True, True, None)
    assert "unfinished: rtn, plain" in sources.notes[0]


def test_a_finished_run_takes_the_place_of_its_journal(row, save, put):
    sources = read_sources([save(row("rtn", scope="all")), put("j.jsonl", journal(("a", 0, True)))])
    assert [r.unfinished for r in sources.results] == [False]
    assert "j.jsonl: left out" in sources.notes[0]


def test_a_journal_without_episodes_is_noted(row, save, put):
    sources = read_sources([save(row("fp32")), put("j.jsonl", journal())])
    assert sources.notes == ["j.jsonl: no episode has been finished yet"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (journal(("a", 0, True)).replace('"schema": 2', '"schema": 9'), "schema 9"),
        (journal().replace('"recipe"', '"dish"'), "does not say which"),
        (journal(("a", 0, True)) + "{}\n" + "{}\n", "line 3 is damaged"),
    ],
)
def test_a_damaged_journal_is_refused(put, text, reason):
    with pytest.raises(ResultError, match=reason):
        read_sources([put("j.jsonl", text)])


def test_the_journal_of_an_evaluation_can_be_read(tmp_path):
    """Written by the evaluation itself, so that its format and this reader cannot drift apart."""
    labels = {"policy": "p", "recipe": "rtn", "condition": "plain"}
    with EpisodeJournal(tmp_path / "j.jsonl", {"environment": "e", "identity": labels}) as book:
        book.append(EpisodeRecord("a", 0, True, 5, 1, None, 2.0, [[0.1, 0.2]]))
    result = read_sources([tmp_path / "j.jsonl"]).results[0]
    assert (result.recipe, result.success, result.ms_per_chunk) == ("rtn", {"a": (1, 1)}, 2.0)
