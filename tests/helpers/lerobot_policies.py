"""Policies of LeRobot 0.6.1, shrunken and random, with one batch after another for each.

LeRobot's own modules and configurations are built as its factory builds them; what it would fetch
from a hub (backbones' configurations, processors) is handed in.  Batches are what its preprocessors
give: normalized tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import omega_qvla as oq
from omega_qvla.flow_time import FlowClock

VOCABULARY = 512
SIDE = 64
CHUNK = 10
CAMERAS = ("image", "wrist_image")


@dataclass(frozen=True)
class Kind:
    """How ``TorchPolicy`` is given one type of policy."""

    backbone: str | None
    action_head: str | None
    step_module: str | None
    steps: int
    noise_shape: tuple[int, ...] | None = None


KINDS: dict[str, Kind] = {
    "pi0": Kind(
        r".*(vision_tower|multi_modal_projector|language_model)\..*",
        r".*gemma_expert\.model\..*",
        "model.denoise_step",
        10,
        (1, CHUNK, 32),
    ),
    "smolvla": Kind(
        r"model\.vlm_with_expert\.vlm\.model\..*",
        r"model\.vlm_with_expert\.lm_expert\..*",
        "model.denoise_step",
        10,
        (1, CHUNK, 32),
    ),
    "xvla": Kind(
        r"model\.vlm\.(vision_tower|language_model\.encoder|multi_modal_projector).*",
        r"model\.transformer\.blocks\..*",
        "model.transformer",
        10,
    ),
    "multi_task_dit": Kind(
        r"observation_encoder\..*", r"noise_predictor\.(?!final).*", "noise_predictor", 4
    ),
    "groot": Kind(
        r"_groot_model\.(backbone|action_head\.vl_self_attention)\..*",
        r"_groot_model\.action_head\.model\..*",
        "_groot_model.action_head.model",
        4,
    ),
    "act": Kind(None, r"model\.(encoder|decoder)\..*linear\d", "model", 1),
}


def sample(module: Any, observation: Any, noise: Any, clock: FlowClock) -> Tensor:
    """One chunk; where LeRobot takes no noise, it draws from PyTorch's global generator."""
    del clock  # step_module counts
    module.reset()
    batch = {name: tensor.clone() for name, tensor in observation.items()}
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    try:
        if noise is not None:
            return module.predict_action_chunk(batch, noise=noise)
        if hasattr(module, "_groot_model"):
            return module._groot_model.get_action(batch)["action_pred"]
        if hasattr(module, "noise_predictor"):
            # predict_action_chunk reads the queues that select_action fills.
            module.select_action(batch)
            return torch.stack(list(module._queues["action"]), dim=1)
        return module.predict_action_chunk(batch)
    finally:
        torch.set_rng_state(state)


def torch_policy(name: str, seed: int = 0) -> oq.TorchPolicy:
    """LeRobot's policy as ``TorchPolicy``."""
    kind = KINDS[name]
    return oq.TorchPolicy(
        build(name, seed),
        sample=sample,
        steps=kind.steps,
        backbone=kind.backbone,
        action_head=kind.action_head,
        step_module=kind.step_module,
        noise_shape=kind.noise_shape,
    )


def batches(name: str, count: int = 4) -> list[dict[str, Tensor]]:
    """Observations with random images, as the preprocessor of the policy would give them."""
    generator = torch.Generator().manual_seed(7)
    return [_batch(name, generator) for _ in range(count)]


def _batch(name: str, generator: torch.Generator) -> dict[str, Tensor]:
    state = torch.randn(1, 8, generator=generator)
    if name == "groot":
        images, patches = len(CAMERAS), 64
        tokens = [1, 2] + ([151652] + [151655] * patches + [3]) * images + list(range(5, 15))
        return {
            "input_ids": torch.tensor([tokens]),
            "attention_mask": torch.ones(1, len(tokens), dtype=torch.long),
            "pixel_values": torch.randn(images * 256, 3 * 2 * 16 * 16, generator=generator),
            "image_grid_thw": torch.tensor([[1, 16, 16]] * images),
            "state": nn.functional.pad(state[:, None], (0, 124)),
            "embodiment_id": torch.tensor([0]),
        }
    tokens = torch.randint(12, VOCABULARY, (1, 12), generator=generator)
    images = {
        f"observation.images.{camera}": torch.rand(1, 3, SIDE, SIDE, generator=generator)
        for camera in CAMERAS
    }
    return {
        **images,
        "observation.state": state,
        "observation.language.tokens": tokens,
        "observation.language.attention_mask": torch.ones(1, 12, dtype=torch.bool),
    }


def features() -> dict[str, Any]:
    """What a policy reads and gives, as LeRobot's configurations have it."""
    from lerobot.configs import FeatureType, PolicyFeature

    return {
        "input_features": {
            **{
                f"observation.images.{camera}": PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE))
                for camera in CAMERAS
            },
            "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (7,))},
        "device": "cpu",
    }


def configuration(name: str) -> Any:
    """LeRobot's configuration of a shrunken policy."""
    return _CONFIGURATIONS[name](features())


def build(name: str, seed: int) -> nn.Module:
    """A shrunken policy with random weights."""
    from lerobot.policies.factory import get_policy_class

    with _seeded(seed), shrunken(name):
        module = get_policy_class(name)(configuration(name)).eval()
        for parameter in module.parameters():
            # LeRobot begins with zeros in gates and adaptive norms, behind which nothing shows.
            if parameter.is_floating_point() and not bool(parameter.any()):
                parameter.data.normal_(0.0, 0.05)
            # GR00T's weights per robot, [robots, inputs, outputs], begin so small that its actions
            # are the noise they start from.
            if name == "groot" and parameter.ndim == 3:
                parameter.data.normal_(0.0, parameter.shape[1] ** -0.5)
    return module


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def shrunken(name: str) -> Iterator[None]:
    """Inside the block LeRobot builds policies of this type in a shrunken size, without a hub."""
    with ExitStack() as stack:
        for target, attribute, value in _SHRINKING.get(name, list)():
            stack.enter_context(patch.object(target, attribute, value))
        yield


Patches = list[tuple[Any, str, Any]]


def _pi0(features: dict[str, Any]) -> Any:
    from lerobot.policies.pi0.configuration_pi0 import PI0Config

    return PI0Config(chunk_size=CHUNK, n_action_steps=CHUNK, **features)


def _shrink_pi0() -> Patches:
    code = importlib.import_module("lerobot.policies.pi0.modeling_pi0")
    original_vlm = code.PaliGemmaForConditionalGenerationWithPiGemma
    original_expert = code.PiGemmaForCausalLM

    def vlm(config: Any) -> nn.Module:
        config.text_config.vocab_size = config._vocab_size = VOCABULARY
        config.image_token_index = VOCABULARY
        config.vision_config.num_hidden_layers = 2
        config.vision_config.hidden_size, config.vision_config.intermediate_size = 96, 192
        config.vision_config.num_attention_heads = 4
        config.vision_config.projection_dim = config.text_config.hidden_size
        return original_vlm(config)

    def expert(config: Any) -> nn.Module:
        config.vocab_size = VOCABULARY
        return original_expert(config)

    sizes = code.GemmaConfig(64, 2, 128, 8, 1, 16)
    return [
        (code, "get_gemma_config", lambda variant: sizes),
        (code, "PaliGemmaForConditionalGenerationWithPiGemma", vlm),
        (code, "PiGemmaForCausalLM", expert),
    ]


def _smolvla(features: dict[str, Any]) -> Any:
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    return SmolVLAConfig(
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        num_vlm_layers=4,
        resize_imgs_with_padding=(SIDE, SIDE),
        load_vlm_weights=False,
        **features,
    )


def _shrink_smolvla() -> Patches:
    import transformers

    parts = importlib.import_module("lerobot.policies.smolvla.smolvlm_with_expert")

    def backbone(*_: Any, **__: Any) -> Any:
        return transformers.SmolVLMConfig(
            text_config={
                "model_type": "llama",
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "vocab_size": VOCABULARY,
            },
            vision_config={
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": SIDE,
                "patch_size": 16,
            },
            scale_factor=2,
            image_token_id=5,
        )

    tokenizer = SimpleNamespace(fake_image_token_id=10, global_image_token_id=11)
    processor = SimpleNamespace(tokenizer=tokenizer)
    return [
        (parts.AutoConfig, "from_pretrained", backbone),
        (parts.AutoProcessor, "from_pretrained", lambda *_, **__: processor),
    ]


def _xvla(features: dict[str, Any]) -> Any:
    from lerobot.policies.xvla.configuration_xvla import XVLAConfig

    florence = {
        "vision_config": {
            "model_type": "davit",
            "depths": [1, 1, 1, 1],
            "embed_dim": [32, 32, 64, 64],
            "num_heads": [2, 2, 4, 4],
            "num_groups": [2, 2, 4, 4],
            "projection_dim": 64,
            "drop_path_rate": 0.0,
        },
        "text_config": {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 512,
        },
        "tie_word_embeddings": True,
    }
    return XVLAConfig(
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        florence_config=florence,
        hidden_size=64,
        depth=2,
        num_heads=4,
        action_mode="auto",
        max_state_dim=8,
        max_action_dim=20,
        resize_imgs_with_padding=(128, 128),
        len_soft_prompts=4,
        **features,
    )


def _act(features: dict[str, Any]) -> Any:
    from lerobot.policies.act.configuration_act import ACTConfig

    return ACTConfig(
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        pretrained_backbone_weights=None,
        dim_model=128,
        dim_feedforward=256,
        n_encoder_layers=2,
        **features,
    )


def _multi_task_dit(features: dict[str, Any]) -> Any:
    from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig

    return MultiTaskDiTConfig(
        n_obs_steps=1,
        objective="flow_matching",
        num_integration_steps=4,
        hidden_dim=64,
        num_layers=2,
        num_heads=4,
        **features,
    )


def _shrink_multi_task_dit() -> Patches:
    import transformers

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }

    def vision(*_: Any, **__: Any) -> nn.Module:
        config = transformers.CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=16)
        return transformers.CLIPVisionModel(config)

    def text(*_: Any, **__: Any) -> nn.Module:
        config = transformers.CLIPTextConfig(**sizes, vocab_size=VOCABULARY, eos_token_id=1)
        return transformers.CLIPTextModel(config)

    return [
        (transformers.CLIPVisionModel, "from_pretrained", vision),
        (transformers.CLIPTextModel, "from_pretrained", text),
    ]


def _groot(features: dict[str, Any]) -> Any:
    from lerobot.policies.groot.configuration_groot import GrootConfig

    return GrootConfig(
        chunk_size=16,
        n_action_steps=16,
        embodiment_tag="new_embodiment",
        use_bf16=False,
        **features,
    )


def _shrink_groot() -> Patches:
    import transformers

    network = importlib.import_module("lerobot.policies.groot.groot_n1_7")
    code = importlib.import_module("lerobot.policies.groot.modeling_groot")
    full = network._cosmos_reason2_qwen3_vl_config

    def backbone() -> Any:
        content = full().to_dict()
        text, vision = content["text_config"], content["vision_config"]
        text.update(
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_hidden_layers=4,
            vocab_size=151680,
            rope_parameters={
                "mrope_interleaved": True,
                "mrope_section": [4, 2, 2],
                "rope_type": "default",
                "rope_theta": 5000000,
            },
        )
        text.pop("rope_scaling", None)
        vision.update(
            depth=4,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            out_hidden_size=64,
            deepstack_visual_indexes=[0, 1, 2],
        )
        kept = ("image_token_id", "video_token_id", "tie_word_embeddings")
        marks = ("vision_start_token_id", "vision_end_token_id")
        return transformers.Qwen3VLConfig(
            text_config=text, vision_config=vision, **{key: content[key] for key in kept + marks}
        )

    def made(*_: Any, **__: Any) -> nn.Module:
        config = network.GR00TN17Config(
            select_layer=3,
            backbone_embedding_dim=64,
            hidden_size=64,
            input_embedding_dim=96,
            max_num_embodiments=4,
            action_horizon=16,
            diffusion_model_cfg={
                "positional_embeddings": None,
                "num_layers": 4,
                "num_attention_heads": 4,
                "attention_head_dim": 24,
                "norm_type": "ada_norm",
                "dropout": 0.0,
                "final_dropout": True,
                "output_dim": 64,
                "interleave_self_attention": True,
            },
            vl_self_attention_cfg={
                "positional_embeddings": None,
                "num_layers": 2,
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "dropout": 0.0,
                "final_dropout": True,
            },
        )
        return network.GR00TN17(config, load_backbone_weights=False)

    return [
        (network, "_cosmos_reason2_qwen3_vl_config", backbone),
        (code.GR00TN17, "from_pretrained", made),
    ]


_CONFIGURATIONS = {
    "pi0": _pi0,
    "smolvla": _smolvla,
    "xvla": _xvla,
    "multi_task_dit": _multi_task_dit,
    "groot": _groot,
    "act": _act,
}

_SHRINKING: dict[str, Callable[[], Patches]] = {
    "pi0": _shrink_pi0,
    "smolvla": _shrink_smolvla,
    "multi_task_dit": _shrink_multi_task_dit,
    "groot": _shrink_groot,
}
