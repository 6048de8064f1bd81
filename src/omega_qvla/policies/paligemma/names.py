"""openpi's names of the parts of a policy on PaliGemma; checkpoints and the module have them."""

from __future__ import annotations

ROOT = "paligemma_with_expert"
TOWER = f"{ROOT}.paligemma.model.vision_tower"
VISION = f"{TOWER}.vision_model"
PROJECTOR = f"{ROOT}.paligemma.model.multi_modal_projector.linear"
LANGUAGE = f"{ROOT}.paligemma.model.language_model"
BACKBONE_LAYERS = f"{LANGUAGE}.layers"
EMBED_TOKENS = f"{LANGUAGE}.embed_tokens"
HEAD = f"{ROOT}.paligemma.lm_head"
EXPERT = f"{ROOT}.gemma_expert.model"
EXPERT_LAYERS = f"{EXPERT}.layers"
EXPERT_HEAD = f"{ROOT}.gemma_expert.lm_head"
