"""SigLIP and two Gemmas as openpi's JAX code names and lays them out, under the official names.

In JAX a linear is multiplied from the right (kernel [in, out]), attention's projections keep heads
apart, and the layers of a stack are one array with the layer first:

    q_einsum       [L, heads, width, head]          attn_vec_einsum  [L, heads, head, width]
    kv_einsum      [L, 2, kv heads, width, head]    linear           [L, hidden, width]
    gating_einsum  [L, 2, width, hidden]            Dense_0/kernel   [L, width, 3 width]

The second Gemma (the action expert) has ``_1`` behind the names of its parts.  Where a layer
becomes a parameter of the network it is transposed (openpi's own converter,
``examples/convert_jax_model_to_pytorch.py``, does the same to whole arrays).

**LoRA** (openpi's ``models/lora.py``).  Two thin arrays beside a weight, W' = W + s A B in the last
two axes; for the output of attention openpi sums the heads in both products, so that every head is
multiplied by the sum of all heads' B.  The strength s = alpha/rank, or alpha/√rank, belongs to
attention alone: openpi's feed-forward adds its product as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from omega_qvla.checkpoints.orbax_arrays import ArrayPlace, Layout, SavedArrays
from omega_qvla.checkpoints.shapes import Shapes
from omega_qvla.checkpoints.stored_tensors import Header, StoredTensors
from omega_qvla.checkpoints.weight_store import Change, Place, read_place
from omega_qvla.errors import PolicyError
from omega_qvla.policies.layers.gemma import GemmaConfig
from omega_qvla.policies.layers.siglip import VisionConfig
from omega_qvla.policies.paligemma.names import EMBED_TOKENS, EXPERT, LANGUAGE, PROJECTOR, VISION
from omega_qvla.policies.paligemma.sizes import Sizes

IMAGES, TEXT = "PaliGemma/img", "PaliGemma/llm"
BLOCK, LAYERS = f"{IMAGES}/Transformer/encoderblock", f"{TEXT}/layers"
EMBEDDING = f"{TEXT}/embedder/input_embedding"

Part = Literal["backbone", "expert"]
LoraVariant = Literal["gemma_2b_lora", "gemma_300m_lora"]
SUFFIX: Mapping[Part, str] = {"backbone": "", "expert": "_1"}
LORA_OF_BOTH: Mapping[Part, LoraVariant] = {
    "backbone": "gemma_2b_lora",
    "expert": "gemma_300m_lora",
}
_SHOWN = 8


class Lora(BaseModel):
    """openpi's ``LoRAConfig`` of a Gemma's attention.

    Attributes:
        rank: of the two thin matrices.
        alpha: strength of their product.
        rslora: divide the strength by the root of the rank.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    rank: int = Field(ge=1)
    alpha: float = 1.0
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor before the product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


LORA_VARIANTS: Mapping[LoraVariant, Lora] = {
    "gemma_2b_lora": Lora(rank=16, alpha=16.0),
    "gemma_300m_lora": Lora(rank=32, alpha=32.0),
}
"""openpi's ``gemma.py``."""


class Thin(NamedTuple):
    """The two arrays of an adapter, where a checkpoint has them.

    Attributes:
        a, b: their names.
        down, up: a layer of each → [blocks, rank, in] and [blocks, out, rank], float.
        scaled: whether the product has the strength of the adapter, or is added as it is.
    """

    a: str
    b: str
    down: Layout
    up: Layout
    scaled: bool


class Rule(NamedTuple):
    """One parameter, or one of every layer of a stack.

    Attributes:
        source: the array.
        target: the parameter; ``{}`` stands for the number of the layer.
        layout: the array, or a layer of it → the parameter.
        thin: its adapter.
    """

    source: str
    target: str
    layout: Layout
    thin: Thin | None = None


def as_it_is(x: Tensor) -> Tensor:
    """A vector or a table."""
    return x


def flat(x: Tensor) -> Tensor:
    """Biases of heads [heads, head] → [heads · head]."""
    return x.flatten()


def first(x: Tensor) -> Tensor:
    """Positions [1, P, D] → [P, D]."""
    return x[0]


def transposed(x: Tensor) -> Tensor:
    """Kernel [in, out] → [out, in]."""
    return x.t()


def convolution(x: Tensor) -> Tensor:
    """Kernel [h, w, in, out] → [out, in, h, w]."""
    return x.permute(3, 2, 0, 1)


def from_width(x: Tensor) -> Tensor:
    """Kernel [width, heads, head] → [heads · head, width]."""
    return x.flatten(1).t()


def from_heads(x: Tensor) -> Tensor:
    """Kernel [heads, head, width] → [width, heads · head]."""
    return x.flatten(0, 1).t()


def to_heads(x: Tensor) -> Tensor:
    """Einsum [heads, width, head] → [heads · head, width]."""
    return x.transpose(1, 2).flatten(0, 1)


def thin_heads(x: Tensor) -> Tensor:
    """Half of an adapter per head [heads, p, q] → [heads, q, p]."""
    return x.transpose(1, 2)


def thin_joined(x: Tensor) -> Tensor:
    """Of attention's output: A [heads, head, rank] → [1, rank, heads · head]."""
    return x.flatten(0, 1).t().unsqueeze(0)


def thin_summed(x: Tensor) -> Tensor:
    """Of attention's output: B [heads, rank, width] → [1, width, rank], the sum of all heads."""
    return x.float().sum(0).t().unsqueeze(0)


def thin_alone(x: Tensor) -> Tensor:
    """Half of an adapter of a kernel [p, q] → [1, q, p]."""
    return x.t().unsqueeze(0)


def nth(n: int | None, layout: Layout) -> Layout:
    """The layout of one of two arrays that are stored as one; None where one is stored alone."""
    return layout if n is None else lambda x: layout(x[n])


def dense(source: str, target: str) -> list[Rule]:
    """A linear with a bias."""
    return [
        Rule(f"{source}/kernel", f"{target}.weight", transposed),
        Rule(f"{source}/bias", f"{target}.bias", as_it_is),
    ]


def heads_first(einsum: str, target: str, n: int | None = None) -> Rule:
    """A projection into heads."""
    down, up = nth(n, thin_heads), nth(n, thin_heads)
    thin = Thin(f"{einsum}/lora_a", f"{einsum}/lora_b", down, up, scaled=True)
    return Rule(f"{einsum}/w", target, nth(n, to_heads), thin)


def kernel(source: str, target: str, n: int | None = None) -> Rule:
    """A linear of the feed-forward."""
    down, up = nth(n, thin_alone), nth(n, thin_alone)
    thin = Thin(f"{source}_lora_a", f"{source}_lora_b", down, up, scaled=False)
    return Rule(source, target, nth(n, transposed), thin)


def network_rules(projections: Iterable[str], *, adaptive: bool) -> list[Rule]:
    """All parameters of a network on PaliGemma.

    Args:
        projections: its linears beside PaliGemma and the action expert.
        adaptive: whether a linear makes the scales of the expert's norms.
    """
    return [
        *_vision_rules(VISION, PROJECTOR),
        Rule(EMBEDDING, f"{EMBED_TOKENS}.weight", as_it_is),
        *_gemma_rules("backbone", LANGUAGE, adaptive=False),
        *_gemma_rules("expert", EXPERT, adaptive=adaptive),
        *(rule for name in projections for rule in dense(name, name)),
    ]


def _vision_rules(tower: str, projector: str) -> list[Rule]:
    """The vision tower and the projector behind it."""
    layer, attention = f"{tower}.encoder.layers.{{}}", f"{BLOCK}/MultiHeadDotProductAttention_0"
    rules = [
        Rule(
            f"{IMAGES}/embedding/kernel", f"{tower}.embeddings.patch_embedding.weight", convolution
        ),
        Rule(f"{IMAGES}/embedding/bias", f"{tower}.embeddings.patch_embedding.bias", as_it_is),
        Rule(f"{IMAGES}/pos_embedding", f"{tower}.embeddings.position_embedding.weight", first),
        *dense(f"{IMAGES}/head", projector),
        *dense(f"{BLOCK}/MlpBlock_0/Dense_0", f"{layer}.mlp.fc1"),
        *dense(f"{BLOCK}/MlpBlock_0/Dense_1", f"{layer}.mlp.fc2"),
        Rule(f"{attention}/out/kernel", f"{layer}.self_attn.out_proj.weight", from_heads),
        Rule(f"{attention}/out/bias", f"{layer}.self_attn.out_proj.bias", as_it_is),
    ]
    for source, target in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        rules += [
            Rule(f"{attention}/{source}/kernel", f"{layer}.self_attn.{target}.weight", from_width),
            Rule(f"{attention}/{source}/bias", f"{layer}.self_attn.{target}.bias", flat),
        ]
    for source, target in (
        (f"{BLOCK}/LayerNorm_0", f"{layer}.layer_norm1"),
        (f"{BLOCK}/LayerNorm_1", f"{layer}.layer_norm2"),
        (f"{IMAGES}/Transformer/encoder_norm", f"{tower}.post_layernorm"),
    ):
        rules += [
            Rule(f"{source}/scale", f"{target}.weight", as_it_is),
            Rule(f"{source}/bias", f"{target}.bias", as_it_is),
        ]
    return rules


def _gemma_rules(part: Part, stem: str, *, adaptive: bool) -> list[Rule]:
    """The layers and the final norm of one Gemma."""
    s, layer = SUFFIX[part], f"{stem}.layers.{{}}"
    attention, here = f"{LAYERS}/attn", f"{layer}.self_attn"
    output, gates = f"{attention}/attn_vec_einsum{s}", f"{LAYERS}/mlp{s}/gating_einsum"
    rules = [
        heads_first(f"{attention}/q_einsum{s}", f"{here}.q_proj.weight"),
        heads_first(f"{attention}/kv_einsum{s}", f"{here}.k_proj.weight", 0),
        heads_first(f"{attention}/kv_einsum{s}", f"{here}.v_proj.weight", 1),
        Rule(
            f"{output}/w",
            f"{here}.o_proj.weight",
            from_heads,
            Thin(f"{output}/lora_a", f"{output}/lora_b", thin_joined, thin_summed, scaled=True),
        ),
        kernel(gates, f"{layer}.mlp.gate_proj.weight", 0),
        kernel(gates, f"{layer}.mlp.up_proj.weight", 1),
        kernel(f"{LAYERS}/mlp{s}/linear", f"{layer}.mlp.down_proj.weight"),
    ]
    for source, target in (
        (f"{LAYERS}/pre_attention_norm{s}", f"{layer}.input_layernorm"),
        (f"{LAYERS}/pre_ffw_norm{s}", f"{layer}.post_attention_layernorm"),
        (f"{TEXT}/final_norm{s}", f"{stem}.norm"),
    ):
        if adaptive:
            rules += dense(f"{source}/Dense_0", f"{target}.dense")
        else:
            rules.append(Rule(f"{source}/scale", f"{target}.weight", as_it_is))
    return rules


def network_sizes(arrays: SavedArrays) -> Sizes:
    """The sizes of the network, heads included.

    Raises:
        PolicyError: an array is missing, has another rank, or does not go with the others.
    """
    shape = Shapes(StoredTensors(str(arrays.where), arrays.headers, {}))
    patch, _, _, width = shape(f"{IMAGES}/embedding/kernel", 4)
    _, positions, _ = shape(f"{IMAGES}/pos_embedding", 3)
    vision_depth, _, hidden = shape(f"{BLOCK}/MlpBlock_0/Dense_0/kernel", 3)
    _, _, heads, _ = shape(f"{BLOCK}/MultiHeadDotProductAttention_0/query/kernel", 4)
    edge = math.isqrt(positions)
    if edge * edge != positions:
        raise PolicyError(f"{arrays.where}: {positions} vision positions are no square of patches")
    backbone, expert = _gemma_sizes(shape, "backbone"), _gemma_sizes(shape, "expert")
    together = [(each.heads, each.kv_heads, each.head_dim) for each in (backbone, expert)]
    if together[0] != together[1]:
        raise PolicyError(
            f"{arrays.where}: heads, key heads and their width are {together[0]} in the backbone "
            f"and {together[1]} in the action expert, which attends to the backbone's keys"
        )
    return Sizes(
        vision=VisionConfig(
            width=width,
            hidden=hidden,
            heads=heads,
            depth=vision_depth,
            image_size=edge * patch,
            patch_size=patch,
        ),
        backbone=backbone,
        expert=expert,
        depth=shape(f"{LAYERS}/mlp/linear", 3)[0],
        vocabulary=shape(EMBEDDING, 2)[0],
        action_dim=shape("action_out_proj/kernel", 2)[1],
    )


def _gemma_sizes(shape: Shapes, part: Part) -> GemmaConfig:
    s = SUFFIX[part]
    _, heads, width, head = shape(f"{LAYERS}/attn/q_einsum{s}/w", 4)
    _, _, kv_heads, _, _ = shape(f"{LAYERS}/attn/kv_einsum{s}/w", 5)
    _, hidden, _ = shape(f"{LAYERS}/mlp{s}/linear", 3)
    return GemmaConfig(width=width, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head)


def map_parameters(
    arrays: SavedArrays, rules: Iterable[Rule], said: Mapping[Part, LoraVariant | Lora]
) -> StoredTensors:
    """The parameters of the network, each a part of an array or the whole of it.

    Args:
        arrays: of a step.
        rules: for every array.
        said: what the training configuration says of adapters.

    Raises:
        PolicyError: an array is missing, unexpected or misshaped, or adapters and what is said of
            them do not fit.
    """
    rules = list(rules)
    loras: dict[Part, Lora] = {
        part: told if isinstance(told, Lora) else LORA_VARIANTS[told] for part, told in said.items()
    }
    _require_same(arrays, rules)
    places: dict[str, ArrayPlace] = {}
    changes: dict[str, Change] = {}
    for rule in rules:
        scaling = _scaling(arrays, rule, loras)
        for target, layer in _targets(arrays, rule):
            places[target] = ArrayPlace(arrays, rule.source, layer, rule.layout)
            if scaling is not None and rule.thin is not None:
                down = ArrayPlace(arrays, rule.thin.a, layer, rule.thin.down)
                up = ArrayPlace(arrays, rule.thin.b, layer, rule.thin.up)
                changes[target] = LowRankBlocks(down, up, scaling)
    headers = {target: _header(place) for target, place in places.items()}
    return StoredTensors(str(arrays.where), headers, places, changes, _decisions(arrays, loras))


@dataclass(frozen=True)
class LowRankBlocks:
    """The products of thin matrices added to the blocks of rows of a weight."""

    down: Place
    up: Place
    scaling: float

    def __call__(self, weight: Tensor) -> Tensor:
        """Float32 [blocks · out, in] → the same; the weight is used up."""
        down, up = read_place(self.down), read_place(self.up)
        weight.view(len(up), -1, weight.shape[1]).baddbmm_(up, down, alpha=self.scaling)
        return weight


def _targets(arrays: SavedArrays, rule: Rule) -> Iterator[tuple[str, int | None]]:
    """The parameters that an array holds, and the layer each is of."""
    if "{}" not in rule.target:
        yield rule.target, None
        return
    for layer in range(arrays.headers[rule.source].shape[0]):
        yield rule.target.format(layer), layer


def _require_same(arrays: SavedArrays, rules: Iterable[Rule]) -> None:
    """Every array has a rule, every rule an array, and stacks have as many layers in all arrays."""
    expected = {rule.source: rule for rule in rules}
    thin = {name for rule in rules if rule.thin for name in (rule.thin.a, rule.thin.b)}
    found = arrays.headers
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [
        f"unexpected {name} {list(found[name].shape)}"
        for name in found
        if name not in expected and name not in thin
    ]
    for root in (BLOCK, LAYERS):
        stacked = {n: found[n].shape[:1] for n in expected if n in found and n.startswith(root)}
        first_name, depth = next(iter(stacked.items()), ("", ()))
        problems += [
            f"{name} is a stack of {list(layers)} layers, {first_name} of {list(depth)}"
            for name, layers in stacked.items()
            if layers != depth
        ]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        shown = "; ".join(problems[:_SHOWN])
        raise PolicyError(f"{arrays.where} does not fit the policy: {shown}{more}")


def _header(place: ArrayPlace) -> Header:
    try:
        return place.header
    except (RuntimeError, IndexError) as error:
        stored = list(place.arrays.headers[place.key].shape)
        raise PolicyError(
            f"{place.file}: {place.key} has shape {stored}, which is of no such parameter"
        ) from error


def _scaling(arrays: SavedArrays, rule: Rule, loras: Mapping[Part, Lora]) -> float | None:
    """The strength of a rule's adapter, its shapes checked; None where the checkpoint has none."""
    found, thin = arrays.headers, rule.thin
    if thin is None or (thin.a not in found and thin.b not in found):
        return None
    for name, other in ((thin.a, thin.b), (thin.b, thin.a)):
        if name not in found:
            raise PolicyError(f"{arrays.where} has {other} and no {name}: half an adapter")
    *outer, rows, columns = found[rule.source].shape
    rank = found[thin.a].shape[-1] if found[thin.a].shape else 0
    for name, needed in ((thin.a, (*outer, rows, rank)), (thin.b, (*outer, rank, columns))):
        if found[name].shape != needed:
            raise PolicyError(
                f"{arrays.where}: {name} has shape {list(found[name].shape)}; an adapter of rank "
                f"{rank} of {rule.source} has {list(needed)}"
            )
    part = _part(rule.source)
    if part not in loras:
        raise PolicyError(
            f"{arrays.where} has {thin.a}, a LoRA of rank {rank}, and the training configuration "
            f'has none: openpi keeps its strength in its code. Add "lora": {{"{part}": '
            f'"{LORA_OF_BOTH[part]}"}} to it, or {{"rank": {rank}, "alpha": .., "rslora": false}} '
            "(docs/checkpoints.md)"
        )
    if thin.scaled and rank != loras[part].rank:
        raise PolicyError(
            f"{arrays.where}: {thin.a} is a LoRA of rank {rank}, the training configuration says "
            f"{loras[part].rank} for the {part}: it is another policy's"
        )
    return loras[part].scaling if thin.scaled else 1.0


def _part(source: str) -> Part:
    names = source.split("/")
    return "expert" if any(name.endswith(SUFFIX["expert"]) for name in names) else "backbone"


def _decisions(arrays: SavedArrays, loras: Mapping[Part, Lora]) -> dict[str, str]:
    for part in loras:
        name = f"{LAYERS}/attn/q_einsum{SUFFIX[part]}/lora_a"
        if name not in arrays.headers:
            raise PolicyError(
                f"the training configuration has a LoRA of the {part}, and {arrays.where} has no "
                f"{name}: it is another policy's"
            )
    kinds = [
        f"{part}: rank {lora.rank}, attention's product times {lora.scaling:g}"
        for part, lora in loras.items()
    ]
    if not kinds:
        return {}
    return {"adapter": f"LoRA folded in float32 and not rounded; {'; '.join(kinds)}"}
