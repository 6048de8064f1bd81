"""Which LeRobot wrote a pi0 or pi05 checkpoint, and what that release shows the network.

LeRobot changed its processing between releases, and a policy must be run as it was trained:

| | up to 0.4.4 | from 0.5.0 on |
|---|---|---|
| state in the prompt of pi05 | padded with zeros to ``max_state_dim`` | the robot's own numbers |
| bars of an image that is not square | -3 | -1 (black) |

The two pipelines do not tell the release: a fine-tune keeps those of its base.  ``config.json`` is
written anew by each training, with all fields its release has:

| in ``config.json`` | written by |
|---|---|
| no ``use_peft`` | 0.4.0 to 0.4.2 |
| ``use_peft``, no ``use_relative_actions`` | 0.4.3, 0.4.4 or 0.5.0: the user has to say |
| ``use_relative_actions`` | 0.5.1 or later |
| ``pretrained_revision`` | 0.6.0 or later |

Source: the released wheels of LeRobot 0.4.0 to 0.6.1 (``policies/pi0``,
``policies/pi05``, ``configs/policies.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omega_qvla.checkpoints.options import WrittenBy
from omega_qvla.errors import PolicyError
from omega_qvla.policies.processing.images import ImageFit


@dataclass(frozen=True)
class Writer:
    """A release, as far as it matters.

    Attributes:
        pads_state: whether zeros follow the robot's own numbers in the prompt.
        image_fit: how images are fitted into the square (``images.py``).
        evidence: the release and how it is known, for the user.
    """

    pads_state: bool
    image_fit: ImageFit
    evidence: str


def writer_of(content: Mapping[str, Any], said: WrittenBy | None, where: str) -> Writer:
    """The release that wrote a ``config.json``.

    Args:
        content: of ``config.json``.
        said: what the user said of it, or None.
        where: names the file in errors.

    Raises:
        PolicyError: the file does not tell and the user did not say, or the two contradict.
    """
    told, release, because = _told(content)
    if told is None and said is None:
        raise PolicyError(
            f"{where} was written by {release} ({because}). 0.4 and 0.5 show the network "
            "different prompts and images, and nothing in the checkpoint says which it was trained "
            "with: give --written-by lerobot-0.4 (0.4.3, 0.4.4) or --written-by lerobot-0.5 "
            "(0.5.0), in Python CheckpointOptions(written_by=...)"
        )
    if told is not None and said is not None and told != said:
        raise PolicyError(
            f"{where} was written by {release} ({because}), not by {said}: leave --written-by out"
        )
    evidence = f"{release} ({because})" if told else f"{said}, as you said"
    if (told or said) == "lerobot-0.4":
        return Writer(pads_state=True, image_fit="lerobot", evidence=evidence)
    return Writer(pads_state=False, image_fit="lerobot-0.5", evidence=evidence)


def _told(content: Mapping[str, Any]) -> tuple[WrittenBy | None, str, str]:
    """Releases that look different to a network, the release, and the reason."""
    if "pretrained_revision" in content:
        return "lerobot-0.5", "LeRobot 0.6.0 or later", "it has pretrained_revision"
    if "use_relative_actions" in content:
        return "lerobot-0.5", "LeRobot 0.5.1 or later", "it has use_relative_actions"
    if "use_peft" in content:
        because = "it has use_peft and no use_relative_actions"
        return None, "LeRobot 0.4.3, 0.4.4 or 0.5.0", because
    return "lerobot-0.4", "LeRobot 0.4.0 to 0.4.2", "it has no use_peft"
