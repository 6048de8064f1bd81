"""Prompts, and states written into them, as openpi has them (``transforms.py``, ``tokenizer.py``).

A state that is written into the prompt is normalized and becomes integers of 256 equal bins over
[-1, 1]; values below the first bin give -1, as in the original.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STATE_BINS = 256


def discretize_state(normalized: np.ndarray) -> list[int]:
    """Normalized state [n] → bin numbers of 256 equal bins over [-1, 1]; below the range is -1."""
    edges = np.linspace(-1.0, 1.0, STATE_BINS + 1)[:-1]
    return [int(i) for i in np.digitize(normalized, bins=edges) - 1]


def format_prompt(instruction: str, state_bins: Sequence[int] | None) -> str:
    """pi0.5's prompt; without state bins, openpi's plain form ending in a newline."""
    text = instruction.strip().replace("_", " ").replace("\n", " ")
    if state_bins is None:
        return f"{text}\n"
    return f"Task: {text}, State: {' '.join(map(str, state_bins))};\nAction: "
