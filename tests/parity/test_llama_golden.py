"""Our Llama against hidden states and logits recorded from transformers 5.24, weights included.

Also through a GGUF file in which queries and keys are stored as llama.cpp's converter stores them:
each head's two halves interleaved.  Weights are bfloat16 numbers; outputs agreed to 1e-6 where they
were recorded (values up to 4), 2e-5 leaves a decade for another platform's summation order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omega_qvla.checkpoints.gguf_file import GgufFile, read_gguf
from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.backbone.model import LanguagePolicy, language_policy

GOLDEN = load_file(Path(__file__).parent / "golden" / "llama_shrunken.safetensors")
WEIGHTS = {
    name.removeprefix("weight."): tensor.to(torch.float32)
    for name, tensor in GOLDEN.items()
    if name.startswith("weight.")
}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SETTINGS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.vocab_size": 48,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 16,
    "llama.block_count": 2,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def converted(name: str, weight: Tensor) -> tuple[str, Tensor]:
    """A tensor under llama.cpp's name, queries and keys interleaved."""
    if not name.startswith("layers."):
        return {"embed_tokens.weight": "token_embd", "norm.weight": "output_norm"}[
            name
        ] + ".weight", weight
    _, block, part, kind = *name.split(".", 2)[:2], *name.split(".", 2)[2].rsplit(".", 1)
    if part.endswith(("q_proj", "k_proj")):
        weight = weight.unflatten(0, (-1, 2, 8)).transpose(1, 2).reshape(weight.shape)
    return f"blk.{block}.{NAMES[part]}.{kind}", weight


def found() -> GgufFile:
    return GgufFile(SETTINGS, dict(converted(*item) for item in WEIGHTS.items()))


def require_golden(policy: LanguagePolicy) -> None:
    hidden = policy.sample_actions({"tokens": GOLDEN["tokens"]})
    torch.testing.assert_close(hidden, GOLDEN["hidden"], rtol=0, atol=2e-5)
    logits = policy.module.logits(hidden)
    torch.testing.assert_close(logits, GOLDEN["logits"], rtol=0, atol=2e-5)


def test_hidden_states_and_logits_are_those_of_transformers() -> None:
    require_golden(language_policy(found()))


def test_a_copy_computes_the_same_with_the_same_tensors() -> None:
    policy = language_policy(found())
    twin = policy.clone()
    require_golden(twin)
    assert twin.module.norm.weight.data_ptr() == policy.module.norm.weight.data_ptr()


def test_the_same_through_a_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf (the extra bench) is not installed")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in SETTINGS.items():
        if key != "general.architecture":
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(key, value)
    for name, tensor in found().tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_gguf(path)
    assert read.settings["llama.block_count"] == 2
    require_golden(language_policy(read))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf (the extra bench) is not installed")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model" * 10)
    with pytest.raises(PolicyError, match=r"model\.gguf cannot be read"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "mamba", "'mamba' model, not a llama"),
        ("llama.block_count", None, r"no 'llama\.block_count'"),
        ("llama.embedding_length", "64", r"no 'llama\.embedding_length'"),
        ("llama.block_count", 3, "does not fit its own settings"),
    ],
)
def test_another_model_is_refused(key: str, value: Any, message: str) -> None:
    file = found()
    with pytest.raises(PolicyError, match=message):
        language_policy(GgufFile({**file.settings, key: value}, file.tensors))
