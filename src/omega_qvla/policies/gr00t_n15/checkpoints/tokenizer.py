"""Finding the tokenizer of GR00T's backbone, which a checkpoint does not contain."""

from __future__ import annotations

from pathlib import Path

from omega_qvla.checkpoints.files import read_bytes
from omega_qvla.checkpoints.hub import cached_file
from omega_qvla.errors import PolicyError
from omega_qvla.policies.processing.published_tokenizers import QWEN_FILES, QwenTokenizer

ASSETS = "lerobot/eagle2hg-processor-groot-n1p5"
"""Where LeRobot keeps vocabulary and merges."""

IMAGE_TOKEN = "<IMG_CONTEXT>"


def qwen_tokenizer(directory: Path, given: Path | None, assets: str = ASSETS) -> QwenTokenizer:
    """The tokenizer that was given, or is in the directory, or in the hub's cache on this machine.

    Args:
        directory: the policy directory.
        given: a directory with Qwen's files, as the user named it.
        assets: the repository that the checkpoint names.

    Raises:
        PolicyError: it is in none of them (the message says how to get it), or is invalid.
        ResourceError: tokenizers is not installed.
    """
    for place in (directory,) if given is None else (given,):
        if given is not None or all((place / name).exists() for name in QWEN_FILES):
            return QwenTokenizer({n: read_bytes(place, n) for n in QWEN_FILES}, str(place))
    cached = [cached_file(assets, name) for name in QWEN_FILES]
    if all(path is not None for path in cached):
        contents = [path.read_bytes() for path in cached if path is not None]
        return QwenTokenizer(dict(zip(QWEN_FILES, contents, strict=True)), assets)
    raise PolicyError(
        f"{directory} has no {', '.join(QWEN_FILES)}, the tokenizer of GR00T's backbone. Get them "
        f"with\nhf download {assets} {' '.join(QWEN_FILES)} --local-dir {directory}"
        "\nor from Isaac-GR00T's gr00t/model/backbone/eagle2_hg_model"
    )
