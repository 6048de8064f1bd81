"""Saves shrunken policies as openpi's JAX trainer does and records what openpi computes with them.

Runs in an environment with openpi and without this project: ``record.py OPENPI OUT [CASE ..]``,
the first being a clone of openpi.  Every case of ``openpi_cases.py`` gets a directory ``OUT/CASE``:
the step as the trainer saves it, ``training.json`` and ``record.safetensors``.

What is changed in openpi: the sizes that it writes in code (vision tower, vocabulary, images, and
the Gemmas but for ``dummy``), where the tokenizer comes from, and that data sets and training
configurations, which need a LeRobot of their own, are not imported.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
OPENPI, OUT = (Path(argument).resolve() for argument in sys.argv[1:3])
sys.path[:0] = [
    str(HERE.parent / "helpers"),
    str(OPENPI / "src"),
    str(OPENPI / "packages" / "openpi-client" / "src"),
]
for absent in ("openpi.training.data_loader", "openpi.training.config"):
    sys.modules[absent] = types.ModuleType(absent)

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import openpi.models.gemma as gemma
import openpi.models.lora as lora
import openpi.models.model as model_lib
import openpi.models.siglip as siglip
import openpi.models_pytorch.gemma_pytorch as gemma_pytorch
import openpi.models_pytorch.preprocessing_pytorch as preprocessing_pytorch
import openpi.shared.nnx_utils as nnx_utils
import openpi.shared.normalize as normalize
import openpi.training.checkpoints as checkpoints
import openpi.training.optimizer as optimizer
import openpi.training.utils as training_utils
import openpi.transforms as transforms
import orbax.checkpoint as ocp
import sentencepiece
import torch
from flax import traverse_util
from openpi.models.model import ModelType
from openpi.models.pi0_config import Pi0Config
from openpi.models.tokenizer import PaligemmaTokenizer
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
from openpi_cases import (
    ACTION_DIM,
    ASSET,
    BACKBONE,
    CAMERAS,
    CASES,
    EXPERT,
    HEADS,
    HORIZON,
    IMAGE,
    PATCH,
    PROMPT_LENGTH,
    PROMPTS,
    ROBOT,
    STATE,
    STEP,
    TOKENIZER,
    VISION,
    VOCABULARY,
    Case,
)
from safetensors.numpy import save_file

PUBLISHED_GEMMA = gemma.get_config


def shrink(case: Case) -> None:
    """Put the sizes of a case in the place of openpi's."""
    gemma.PALIGEMMA_VOCAB_SIZE = VOCABULARY
    siglip.decode_variant = lambda variant: {**VISION, "patch_size": (PATCH, PATCH)}
    model_lib.IMAGE_RESOLUTION = (IMAGE, IMAGE)
    for function in (
        model_lib.preprocess_observation,
        preprocessing_pytorch.preprocess_observation_pytorch,
    ):
        function.__kwdefaults__["image_resolution"] = (IMAGE, IMAGE)

    def configured(variant: str) -> gemma.Config:
        part = "expert" if variant.startswith("expert") else "backbone"
        if not case.gemmas:
            config = PUBLISHED_GEMMA("dummy")
        else:
            config = gemma.Config(**(EXPERT if part == "expert" else BACKBONE), **HEADS)
        loras = {k: lora.LoRAConfig(**v) for k, v in case.loras.get(part, {}).items()}
        return dataclasses.replace(config, lora_configs=loras)

    gemma.get_config = configured


def configuration(case: Case) -> Pi0Config:
    """The model's configuration; the names say to openpi which parts are frozen."""
    variants = {
        part: f"{part}_lora" if part in case.loras else part for part in ("backbone", "expert")
    }
    return Pi0Config(
        dtype="float32",
        paligemma_variant=variants["backbone"],
        action_expert_variant=variants["expert"],
        action_dim=ACTION_DIM,
        action_horizon=HORIZON,
        max_token_len=PROMPT_LENGTH,
        pi05=not case.pi0,
        discrete_state_input=None if case.pi0 else case.state_in_prompt,
        pytorch_compile_mode=None,
    )


def drawn(params: nnx.State) -> nnx.State:
    """The same parameters with values everywhere: openpi starts some, and all adapters' halves, at
    zero or next to it."""
    generator = np.random.default_rng(0)
    flat = params.flat_state()
    values = {}
    for path, variable in sorted(flat.items(), key=lambda item: str(item[0])):
        shape, name = variable.value.shape, str(path[-1])
        spread = 0.3 if len(shape) < 3 and "kernel" not in name else max(shape[-3:-1]) ** -0.5
        if "lora" in name:
            spread = 0.2  # the product is then about as large as the weight
        value = generator.uniform(-1, 1, shape) * np.sqrt(3.0) * spread
        if name == "scale" and "img" in path:
            value = value + 1.0
        values[path] = variable.replace(jnp.asarray(value, variable.value.dtype))
    return nnx.State.from_flat_path(values)


def statistics() -> dict[str, normalize.NormStats]:
    """Of a robot, one dimension of which never moves."""
    generator = np.random.default_rng(1)
    found = {}
    for name, width in (("state", STATE), ("actions", ROBOT)):
        low = generator.normal(size=width) - 1.0
        high = low + generator.uniform(0.5, 3.0, width)
        high[1] = low[1]
        mean, std = (low + high) / 2, (high - low) / 4
        found[name] = normalize.NormStats(mean=mean, std=std, q01=low, q99=high)
    return found


def save(case: Case, config: Pi0Config, directory: Path) -> Path:
    """A step of training that ended before it began, by openpi's own functions."""
    model = config.create(jax.random.key(0))
    params = drawn(nnx.state(model))
    freeze = config.get_freeze_filter()
    if case.dtype == "bfloat16":
        freeze = nnx.Not(nnx_utils.PathRegex(".*lora.*"))
    params = nnx_utils.state_map(
        params, freeze, lambda p: p.replace(p.value.astype(jnp.dtype(case.dtype)))
    )
    tx = optimizer.create_optimizer(optimizer.AdamW(), optimizer.CosineDecaySchedule())
    state = training_utils.TrainState(
        step=STEP,
        params=jax.tree.map(lambda p: p + 1, params) if case.average else params,
        model_def=nnx.graphdef(model),
        opt_state=tx.init(params.filter(nnx.Param)),
        tx=tx,
        ema_decay=0.99 if case.average else None,
        ema_params=params if case.average else None,
    )
    manager, _ = checkpoints.initialize_checkpoint_dir(
        directory, keep_period=None, overwrite=True, resume=False
    )
    if case.orbax:
        manager = ocp.CheckpointManager(
            directory,
            item_handlers={
                "assets": checkpoints.CallbackHandler(),
                "train_state": ocp.PyTreeCheckpointHandler(),
                "params": ocp.PyTreeCheckpointHandler(**case.orbax),
            },
            options=ocp.CheckpointManagerOptions(create=False),
        )
    data = types.SimpleNamespace(norm_stats=statistics(), asset_id=ASSET)
    loader = types.SimpleNamespace(data_config=lambda: data)
    checkpoints.save_state(manager, state, loader, STEP)
    manager.wait_until_finished()
    manager.close()
    return directory / str(STEP)


def observed(case: Case, config: Pi0Config) -> dict[str, np.ndarray]:
    """Two observations of the robot, and openpi's inputs of them."""
    generator = np.random.default_rng(2)
    images = generator.integers(0, 256, (len(PROMPTS), 3, IMAGE, IMAGE, 3), dtype=np.uint8)
    states = generator.normal(size=(len(PROMPTS), STATE)).astype(np.float32)
    noise = generator.normal(size=(len(PROMPTS), HORIZON, ACTION_DIM)).astype(np.float32)
    tokenizer = object.__new__(PaligemmaTokenizer)
    tokenizer._max_len = PROMPT_LENGTH
    tokenizer._tokenizer = sentencepiece.SentencePieceProcessor(model_proto=TOKENIZER.read_bytes())
    transform = transforms.compose(
        [
            transforms.Normalize(statistics(), use_quantiles=config.model_type != ModelType.PI0),
            transforms.ResizeImages(IMAGE, IMAGE),
            transforms.TokenizePrompt(tokenizer, discrete_state_input=config.discrete_state_input),
            transforms.PadStatesAndActions(ACTION_DIM),
        ]
    )
    if not case.right:
        images[:, 2] = 0
    inputs = [
        transform(
            {
                "state": state,
                "image": dict(zip(CAMERAS, pictures, strict=True)),
                "image_mask": dict.fromkeys(CAMERAS, np.True_) | {CAMERAS[2]: np.bool_(case.right)},
                "prompt": np.asarray(prompt),
            }
        )
        for state, pictures, prompt in zip(states, images, PROMPTS, strict=True)
    ]
    batch = jax.tree.map(lambda *parts: np.stack(parts), *inputs)
    flat = traverse_util.flatten_dict(batch, sep=".")
    return {
        "images": images,
        "states": states,
        "noise": noise,
        **{f"in.{k}": v for k, v in flat.items()},
    }


def inputs_of(record: dict[str, np.ndarray]) -> dict[str, Any]:
    flat = {k.removeprefix("in."): np.array(v) for k, v in record.items() if k.startswith("in.")}
    return traverse_util.unflatten_dict(flat, sep=".")


def robot_units(config: Pi0Config, chunks: np.ndarray) -> np.ndarray:
    """What openpi's server sends of a robot whose actions are not converted."""
    quantiles = config.model_type != ModelType.PI0
    back = transforms.Unnormalize(statistics(), use_quantiles=quantiles)
    states = np.zeros((len(chunks), STATE))
    return np.stack(
        [
            back({"actions": chunk, "state": state})["actions"][:, :ROBOT]
            for chunk, state in zip(np.asarray(chunks, np.float64), states, strict=True)
        ]
    )


def in_jax(config: Pi0Config, step: Path, record: dict[str, np.ndarray]) -> np.ndarray:
    params = model_lib.restore_params(step / "params", dtype=jnp.float32)
    model = config.load(params)
    inputs = jax.tree.map(jnp.asarray, inputs_of(record))
    observation = model_lib.Observation.from_dict(inputs)
    noise = jnp.asarray(record["noise"])
    return np.asarray(model.sample_actions(jax.random.key(0), observation, noise=noise))


def in_pytorch(config: Pi0Config, step: Path, record: dict[str, np.ndarray]) -> np.ndarray:
    """openpi's PyTorch model with the weights that openpi's converter makes."""
    spec = importlib.util.spec_from_file_location(
        "converter", OPENPI / "examples" / "convert_jax_model_to_pytorch.py"
    )
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    backbone, expert = (gemma.get_config(v) for v in ("backbone", "expert"))
    params = converter.slice_initial_orbax_checkpoint(str(step), "float32")
    paligemma = types.SimpleNamespace(
        vision_config=types.SimpleNamespace(
            hidden_size=VISION["width"], num_hidden_layers=VISION["depth"]
        ),
        text_config=types.SimpleNamespace(
            hidden_size=backbone.width,
            num_hidden_layers=backbone.depth,
            num_attention_heads=backbone.num_heads,
            head_dim=backbone.head_dim,
            intermediate_size=backbone.mlp_dim,
        ),
    )
    weights, rest = converter.slice_paligemma_state_dict(params["paligemma_params"], paligemma)
    weights |= converter.slice_gemma_state_dict(
        rest, expert, num_expert=1, checkpoint_dir=config.model_type.value, pi05=config.pi05
    )
    for key, layer in params["projection_params"].items():
        if key == "PaliGemma":
            continue
        weights[f"{key}.weight"] = torch.from_numpy(np.array(layer["kernel"])).T
        weights[f"{key}.bias"] = torch.from_numpy(np.array(layer["bias"]))
    original = gemma_pytorch.PaliGemmaForConditionalGeneration

    def smaller(config: Any) -> Any:
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size = VISION["width"], VISION["mlp_dim"]
        vision.num_hidden_layers, vision.num_attention_heads = VISION["depth"], VISION["num_heads"]
        vision.image_size, vision.patch_size = IMAGE, PATCH
        vision.projection_dim = config.projection_dim = backbone.width
        vision.num_image_tokens = (IMAGE // PATCH) ** 2
        config._vocab_size = config.image_token_index = VOCABULARY
        config.text_config.vocab_size = VOCABULARY
        return original(config=config)

    gemma_pytorch.PaliGemmaForConditionalGeneration = smaller
    try:
        model = PI0Pytorch(config).eval()
    finally:
        gemma_pytorch.PaliGemmaForConditionalGeneration = original
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("lm_head" in name for name in missing), (missing, unexpected)
    torch.set_float32_matmul_precision("highest")
    inputs = jax.tree.map(torch.from_numpy, inputs_of(record))
    observation = model_lib.Observation.from_dict(inputs)
    noise = torch.from_numpy(record["noise"])
    return model.sample_actions("cpu", observation, noise=noise).numpy()


def main() -> None:
    for case in CASES:
        if sys.argv[3:] and case.name not in sys.argv[3:]:
            continue
        folder = OUT / case.name
        shutil.rmtree(folder, ignore_errors=True)
        shrink(case)
        config = configuration(case)
        step = save(case, config, folder)
        record = observed(case, config)
        chunks = {"jax": in_jax(config, step, record)}
        if case.converts:
            chunks["pytorch"] = in_pytorch(config, step, record)
        for name, chunk in chunks.items():
            record |= {f"chunk.{name}": chunk, f"actions.{name}": robot_units(config, chunk)}
        kept = {
            k: np.ascontiguousarray(v) for k, v in record.items() if not k.startswith("in.image")
        }
        save_file(kept, folder / "record.safetensors")
        (folder / "training.json").write_text(json.dumps(case.training))
        print(case.name, {k: float(np.abs(v).max()) for k, v in chunks.items()}, flush=True)


if __name__ == "__main__":
    main()
