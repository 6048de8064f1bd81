"""The types of LeRobot's policies: how each is sampled, and what it would fetch to build itself.

Little is known of a type here: the module or method that LeRobot calls once per denoising step, how
a chunk is asked for, and which configurations of backbones LeRobot asks a hub for.  Which linears
there are, which run per step and which once, is found by watching (``watching.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from omega_qvla.errors import PolicyError
from omega_qvla.policies.lerobot_bridge.library import lerobot

Backbones = Mapping[str, Any]
"""What LeRobot would ask a hub for while it builds a policy, as JSON."""


@dataclass(frozen=True)
class Kind:
    """One type of policy.

    Attributes:
        title: what people call it.
        step: submodule, or method of one, that is called once per denoising step.
        chunk: (module, batch, noise) → normalized actions [B, T, A].
        noise: configuration → shape of the noise that ``chunk`` takes, [1, T, A]; None where
            LeRobot takes none and draws from PyTorch's own generator.
        backbones: module → what its building has asked a hub for.
        answering: gives those answers to LeRobot while it builds a module.
        random: whether the actions depend on random numbers at all.
    """

    title: str
    step: str
    chunk: Callable[[Any, dict[str, Any], Tensor | None], Tensor]
    noise: Callable[[Any], tuple[int, ...]] | None = None
    backbones: Callable[[Any], Backbones] = lambda module: {}
    answering: Callable[[ExitStack, Backbones], None] = lambda stack, backbones: None
    random: bool = True


def _chunk_of_noise(module: Any, batch: dict[str, Any], noise: Tensor | None) -> Tensor:
    return module.predict_action_chunk(batch, noise=noise)


def _chunk(module: Any, batch: dict[str, Any], noise: Tensor | None) -> Tensor:
    del noise
    return module.predict_action_chunk(batch)


def _queued_chunk(module: Any, batch: dict[str, Any], noise: Tensor | None) -> Tensor:
    """Of a policy whose chunk is made of the observations that ``select_action`` has queued."""
    del noise
    first = module.select_action(batch)
    return torch.stack([first, *module._queues["action"]], dim=1)


def _padded_noise(config: Any) -> tuple[int, ...]:
    return 1, int(config.chunk_size), int(config.max_action_dim)


def _smolvla_backbones(module: Any) -> Backbones:
    network = module.model.vlm_with_expert
    tokenizer = network.processor.tokenizer
    tokens = ("fake_image_token_id", "global_image_token_id")
    return {
        "vlm": network.config.to_dict(),
        "tokens": {name: int(getattr(tokenizer, name)) for name in tokens},
    }


def _answer_smolvla(stack: ExitStack, backbones: Backbones) -> None:
    code = lerobot("policies.smolvla.smolvlm_with_expert")
    config = _config("SmolVLMConfig", backbones["vlm"])
    processor = SimpleNamespace(tokenizer=SimpleNamespace(**backbones["tokens"]))
    stack.enter_context(patch.object(code, "AutoConfig", _answer(config)))
    stack.enter_context(patch.object(code, "AutoProcessor", _answer(processor)))


def _clip_backbones(module: Any) -> Backbones:
    code = lerobot("policies.multi_task_dit.modeling_multi_task_dit")
    found: dict[str, Any] = {}
    for child in module.modules():
        if isinstance(child, code.CLIPVisionEncoder):
            found["vision"] = child.model.config.to_dict()
        if isinstance(child, code.CLIPTextEncoder):
            found["text"] = child.text_encoder.config.to_dict()
    return found


def _answer_clip(stack: ExitStack, backbones: Backbones) -> None:
    code = lerobot("policies.multi_task_dit.modeling_multi_task_dit")
    for part, name in (("vision", "CLIPVision"), ("text", "CLIPText")):
        kind = getattr(code, f"{name}Model")
        config = _config(f"{name}Config", backbones[part])
        answer = _made_by(lambda kind=kind, config=config: kind(config))
        stack.enter_context(patch.object(code, f"{name}Model", answer))


def _groot_backbones(module: Any) -> Backbones:
    network = module._groot_model
    return {"network": network.config.to_dict(), "vlm": network.backbone.model.config.to_dict()}


def _answer_groot(stack: ExitStack, backbones: Backbones) -> None:
    network = lerobot("policies.groot.groot_n1_7")
    code = lerobot("policies.groot.modeling_groot")
    config = network.GR00TN17Config(**backbones["network"])
    vlm = _config("Qwen3VLConfig", backbones["vlm"])
    stack.enter_context(patch.object(network, "_cosmos_reason2_qwen3_vl_config", lambda: vlm))
    made = _made_by(lambda: network.GR00TN17(config, load_backbone_weights=False))
    stack.enter_context(patch.object(code, "GR00TN17", made))


def _config(name: str, content: Mapping[str, Any]) -> Any:
    transformers = import_module("transformers")  # comes with LeRobot
    return getattr(transformers, name).from_dict(dict(content))


def _answer(value: Any) -> Any:
    """What stands for one of transformers' classes: ``from_pretrained`` gives the value."""
    return SimpleNamespace(from_pretrained=lambda *_, **__: value)


def _made_by(make: Callable[[], nn.Module]) -> Any:
    return SimpleNamespace(from_pretrained=lambda *_, **__: make())


KINDS: Mapping[str, Kind] = {
    "smolvla": Kind(
        "SmolVLA",
        "model.denoise_step",
        _chunk_of_noise,
        noise=_padded_noise,
        backbones=_smolvla_backbones,
        answering=_answer_smolvla,
    ),
    "xvla": Kind("X-VLA", "model.transformer", _chunk),
    "groot": Kind(
        "GR00T N1.7",
        "_groot_model.action_head.model",
        _chunk,
        backbones=_groot_backbones,
        answering=_answer_groot,
    ),
    "multi_task_dit": Kind(
        "a multi-task diffusion transformer",
        "noise_predictor",
        _queued_chunk,
        backbones=_clip_backbones,
        answering=_answer_clip,
    ),
    "act": Kind("ACT", "model", _chunk, random=False),
}
"""Types whose modules are run with their linears replaced, by LeRobot's name."""

UNSUITED: Mapping[str, str] = {
    "diffusion": "Diffusion Policy",
    "tdmpc": "TD-MPC",
}
"""Types with few weights in linears: refused with the share that would be quantized."""

REFUSED: Mapping[str, str] = {
    "pi0_fast": (
        "pi0-FAST decodes its actions with a tokenizer that is code from a hub "
        "(trust_remote_code), and this project runs nothing that comes with a checkpoint"
    ),
}
"""Types that are refused for another reason."""


def kind_of(name: str) -> Kind:
    """What is known of a type.

    Raises:
        PolicyError: it is refused, or nothing is known of it; says why.
    """
    if name in KINDS:
        return KINDS[name]
    if name in REFUSED:
        raise PolicyError(f"LeRobot's type {name!r} is not quantized: {REFUSED[name]}")
    if name in UNSUITED:
        raise PolicyError(
            f"{UNSUITED[name]} (LeRobot's {name!r}) is mostly convolutions, which are not quantized"
        )
    raise PolicyError(
        f"LeRobot's type {name!r} was not tried: those that are run by LeRobot's own code are "
        f"{', '.join(KINDS)}. Another module can be quantized in Python, with "
        "omega_qvla.TorchPolicy (README)"
    )


def run_where(name: str) -> str:
    """What can be done with a policy of this type, as a sentence."""
    if name in KINDS:
        return (
            f"{KINDS[name].title} is run by LeRobot's own code: `omega-qvla quantize` and "
            "omega_qvla.load_policy take it where LeRobot is installed, and lerobot-eval runs the "
            "result (docs/lerobot.md)"
        )
    try:
        kind_of(name)
    except PolicyError as error:
        return str(error)
    raise AssertionError(name)


@contextmanager
def answered(kind: Kind, backbones: Backbones) -> Generator[None, None, None]:
    """Inside the block LeRobot builds policies of this kind without asking a hub.

    What it would fetch is given to it under the names its module has imported; they are its own
    again afterwards.
    """
    with ExitStack() as stack:
        kind.answering(stack, backbones)
        yield
