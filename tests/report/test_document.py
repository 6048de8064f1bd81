from __future__ import annotations

import hashlib
import json
import re
import struct
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from omega_qvla.errors import MissingPackageError, ResourceError, ResultError
from omega_qvla.report.document import write_report

pytestmark = pytest.mark.long

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """What a page is made of; fails on tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.addresses, self.words, self.open = Counter(), [], [], [], []
        self.attributes = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())  # no-break spaces become spaces

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags[tag] += 1
        self.attributes.append((tag, given))
        self.ids += [given["id"]] if "id" in given else []
        names = ("href", "xlink:href", "src", "srcset", "action", "data")
        self.addresses += [given[name] for name in names if given.get(name)]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture
def report(tmp_path):
    """Writes a report of some files; returns what was returned and the page."""

    def make(*files, name="report.html"):
        summary = write_report(files, tmp_path / "out" / name, default="omega-w4a4-static")
        return summary, Page((tmp_path / "out" / name).read_text("utf-8"))

    return make


@pytest.fixture(scope="module")
def everything(tmp_path_factory, row, diagnostics, bench):
    folder = tmp_path_factory.mktemp("everything")
    compared = [row("fp32", action_error=0.0), row("omega-w4a4-static"), row("rtn", "stress:30")]
    documents = {
        "run.json": {"schema": 1, "policy": "invented", "rows": compared},
        "diagnostics.json": diagnostics(),
        "stress.json": diagnostics("rtn", "stress:30"),
        "bench.json": bench(),
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    return [folder / name for name in documents]


@pytest.fixture(scope="module")
def whole(everything, tmp_path_factory):
    """A report of everything: what was returned, the page, and its text as written."""
    target = tmp_path_factory.mktemp("whole") / "report.html"
    summary = write_report(everything, target, figures=target.parent / "figures")
    text = target.read_text("utf-8")
    return summary, Page(text), text


def test_everything_measured_has_its_figure_and_nothing_is_left_over(whole):
    summary, page, _ = whole
    names = [re.sub(r"-\d+\.png$", "", figure.split("report-")[-1]) for figure in summary.figures]
    kinds = ["success", "error", "memory", "sites", "ranges", "outliers", "path", "latency"]
    assert list(dict.fromkeys(names)) == kinds
    assert summary.gaps == []
    written = sorted(str(p) for p in Path(summary.report).parent.rglob("*") if p.is_file())
    assert written == sorted([*summary.figures, summary.report])
    for figure in summary.figures:
        with open(figure, "rb") as file:
            head = file.read(24)
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", head[16:24])[0] == 840  # 4.2 inches at 200 dpi
    assert page.tags["svg"] == len(summary.figures)
    assert page.tags["img"] == 4  # full precision and the recipe, under two conditions


def test_the_page_needs_nothing_but_itself(whole):
    summary, page, text = whole
    for address in page.addresses:
        assert address.startswith(("#", "data:image/png;base64,"))
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    policy = next(a["content"] for _, a in page.attributes if "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert "@import" not in text
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))
    assert summary.bytes == len(text.encode()) < 3_000_000


def test_ids_are_unique_and_every_reference_leads_somewhere(whole):
    _, page, _ = whole
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    known = set(page.ids)
    assert all(a[1:] in known for a in page.addresses if a.startswith("#"))
    for _, given in page.attributes:
        if "aria-labelledby" in given:
            assert given["aria-labelledby"] in known


def test_everything_seen_can_also_be_heard(whole):
    _, page, _ = whole
    drawings = [given for _, given in page.attributes if given.get("role") == "img"]
    assert len(drawings) == page.tags["svg"]
    assert all(len(given["aria-label"]) > 20 for given in drawings)
    assert all(given.get("alt") for tag, given in page.attributes if tag == "img")
    assert ("html", {"lang": "en"}) in page.attributes
    assert page.tags["caption"] == page.tags["table"] > 3
    assert all(
        given.get("scope") in ("col", "row") for tag, given in page.attributes if tag == "th"
    )
    assert page.tags["h1"] == 1


def test_the_same_files_give_the_same_bytes(everything, whole, tmp_path):
    again = write_report(everything, tmp_path / "report.html", figures=tmp_path)
    first, second = whole[0], again
    ours = [first.report, *first.figures]
    theirs = [second.report, *second.figures]
    for one, other in zip(ours, theirs, strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()


def test_words_come_from_the_numbers(saved, report):
    summary, page = report(saved)
    name = "omega-w4a4-static on invented"
    assert f"{name}: 93.0 % solved, 95.0 % in full precision" in page.text
    sure = "−2.0 points (−5.0 to +1.0), not significantly different (McNemar's exact p = 0.25)."
    assert sure in page.text and summary.figures == []
    assert "smoke test" in page.text
    digest = hashlib.sha256(saved.read_bytes()).hexdigest()
    assert summary.to_json()["files"] == [
        {"file": "run.json", "kind": "comparison", "sha256": digest}
    ]
    assert digest[:16] in page.text


def test_a_loss_is_called_a_loss(row, save, report, paired):
    loss = paired(-0.4, [-0.5, -0.3], 1e-9)
    worse = row("bad", successes=55, action_error=0.9, paired_vs_reference=loss)
    _, page = report(save(row("fp32", successes=95, action_error=0.0), worse))
    assert "significantly worse" in page.text


def test_what_was_not_measured_is_a_gap_that_says_how_to_fill_it(row, save, report):
    unmeasured = dict.fromkeys(("success_mean", "success_ci95", "smoothness", "ms_per_chunk"))
    open_loop = {"success": {}, "seeds": [], **unmeasured}
    summary, page = report(
        save(row("fp32", action_error=0.0, **open_loop), row("rtn", **open_loop))
    )
    assert set(summary.gaps) == {
        "Memory",
        "Error site by site",
        "Activation range over denoising steps",
        "Outliers",
        "Trajectories",
        "Film strip",
        "Latency",
    }
    told = page.text.partition("Not in these files")[2]
    assert all(f"{title} :" in told or f"{title}:" in told for title in summary.gaps)
    assert "omega-qvla diagnose" in page.text
    assert "rtn on invented: action error 0.004" in page.text


def test_a_recipe_that_was_not_simulated_is_named(row, save, report):
    gone = {"success": {}, "success_mean": None, "success_ci95": None}
    _, page = report(save(row("fp32"), row("rtn"), row("gptq", **gone)))
    assert "Not simulated: gptq." in page.text


def test_diagnostics_alone_make_a_report(put, diagnostics, report):
    bare = diagnostics(memory=None, rollouts=None, profiles=[])
    bare["sites"] = bare["sites"][:1]
    _, page = report(put("d.json", bare))
    assert page.tags["svg"] == 1
    assert "Inside omega-w4a4-static on invented" in page.text
    assert "75 times below the policy's own spread" in page.text


def test_zeros_and_missing_errors_leave_gaps_not_crashes(put, diagnostics, site, report):
    dead = site("gemma_expert.layers.0.mlp.down_proj", "action_head", steps=4)
    dead |= {"error": [None] * 4, "local_error": [None] * 4, "absmax": [0.0] * 4, "rms": [0.0] * 4}
    dead |= {"transformed_absmax": [0.0] * 4, "transformed_rms": [0.0] * 4, "limit": None}
    document = diagnostics(sites=[dead, site("unnumbered", "backbone", local_error=[0.0])])
    document["profiles"][0] |= {"before": [0.0], "after": [0.0]}
    _, page = report(put("d.json", document))
    assert any(one.startswith("ranges-1") for one in page.ids)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x>', "$\\frac{1}$ & co"])
def test_names_are_text_wherever_they_appear(row, save, put, diagnostics, report, name):
    document = diagnostics(name, name)
    document["rollouts"]["episodes"][0]["task"] = name
    run = save(row("fp32", name), row(name, name, policy=name, success={name: [1, 2]}))
    _summary, page = report(run, put("d.json", document))
    assert page.tags["script"] == 0
    assert page.tags["img"] == 2
    assert name in page.text


def test_full_precision_is_shown_once_however_often_it_was_run(put, diagnostics, report):
    files = [put("a.json", diagnostics()), put("b.json", diagnostics("rtn"))]
    _, page = report(*files)
    assert sum("Path of the hand" in g.get("aria-label", "") for _, g in page.attributes) == 1
    assert page.tags["img"] == 3
    alt = next(
        g["aria-label"] for _, g in page.attributes if "Path of the hand" in g.get("aria-label", "")
    )
    assert alt.count("fp32: solved after 10 steps") == 1
    assert alt.count("3 mm from full precision on average") == 2


def test_many_rows_make_longer_figures_not_fuller_ones(row, save, report):
    conditions = ("plain", "stress:10", "stress:30", "stress:100")
    recipes = ["fp32", *(f"recipe-{n}" for n in range(14))]
    rows = [
        row(recipe, condition, policy=policy, action_error=0.001 * (1 + number))
        for policy in ("one", "two")
        for condition in conditions
        for number, recipe in enumerate(recipes)
    ]
    summary, page = report(save(*rows))
    assert page.tags["svg"] == 2 + 2 * len(conditions)
    assert "14 recipes on one and two" in page.text
    assert summary.bytes < 1_500_000


def test_a_deep_network_still_fits(put, diagnostics, site, report):
    sites = [
        site(f"{block}.layers.{layer}.{kind}", component, steps=steps)
        for block, component, steps in (
            ("vision", "vision", 1),
            ("gemma_expert", "action_head", 10),
        )
        for layer in range(27)
        for kind in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.fc1", "mlp.fc2")
    ]
    summary, _ = report(put("d.json", diagnostics(sites=sites)))
    assert summary.bytes < 1_000_000


def test_bad_input_leaves_nothing_behind(saved, put, tmp_path):
    with pytest.raises(ResultError, match="is not JSON"):
        write_report([saved, put("bad.json", "{")], tmp_path / "out" / "report.html")
    assert not (tmp_path / "out").exists()


def test_an_earlier_report_survives_a_failed_one(saved, put, tmp_path):
    target = tmp_path / "report.html"
    target.write_text("earlier")
    with pytest.raises(ResultError):
        write_report([put("bad.json", "{")], target)
    assert target.read_text() == "earlier"


@pytest.mark.parametrize("name", ["report.pdf", "report", "run.json"])
def test_only_html_is_written(saved, tmp_path, name):
    with pytest.raises(ResultError, match=r"NAME\.html"):
        write_report([saved], tmp_path / name)


def test_inputs_are_not_overwritten(saved, tmp_path):
    page = tmp_path / "run.html"
    page.write_bytes(saved.read_bytes())
    with pytest.raises(ResultError, match="would be overwritten"):
        write_report([page], page)


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named(saved, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=rf"package {module}, .*'report'"):
        write_report([saved], tmp_path / "out" / "report.html")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named(saved):
    with pytest.raises(ResourceError, match="cannot write"):
        write_report([saved], saved / "below-a-file.html")
