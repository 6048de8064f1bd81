"""Saves shrunken pi05 and pi0 policies with LeRobot and records what it computes of two views.

Runs in an environment with LeRobot and without this project, with ``tests/helpers`` on its path and
a job on its standard input, see ``lerobot_records.py``.  Every case gets a directory ``OUT/CASE``:
``checkpoint/`` as LeRobot saves it and ``record.safetensors``.

The four parts are one after the other what a robot's loop does; where an older LeRobot's network
does not run in this environment, ``see`` and ``finish`` are its own and ``act`` another's.

* ``save``: the pipelines and ``config.json``;
* ``see``: preprocessing, into ``inputs.safetensors``;
* ``act``: weights and one chunk of each observation, normalized, into ``network.safetensors``;
* ``finish``: postprocessing, and the record.

What is changed in LeRobot: the sizes that it writes in code, where the tokenizer comes from, and,
for older releases, that ``lerobot.policies`` does not import every other policy.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lerobot_cases import (
    ACTION_WIDTH,
    CAMERAS,
    CASES,
    CURRENT,
    HORIZON,
    OLD,
    STATE_WIDTH,
    VOCABULARY,
    Case,
    Policy,
    noise,
    observations,
    statistics,
    weight,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

IMAGES, STATE, ACTION = "observation.images.", "observation.state", "action"
TOKENS, MASK = "observation.language.tokens", "observation.language.attention_mask"


class LeRobot:
    """The modules of the LeRobot that Python finds.

    Args:
        tokenizer: the folder of a stand-in for PaliGemma's tokenizer.
        policy: the type whose modules they are.
    """

    def __init__(self, tokenizer: Path, policy: Policy) -> None:
        import transformers

        import lerobot

        self.version: str = lerobot.__version__
        if self.version != CURRENT:
            policies = types.ModuleType("lerobot.policies")
            policies.__path__ = [str(Path(lerobot.__file__).parent / "policies")]
            sys.modules["lerobot.policies"] = policies
        load = transformers.AutoTokenizer.from_pretrained
        transformers.AutoTokenizer.from_pretrained = staticmethod(
            lambda name, *args, **kwargs: load(tokenizer)
        )
        folder, prefix = f"lerobot.policies.{policy}", policy.upper()
        settings = importlib.import_module(f"{folder}.configuration_{policy}")
        self.config: Any = getattr(settings, f"{prefix}Config")
        self.model: Any = importlib.import_module(f"{folder}.modeling_{policy}")
        self.policy: Any = getattr(self.model, f"{prefix}Policy")
        processor = importlib.import_module(f"{folder}.processor_{policy}")
        self.pipelines: Any = getattr(processor, f"make_{policy}_pre_post_processors")
        if self.version != OLD:  # whose network needs a transformers of its own
            _shrink(self.model)


def _shrink(model: Any) -> None:
    """Small networks, whose sizes LeRobot writes in code."""
    vlm, expert = model.PaliGemmaForConditionalGenerationWithPiGemma, model.PiGemmaForCausalLM

    def small_vlm(config: Any) -> Any:
        text, vision = config.text_config, config.vision_config
        text.vocab_size = config._vocab_size = config.image_token_index = VOCABULARY
        vision.hidden_size, vision.intermediate_size = 64, 72
        vision.num_attention_heads, vision.num_hidden_layers = 2, 2
        vision.projection_dim = text.hidden_size
        return vlm(config)

    def small_expert(config: Any) -> Any:
        config.vocab_size = VOCABULARY
        return expert(config)

    model.get_gemma_config = lambda variant: model.GemmaConfig(64, 2, 128, 8, 1, 16)
    model.PaliGemmaForConditionalGenerationWithPiGemma = small_vlm
    model.PiGemmaForCausalLM = small_expert


def settings(lerobot: LeRobot, case: Case) -> Any:
    """LeRobot's configuration of a case."""
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature

    image = PolicyFeature(FeatureType.VISUAL, (3, case.height, case.width))
    seen = {f"{IMAGES}{camera}": image for camera in CAMERAS}
    seen[STATE] = PolicyFeature(FeatureType.STATE, (STATE_WIDTH,))
    mode = NormalizationMode[case.normalization]
    fields: dict[str, Any] = {
        "input_features": seen,
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (ACTION_WIDTH,))},
        "normalization_mapping": {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": mode,
            "ACTION": mode,
        },
        "chunk_size": HORIZON,
        "n_action_steps": HORIZON,
        "num_inference_steps": case.steps,
        "image_resolution": (case.resolution, case.resolution),
        "empty_cameras": case.empty_cameras,
        "device": "cpu",
    }
    if hasattr(lerobot.config, "use_relative_actions"):
        fields["use_relative_actions"] = case.relative
        fields["action_feature_names"] = case.names and list(case.names)
        if case.relative:
            fields["relative_exclude_joints"] = list(case.exclude)
    config = lerobot.config(**fields)
    config.validate_features()
    # The name of the small variant, which LeRobot's own check of names does not know.
    config.paligemma_variant = config.action_expert_variant = "dummy"
    return config


def save(lerobot: LeRobot, case: Case, directory: Path) -> None:
    """``config.json`` and the pipelines: new ones, or those of the case it is fine-tuned from."""
    config, checkpoint = settings(lerobot, case), directory / "checkpoint"
    checkpoint.mkdir(parents=True)
    moved = {
        feature: {name: torch.from_numpy(value) for name, value in values.items()}
        for feature, values in statistics().items()
    }
    if case.base is None:
        pipelines = lerobot.pipelines(config, dataset_stats=moved)
    else:
        base = directory.parent / case.base / "checkpoint"
        config.pretrained_path = base.name
        pipelines = fine_tuned(config, base, moved)
    config.save_pretrained(checkpoint)
    for pipeline in pipelines:
        pipeline.save_pretrained(checkpoint)


def fine_tuned(config: Any, base: Path, moved: dict[str, Any]) -> tuple[Any, Any]:
    """The pipelines of a base with the overrides that ``lerobot_train.py`` gives."""
    from lerobot.policies.factory import make_pre_post_processors

    modes = config.normalization_mapping
    before: dict[str, Any] = {
        "device_processor": {"device": "cpu"},
        "normalizer_processor": {
            "features": {**config.input_features, **config.output_features},
            "norm_map": modes,
            "stats": moved,
        },
        "rename_observations_processor": {"rename_map": {}},
    }
    after: dict[str, Any] = {
        "unnormalizer_processor": {
            "features": config.output_features,
            "norm_map": modes,
            "stats": moved,
        }
    }
    if config.use_relative_actions:
        before["relative_actions_processor"] = {
            "enabled": True,
            "exclude_joints": config.relative_exclude_joints,
            "action_names": config.action_feature_names,
        }
        after["absolute_actions_processor"] = {"enabled": True}
    return make_pre_post_processors(
        config, str(base), preprocessor_overrides=before, postprocessor_overrides=after
    )


def pipelines_of(checkpoint: Path) -> tuple[Any, Any]:
    """Both pipelines, read back by LeRobot from what it saved, and joined as its factory does."""
    from lerobot.processor import PolicyProcessorPipeline
    from lerobot.processor import converters as to

    before = PolicyProcessorPipeline.from_pretrained(
        checkpoint,
        config_filename="policy_preprocessor.json",
        to_transition=to.batch_to_transition,
        to_output=to.transition_to_batch,
    )
    after = PolicyProcessorPipeline.from_pretrained(
        checkpoint,
        config_filename="policy_postprocessor.json",
        to_transition=to.policy_action_to_transition,
        to_output=to.transition_to_policy_action,
    )
    relative = [step for step in before.steps if hasattr(step, "exclude_joints")]
    for step in after.steps:
        if relative and hasattr(step, "relative_step"):
            step.relative_step = relative[0]
    return before, after


def batch_of(case: Case) -> dict[str, Any]:
    """The observations as LeRobot gets them: one batch, images in [0, 1], channels first."""
    seen = observations(case)
    batch: dict[str, Any] = {
        f"{IMAGES}{camera}": torch.stack(
            [torch.from_numpy(o["images"][camera]).permute(2, 0, 1) / 255.0 for o in seen]
        )
        for camera in CAMERAS
    }
    batch[STATE] = torch.from_numpy(np.stack([o["state"] for o in seen]))
    batch["task"] = [o["prompt"] for o in seen]
    return batch


def see(lerobot: LeRobot, case: Case, directory: Path) -> None:
    """What the network is shown."""
    before, _ = pipelines_of(directory / "checkpoint")
    batch = before(batch_of(case))
    eyes = SimpleNamespace(
        config=settings(lerobot, case), parameters=lambda: iter([torch.zeros(1)])
    )
    pixels, present = lerobot.policy._preprocess_images(eyes, batch)
    shown = {
        "pixels": torch.stack(pixels, dim=1),
        "cameras": torch.stack(present, dim=1),
        "tokens": batch[TOKENS],
        "mask": batch[MASK].bool(),
        "state": batch[STATE],
    }
    save_file({key: value.contiguous() for key, value in shown.items()}, directory / "inputs")


def act(lerobot: LeRobot, case: Case, directory: Path) -> None:
    """Random weights saved with LeRobot's ``save_pretrained``, and normalized chunks."""
    policy = lerobot.policy(settings(lerobot, case)).eval()
    with torch.no_grad():
        for name, tensor in policy.state_dict().items():
            drawn = weight(name.removeprefix("model."), tuple(tensor.shape))
            tensor.copy_(torch.from_numpy(drawn))
    with tempfile.TemporaryDirectory(dir=directory) as whole:  # its config.json is this release's
        policy.save_pretrained(whole)
        weights = Path(whole) / "model.safetensors"
        weights.replace(directory / "checkpoint" / "model.safetensors")
    shown = load_file(directory / "inputs")
    # Not through predict_action_chunk, which would fit the images again, by this release's code.
    state = [policy.prepare_state({STATE: shown["state"]})] if case.policy == "pi0" else []
    chunk = policy.model.sample_actions(
        list(shown["pixels"].unbind(1)),
        list(shown["cameras"].unbind(1)),
        shown["tokens"],
        shown["mask"],
        *state,
        noise=torch.from_numpy(noise()),
    )
    save_file({"chunk": chunk[..., :ACTION_WIDTH].contiguous()}, directory / "network")


def finish(lerobot: LeRobot, case: Case, directory: Path) -> None:
    """Actions in the robot's units, and the record."""
    before, after = pipelines_of(directory / "checkpoint")
    before(batch_of(case))  # the state that relative actions are added to
    chunk = load_file(directory / "network")["chunk"]
    record: dict[str, Tensor] = {
        **load_file(directory / "inputs"),
        "chunk": chunk,
        "actions": after(chunk.clone()),
    }
    tensors = {key: value.contiguous() for key, value in record.items()}
    versions = json.dumps({"lerobot": lerobot.version, "torch": torch.__version__})
    save_file(tensors, directory / "record.safetensors", metadata={"versions": versions})


PARTS: dict[str, Callable[[LeRobot, Case, Path], None]] = {
    "save": save,
    "see": see,
    "act": act,
    "finish": finish,
}


def hugging_face_tokenizer(model: Path, out: Path) -> None:
    """A sentencepiece model as the tokenizer that transformers makes of PaliGemma's.

    transformers keeps pairs to merge instead of scores: the pair of pieces that makes a piece, by
    the piece's rank.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers.processors import TemplateProcessing
    from transformers import AddedToken, GemmaTokenizer

    pieces = SentencePieceProcessor(model_file=str(model))
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = [
        (rank, vocabulary[left], vocabulary[right], left, right)
        for piece, rank in vocabulary.items()
        if len(piece) > 1 and not piece.startswith("<")
        for k in range(1, len(piece))
        if (left := piece[:k]) in vocabulary and (right := piece[k:]) in vocabulary
    ]
    made = GemmaTokenizer(vocab=vocabulary, merges=[pair[3:] for pair in sorted(merges)])
    made.add_tokens([AddedToken("\n", normalized=False, special=False)])
    made._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", pieces.bos_id())]
    )
    text = "Task: put the red mug on the plate, State: 128 0 255 -1;\nAction: "
    if made(text)["input_ids"] != [pieces.bos_id(), *pieces.encode(text)]:
        raise SystemExit(f"{model} becomes another tokenizer in transformers")
    made.save_pretrained(out)


def main(job: dict[str, Any]) -> None:
    """Do the parts of a job for its cases, in the order of ``CASES``."""
    torch.set_num_threads(1)
    out = Path(job["out"])
    tokenizer = out / "tokenizer"
    if not tokenizer.exists():
        hugging_face_tokenizer(Path(job["tokenizer"]), tokenizer)
    found: dict[str, LeRobot] = {}
    for case in CASES:
        if case.name in job["cases"]:
            lerobot = found.get(case.policy) or LeRobot(tokenizer, case.policy)
            found[case.policy] = lerobot
            for part in job["parts"]:
                PARTS[part](lerobot, case, out / case.name)
            done = ", ".join(job["parts"])
            print(f"{case.name}: {done} by LeRobot {lerobot.version}", flush=True)


if __name__ == "__main__":
    main(json.load(sys.stdin))
