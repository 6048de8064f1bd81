"""What fixes the shape and the conventions of a GR00T N1.5 policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from omega_qvla.errors import PolicyError
from omega_qvla.policies.layers.qwen3 import QwenConfig
from omega_qvla.policies.layers.siglip import VisionConfig

EMBODIMENTS = 32
"""Matrices per embodiment-specific layer in an official checkpoint."""


class TransformerConfig(BaseModel):
    """Sizes of a transformer whose feed-forward layers are four times as wide inside."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    width: int
    heads: int
    depth: int


class PromptTemplate(BaseModel):
    """How images and instruction become one text.

    Attributes:
        text: with ``{images}`` and ``{instruction}``.
        image: what stands for each image: ``{number}`` counts from 1, ``{tokens}`` is where the
            image tokens go.
        instruction: ``listed`` writes it as a Python list of one text, brackets and quotes
            included: that is what Isaac-GR00T's inference and LeRobot's processor make of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str
    image: str
    instruction: Literal["plain", "listed"] = "plain"

    @model_validator(mode="after")
    def _places_must_be_there(self) -> PromptTemplate:
        for template, names in ((self.text, ("images", "instruction")), (self.image, ("tokens",))):
            for name in names:
                if template.count(f"{{{name}}}") != 1:
                    raise ValueError(f"{template!r} must hold {{{name}}} exactly once")
        return self

    def pieces(self, instruction: str, images: int) -> list[str]:
        """The text before, between and after the tokens of the images: ``images`` + 1 pieces."""
        shown = str([instruction]) if self.instruction == "listed" else instruction
        before, after = (
            part.replace("{instruction}", shown) for part in self.text.split("{images}")
        )
        pieces = [before]
        for number in range(1, images + 1):
            ahead, behind = self.image.replace("{number}", str(number)).split("{tokens}")
            pieces[-1] += ahead
            pieces.append(behind)
        pieces[-1] += after
        return pieces


CHAT_PROMPT = PromptTemplate(
    text=(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n{images}{instruction}<|im_end|>\n<|im_start|>assistant\n"
    ),
    image="<image {number}><img>{tokens}</img>",
)
"""What the published backbone was trained on: Qwen's chat format, images first."""

PLAIN_PROMPT = PromptTemplate(text="{images}{instruction}", image="{tokens}")
"""For policies trained from nothing."""


class Gr00tN15Config(BaseModel):
    """Everything that fixes the shape and the conventions of a GR00T N1.5 policy.

    Attributes:
        backbone: the language model, as deep as it is used.
        features: the self-attention blocks between backbone and action head.
        head: the diffusion transformer.
        head_hidden: inner width of the state encoder and the action decoder.
        future_tokens: learned tokens between the state and the actions.
        positions: rows of the action tokens' position table.
        image_token: token id that holds a place for an image token.
        action_dim, state_width: widths the network sees, padded with zeros.
        robot_action_dim, state_dim: how many of those belong to the robot.
        embodiments: the embodiment ids whose layers are kept, in the order they are stacked.
        embodiment: the one that acts.
        cameras: image names in the order their tokens enter the prompt.
        image_crop: share of each side that is kept, in the middle, before resizing.
        image_filter: ``bilinear`` as Isaac-GR00T, ``bicubic`` (and no crop) as LeRobot.
        prompt: how images and instruction become one text.
        prompt_length: maximum number of text tokens; longer prompts are refused.
        steps: default number of denoising steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    family: Literal["gr00t_n15"] = "gr00t_n15"
    vision: VisionConfig
    backbone: QwenConfig
    features: TransformerConfig
    head: TransformerConfig
    head_hidden: int
    future_tokens: int
    positions: int
    vocabulary: int
    image_token: int
    horizon: int
    action_dim: int
    robot_action_dim: int
    state_width: int
    state_dim: int
    embodiments: tuple[int, ...]
    embodiment: int
    cameras: tuple[str, ...]
    image_crop: float = Field(default=1.0, gt=0.0, le=1.0)
    image_filter: Literal["bilinear", "bicubic"] = "bilinear"
    prompt: PromptTemplate
    prompt_length: int
    steps: int = 4

    @model_validator(mode="after")
    def _parts_must_fit(self) -> Gr00tN15Config:
        if self.features.width != self.backbone.width:
            raise ValueError("the feature layers read the backbone: widths must be the same")
        if self.embodiment not in self.embodiments:
            raise ValueError(
                f"embodiment {self.embodiment} is not among the kept {list(self.embodiments)}"
            )
        if len(set(self.embodiments)) != len(self.embodiments):
            raise ValueError("an embodiment is kept twice")
        if not 0 <= self.image_token < self.vocabulary:
            raise ValueError("image_token must be a token of the vocabulary")
        if self.horizon > self.positions:
            raise ValueError(f"no more than {self.positions} actions have a position")
        if self.robot_action_dim > self.action_dim or self.state_dim > self.state_width:
            raise ValueError("the robot's action or state is wider than the network's")
        return self

    @classmethod
    def full(
        cls,
        *,
        cameras: tuple[str, ...] = ("ego_view",),
        embodiments: tuple[int, ...] = tuple(range(EMBODIMENTS)),
        embodiment: int = 31,
        state_dim: int = 64,
        robot_action_dim: int = 32,
        steps: int = 4,
    ) -> Gr00tN15Config:
        """The published policy of 2.4 B parameters; 31 is the embodiment for new robots."""
        return cls(
            vision=VisionConfig(width=1152, hidden=4304, heads=16, depth=27, image_size=224),
            backbone=QwenConfig(
                width=2048, hidden=6144, heads=16, kv_heads=8, head_dim=128, depth=12
            ),
            features=TransformerConfig(width=2048, heads=32, depth=4),
            head=TransformerConfig(width=1536, heads=32, depth=16),
            head_hidden=1024,
            future_tokens=32,
            positions=1024,
            vocabulary=151680,
            image_token=151669,
            horizon=16,
            action_dim=32,
            robot_action_dim=robot_action_dim,
            state_width=64,
            state_dim=state_dim,
            embodiments=embodiments,
            embodiment=embodiment,
            cameras=cameras,
            image_crop=0.95,
            prompt=CHAT_PROMPT,
            prompt_length=512,
            steps=steps,
        )

    @classmethod
    def libero(cls) -> Gr00tN15Config:
        """The published policy as it runs LIBERO: two cameras, 8 steps, one embodiment kept."""
        return cls.full(
            cameras=("image", "wrist_image"),
            embodiments=(31,),
            state_dim=8,
            robot_action_dim=7,
            steps=8,
        )

    @classmethod
    def tiny(cls, vocabulary: int, *, horizon: int = 10, action_dim: int = 4) -> Gr00tN15Config:
        """The same graph with about 5 M parameters: two 84-pixel cameras, one embodiment.

        The image token is the tokenizer's ``<pad>``, number 0, which no text contains.
        """
        return cls(
            vision=VisionConfig(width=192, hidden=384, heads=3, depth=4, image_size=84),
            backbone=QwenConfig(width=192, hidden=512, heads=4, kv_heads=2, head_dim=64, depth=4),
            features=TransformerConfig(width=192, heads=3, depth=1),
            head=TransformerConfig(width=128, heads=4, depth=6),
            head_hidden=128,
            future_tokens=8,
            positions=32,
            vocabulary=vocabulary,
            image_token=0,
            horizon=horizon,
            action_dim=action_dim,
            robot_action_dim=action_dim,
            state_width=4,
            state_dim=4,
            embodiments=(0,),
            embodiment=0,
            cameras=("base", "wrist"),
            prompt=PLAIN_PROMPT,
            prompt_length=32,
        )

    @property
    def tokens_per_image(self) -> int:
        return self.vision.tokens_per_image

    @property
    def embodiment_row(self) -> int:
        """Where the acting embodiment's matrices are in the stacks."""
        return self.embodiments.index(self.embodiment)

    @property
    def norms(self) -> int:
        """Adaptive norms of the head: one per block and the final one."""
        return self.head.depth + 1

    def keeping(self, embodiments: Sequence[int], embodiment: int | None = None) -> Gr00tN15Config:
        """The same policy with fewer embodiments.

        Raises:
            PolicyError: one of them is not there, or none is left to act.
        """
        missing = sorted(set(embodiments) - set(self.embodiments))
        acting = self.embodiment if embodiment is None else embodiment
        if missing or acting not in embodiments:
            raise PolicyError(
                f"embodiments {list(embodiments)} with {acting} acting: the policy has "
                f"{list(self.embodiments)}, and the acting one must be kept"
            )
        changes = {"embodiments": tuple(embodiments), "embodiment": acting}
        return Gr00tN15Config.model_validate({**self.model_dump(), **changes})
