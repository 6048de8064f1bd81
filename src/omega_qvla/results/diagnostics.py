"""What a quantized policy looks like from inside, and what the robot did with it.

``times``, ``error`` and the like have one value per denoising step, or just one where a site runs
once per chunk.  x is the input of a site in full precision, y its output, x' = x T the transformed
input; numbers keep five significant digits.
"""

from __future__ import annotations

import base64
import binascii
from typing import Literal

from pydantic import Field, field_validator, model_validator

from omega_qvla.results.document import Count, Document, Measured, Number, Part
from omega_qvla.results.memory import Memory

MAX_FRAME_BYTES = 512 * 2**10
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"

Position = tuple[Number, Number, Number]


class Site(Part):
    """One quantized site.

    Attributes:
        name, component: which it is, and the part of the policy it belongs to.
        per_step: whether it runs once per denoising step.
        in_features, out_features: its size.
        times: flow time of each step, descending; null where the site runs once.
        error: squared error of the output inside the quantized policy, over that of y; at most 64
            evenly spaced rows of each call. Null where y is zero.
        local_error: the same for the site alone, fed with full precision's own x.
        absmax, rms: largest magnitude and root mean square of x.
        transformed_absmax, transformed_rms: of x'.
        limit: largest magnitude that the static scale represents; null for other scales.
    """

    name: str
    component: str
    per_step: bool
    in_features: Count
    out_features: Count
    times: list[Number] | None
    error: list[Measured | None]
    local_error: list[Measured | None]
    absmax: list[Measured]
    rms: list[Measured]
    transformed_absmax: list[Measured]
    transformed_rms: list[Measured]
    limit: list[Measured] | None

    @model_validator(mode="after")
    def _is_complete(self) -> Site:
        lists = (self.error, self.local_error, self.absmax, self.rms)
        lists = (*lists, self.transformed_absmax, self.transformed_rms)
        given = [values for values in (*lists, self.limit, self.times) if values is not None]
        if not self.error or len({len(values) for values in given}) > 1:
            raise ValueError(f"{self.name}: one value per denoising step is wanted everywhere")
        return self

    @property
    def worst(self) -> float | None:
        """The largest error at this site, over steps."""
        return max((value for value in self.error if value is not None), default=None)

    @property
    def worst_local(self) -> float | None:
        """The largest error that this site itself adds, over steps."""
        return max((value for value in self.local_error if value is not None), default=None)


class Profile(Part):
    """Largest magnitudes by channel at one site.

    Attributes:
        site, component: as of the site.
        channels, transformed_channels: how many x and x' have.
        before, after: largest magnitude of every channel of x and of x', over all observations and
            steps. With more than 256 channels neighbours share a bin, which holds the largest.
    """

    site: str
    component: str
    channels: Count
    transformed_channels: Count
    before: list[Measured] = Field(min_length=1)
    after: list[Measured] = Field(min_length=1)


class Track(Part):
    """The path of the hand in one episode.

    Attributes:
        recipe: `fp32` or the recipe.
        task, seed: the episode.
        success: whether it was solved.
        steps: control steps.
        positions: [steps + 1, 3] of the hand in metres, before the first action and after each.
    """

    recipe: str
    task: str
    seed: int
    success: bool
    steps: Count
    positions: list[Position] = Field(min_length=1)


class Frame(Part):
    """One picture of a film.

    Attributes:
        step: control steps before it.
        png: the picture in base64.
    """

    step: Count
    png: str

    @field_validator("png")
    @classmethod
    def _is_a_picture(cls, text: str) -> str:
        try:
            content = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"not base64: {error}") from error
        if len(content) > MAX_FRAME_BYTES:
            raise ValueError(f"a picture of {len(content)} bytes; at most {MAX_FRAME_BYTES}")
        if not content.startswith((_PNG, _JPEG)):
            raise ValueError("neither PNG nor JPEG")
        return text

    @property
    def url(self) -> str:
        """The picture as a data URI."""
        kind = "jpeg" if self.png.startswith("/9j/") else "png"
        return f"data:image/{kind};base64,{self.png}"


class Film(Part):
    """Pictures of one episode: the first that ends differently, or the first of all.

    Attributes:
        recipe, task, seed, success: as of a track.
        frames: from the first moment to the last.
    """

    recipe: str
    task: str
    seed: int
    success: bool
    frames: list[Frame]


class Rollouts(Part):
    """Episodes of full precision and of the recipe, on the same seeds.

    Attributes:
        environment: the simulator, `module:callable`.
        execute: actions carried out of each chunk.
        episodes: of every policy, task and seed.
        films: of one episode.
    """

    environment: str
    execute: Count
    episodes: list[Track]
    films: list[Film]


class Diagnostics(Document):
    """One recipe under one condition.

    Attributes:
        kind: `diagnostics`.
        library: version that wrote it.
        policy, recipe, recipe_hash, scope, condition, realizable: as in a row.
        observations: held-out observations behind all figures but `rollouts`.
        action_error, noise_floor: as in a row, over these observations.
        sites: every quantized site, in execution order.
        profiles: the sites of each component with the worst outliers.
        memory: tensors only; null for a simulation.
        rollouts: the episodes; null without a simulator or with `--episodes 0`.
    """

    kind: Literal["diagnostics"]
    library: str
    policy: str
    recipe: str
    recipe_hash: str
    scope: str
    condition: str
    realizable: bool
    observations: Count
    action_error: Measured
    noise_floor: Measured
    sites: list[Site] = Field(min_length=1)
    profiles: list[Profile]
    memory: Memory | None
    rollouts: Rollouts | None
