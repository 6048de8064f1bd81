"""Recipes: which maths is applied where, as one typed, hashable value.

A recipe names, for each component of a policy, a *scheme*: the transform of the input space, how
weights are rounded, how activations are scaled.  Every method in the library, the baselines
included, is a recipe made of the same parts.

A scheme is **realizable** when its integers can be multiplied as they are stored: an activation
scale may be constant over the whole contraction (one number per token, per step or per tensor),
never differ along it.  ``omega-paper`` puts one scale on every input channel and is therefore a
simulation; ``realizable`` says so and saving it is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from omega_qvla.errors import RecipeError, did_you_mean

Scope = Literal["all", "paper"]

COMPONENTS = ("vision", "projector", "backbone", "action_head")
DEFAULT_RECIPE = "omega-w4a4"
"""What is taken when none is named: of the four-bit methods the one with the lowest action error on
what calibration saw that also stands what it did not see (docs/methods.md)."""
_METHODS, _ABLATIONS = "recipes", "recipes/ablations"
"""Folders of the package that hold the built-in recipes."""


class Site(Protocol):
    """What a recipe asks of a quantization site."""

    @property
    def name(self) -> str: ...

    @property
    def linears(self) -> tuple[str, ...]: ...

    @property
    def component(self) -> str: ...

    @property
    def per_step(self) -> bool: ...

    @property
    def attention(self) -> bool: ...


class _Frozen(BaseModel):
    """A strict value that cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TransformScheme(_Frozen):
    """The block transform T of a site's input space: x' = x T, W' = W T⁻ᵀ.

    Attributes:
        rotation: none, Hadamard, right singular vectors (svd), or their product (svd_hadamard);
            ``greedy`` flattens the largest channel of calibration again and again (DuQuant);
            ``second_moment`` is the closed form that gives x' and W' one and the same flat second
            moment (WUSH), no rotation in general.
        shrinkage: for ``second_moment``, how far the two moments are moved to their diagonals; at 1
            nothing is left of it but a smoothing with exponent ½ and a Hadamard rotation.
        smoothing: exponent α of c_j = size(x_j)^α / size(W_:j)^(1-α), by which x/c and W·c are
            scaled before rotating; None leaves channels as they are.
        permutation: ``snake`` deals channels over blocks by size before rotating.
        magnitude: the size of a channel, in smoothing and in the permutation: its root mean square,
            or its largest absolute value as SmoothQuant and DuQuant have it.
        block: block size; sites whose width is not a multiple are padded with zeros.
        output_rotation: rotate the output in blocks and undo it after the product (simulation of
            the paper's action head).
    """

    rotation: Literal["none", "hadamard", "svd", "svd_hadamard", "greedy", "second_moment"] = (
        "svd_hadamard"
    )
    smoothing: float | None = Field(default=None, ge=0.0, le=1.0)
    permutation: Literal["none", "snake"] = "none"
    block: int = Field(default=64, ge=2)
    output_rotation: bool = False
    magnitude: Literal["rms", "max"] = "rms"
    shrinkage: float = Field(default=0.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _hadamard_needs_a_power_of_two(self) -> TransformScheme:
        flat = self.rotation in ("hadamard", "svd_hadamard", "second_moment")
        rotated = flat or self.output_rotation
        if rotated and self.block & (self.block - 1):
            raise ValueError(f"a Hadamard rotation needs a power of two as block, got {self.block}")
        if self.shrinkage and self.rotation != "second_moment":
            raise ValueError("shrinkage is of second moments: give rotation: second_moment")
        return self

    @property
    def identity(self) -> bool:
        """Whether inputs are used as they are."""
        return self.rotation == "none" and self.smoothing is None and self.permutation == "none"

    @property
    def needs_statistics(self) -> bool:
        """Whether the transform depends on calibration, or on the weight alone."""
        return (
            self.smoothing is not None
            or self.permutation != "none"
            or self.rotation in ("greedy", "second_moment")
        )


class WeightScheme(_Frozen):
    """How weights become integers.

    Attributes:
        bits: integer width, symmetric, [-2^(bits-1), 2^(bits-1) - 1].
        rounding: round to nearest, or GPTQ with error propagation.
        scale: absolute maximum, or mean-squared-error search over clip ratios.
        group: input channels per scale; None is one scale per output channel.
        damping: GPTQ's Hessian damping as a fraction of the mean diagonal.
        low_rank: rank of a 16-bit branch beside the integers that carries the largest singular
            directions of the weight (SVDQuant); None for none.
        rounding_noise: share of the inputs' rounding noise that GPTQ reckons with
            (``quantization/rounded_inputs.py``); 0 is GPTQ as published.
        order: in which GPTQ rounds the input channels: as they are ``stored``, or those with the
            largest mean square first (``energy``), while the others can still make up for it.
    """

    bits: Literal[4, 8] = 4
    rounding: Literal["nearest", "gptq"] = "gptq"
    scale: Literal["max", "mse"] = "mse"
    group: int | None = Field(default=None, ge=2)
    damping: float = Field(default=0.01, gt=0.0)
    low_rank: int | None = Field(default=None, ge=1)
    rounding_noise: float = Field(default=0.0, ge=0.0, le=1.0)
    order: Literal["stored", "energy"] = "stored"

    @model_validator(mode="after")
    def _an_order_is_gptqs_and_keeps_groups_together(self) -> WeightScheme:
        if self.order != "stored" and (self.rounding != "gptq" or self.group is not None):
            raise ValueError("order is that of GPTQ, with one scale per output: give no group")
        return self


class ActivationScheme(_Frozen):
    """How activations become integers.

    Attributes:
        bits: integer width, symmetric.
        scale: ``per_token`` dynamic; ``per_step`` one static number per denoising step (sites
            outside the action head have a single step, and see ``Recipe.scheme_of``);
            ``per_step_or_token`` whichever of the two gives a site the smaller output error in
            calibration; ``per_channel_per_step`` the paper's static scale on every input channel
            (simulation only).
        quantile: for ``per_channel_per_step``, the quantile of abs(x') that maps to the largest
            integer.
        clip: for ``per_token``, the share of a token's largest magnitude that maps to the largest
            integer; below 1 a few values are cut off and all others rounded more finely.
            ``search`` finds the share with the least squared rounding error for every site.
        subtract_mean: subtract from every channel its mean (in the action head that of each
            denoising step) and round what is left; the mean's product with the weight goes into the
            bias.
    """

    bits: Literal[4, 8] = 4
    scale: Literal["per_token", "per_step", "per_step_or_token", "per_channel_per_step"] = (
        "per_token"
    )
    quantile: float = Field(default=0.999, gt=0.0, le=1.0)
    clip: Annotated[float, Field(gt=0.0, le=1.0)] | Literal["search"] = 1.0
    subtract_mean: bool = False

    @property
    def realizable(self) -> bool:
        return self.scale != "per_channel_per_step"

    @property
    def share(self) -> float:
        """``clip`` as a number, which it is at every site that has been quantized."""
        if self.clip == "search":
            raise ValueError("the clip of this site has not been searched")
        return self.clip


class Scheme(_Frozen):
    """Transform, weights and activations of one component.

    Attributes:
        layers: ``mlp`` leaves the component's attention projections in the checkpoint's precision.
        prior: what is assumed of inputs that calibration did not see: nothing (``none``), or that
            any channel may come to contribute as much to the output as the channels of its site do
            on average (``contribution``, ``quantization/prior.py``).  It holds for whatever is
            calibrated: smoothing and the other transforms, GPTQ's Hessian, static scales and clips.
        tokens: how much each token of calibration counts: by the square of its size, as it was
            ``seen``, or all the same (``equal``), each divided by its root mean square.  Language
            models gather massive activations in a token or two of a text; with a scale per token
            these are rounded by themselves, but they make up most of a second moment.
    """

    transform: TransformScheme = TransformScheme()
    weights: WeightScheme = WeightScheme()
    activations: ActivationScheme = ActivationScheme()
    layers: Literal["all", "mlp"] = "all"
    prior: Literal["none", "contribution"] = "none"
    tokens: Literal["seen", "equal"] = "seen"

    @model_validator(mode="after")
    def _equal_tokens_have_scales_of_their_own(self) -> Scheme:
        static = self.activations.scale != "per_token" or self.activations.subtract_mean
        if self.tokens == "equal" and static:
            raise ValueError("tokens: equal is for scales per token, without subtract_mean")
        if self.tokens == "equal" and not self._calibrated:
            raise ValueError("tokens is about calibration, and this scheme needs none")
        return self

    @model_validator(mode="after")
    def _noise_and_mean_have_a_place(self) -> Scheme:
        if self.weights.rounding_noise and self.weights.rounding != "gptq":
            raise ValueError("rounding_noise is what GPTQ reckons with: give rounding: gptq")
        if self.prior != "none" and not self._calibrated:
            raise ValueError("prior is about calibration, and this scheme needs none")
        if self.activations.subtract_mean and not self.activations.realizable:
            raise ValueError("subtract_mean is for integers; this scale is a simulation's")
        if self.activations.subtract_mean and self.transform.output_rotation:
            raise ValueError("subtract_mean is for integers; an output rotation is a simulation")
        return self

    @property
    def _calibrated(self) -> bool:
        static = self.activations.scale != "per_token" or self.activations.clip == "search"
        return self.transform.needs_statistics or self.weights.rounding == "gptq" or static

    @property
    def realizable(self) -> bool:
        return self.activations.realizable and not self.transform.output_rotation


class SchemeChange(_Frozen):
    """What some sites have other than their component: the fields that are given, and no others.

    Attributes:
        transform, weights, activations: fields of ``TransformScheme``, ``WeightScheme`` and
            ``ActivationScheme``.
        prior: as in ``Scheme``; None leaves it as it is.
    """

    transform: Mapping[str, Any] = {}
    weights: Mapping[str, Any] = {}
    activations: Mapping[str, Any] = {}
    prior: Literal["none", "contribution"] | None = None

    def of(self, scheme: Scheme) -> Scheme:
        """The scheme with these fields in it.

        Raises:
            ValidationError: there is no such field, or no such scheme.
        """
        content = scheme.model_dump()
        for part, fields in self.model_dump(exclude={"prior"}).items():
            content[part] |= fields
        if self.prior is not None:
            content["prior"] = self.prior
        return Scheme.model_validate(content)


class Recipe(_Frozen):
    """A named quantization method.

    Attributes:
        name: what the user types.
        description: one line for tables and model cards, with the source.
        vision, projector, backbone, action_head: the scheme of each component; None leaves it in
            the checkpoint's own precision.
        adaptive_norm: ``table`` replaces the adaptive-norm linears by their exact values at the
            denoising times of ``table_step_counts`` (interpolated elsewhere); ``keep`` leaves them.
        table_step_counts: step counts that are exact, besides the policy's own.
        embedding_bits: 8 stores token embeddings as integers with one scale per row, 4 with one
            per 64 columns.
        cascade: calibrate later sites with the earlier ones already quantized.
        observations: at most this many calibration observations are used.
        seed: seeds sampling noise and row sampling of calibration.
        match_attention: scale queries and outputs of the action head's 16-bit attention so that its
            logits and outputs are as large as in full precision (QuantVLA); needs
            ``action_head.layers: mlp``.
        sites: what is different at some sites, by a regular expression for their names; None leaves
            them in the checkpoint's precision.  It has to match the end of a name, from a dot on:
            ``down_proj`` is that of every layer.  Where several match, each is applied to what the
            ones before it came to.  One that matches no site of a policy is refused.
    """

    name: str
    description: str
    vision: Scheme | None = None
    projector: Scheme | None = None
    backbone: Scheme | None = None
    action_head: Scheme | None = None
    adaptive_norm: Literal["table", "keep"] = "keep"
    table_step_counts: tuple[Annotated[int, Field(ge=1)], ...] = (4, 5, 8, 10, 16)
    embedding_bits: Literal[4, 8, 16] = 16
    cascade: bool = True
    observations: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**62)
    match_attention: bool = False
    sites: Mapping[str, SchemeChange | None] = {}

    @model_validator(mode="after")
    def _changes_give_schemes(self) -> Recipe:
        schemes = [self.scheme(component) for component in COMPONENTS]
        for pattern, change in self.sites.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"sites: {pattern!r} is no regular expression: {error}") from error
            for scheme in schemes:
                if scheme is not None and change is not None:
                    change.of(scheme)
        return self

    @model_validator(mode="after")
    def _matched_attention_is_in_16_bits(self) -> Recipe:
        if self.match_attention and (self.action_head is None or self.action_head.layers != "mlp"):
            raise ValueError(
                "match_attention scales attention projections that are left in 16 bits: give "
                "action_head with layers: mlp"
            )
        return self

    def scheme(self, component: str) -> Scheme | None:
        """The scheme of a component by name."""
        return getattr(self, component)

    def scheme_of(self, site: Site) -> Scheme | None:
        """The scheme of one site; None leaves it in the checkpoint's precision.

        A static scale per step spares a reduction in every step.  A site of the action head that
        runs once per observation has nothing to spare: its activations are scaled per token.
        """
        scheme = self.scheme(site.component)
        for pattern, change in self.sites.items():
            if scheme is not None and _names_site(pattern, site):
                scheme = None if change is None else change.of(scheme)
        if scheme is not None and scheme.layers == "mlp" and site.attention:
            return None
        if scheme is None or site.component != "action_head" or site.per_step:
            return scheme
        if scheme.activations.scale not in ("per_step", "per_step_or_token"):
            return scheme
        per_token = scheme.activations.model_copy(update={"scale": "per_token"})
        return scheme.model_copy(update={"activations": per_token})

    def require_known(self, sites: Iterable[Site]) -> None:
        """Refuse a pattern of ``sites`` that matches none of a policy's sites.

        Raises:
            RecipeError: names the pattern, and what it could have matched.
        """
        known = list(sites)
        for pattern in self.sites:
            if not any(_names_site(pattern, site) for site in known):
                endings = sorted({site.name.rpartition(".")[2] for site in known})
                raise RecipeError(
                    f"recipe {self.name!r}: {pattern!r} under sites matches no site of this "
                    f"policy, whose names end in {', '.join(endings)}"
                )

    @property
    def realizable(self) -> bool:
        """Whether every quantized component can be stored and multiplied as integers."""
        schemes = [self.scheme(component) for component in COMPONENTS]
        found = [scheme for scheme in schemes if scheme is not None]
        changes = [change for change in self.sites.values() if change is not None]
        found += [change.of(scheme) for scheme in found for change in changes]
        return all(scheme.realizable for scheme in found)

    @property
    def left_in_16_bits(self) -> tuple[str, ...]:
        """What keeps the checkpoint's precision, or adds 16-bit weights, in the user's words."""
        left: list[str] = []
        for component in COMPONENTS:
            scheme, name = self.scheme(component), component.replace("_", " ")
            if scheme is None:
                left.append(name)
            elif scheme.layers == "mlp":
                left.append(f"attention of the {name}")
            if scheme is not None and scheme.weights.low_rank is not None:
                left.append(f"rank-{scheme.weights.low_rank} branch of the {name}")
        left += [f"sites {pattern}" for pattern, change in self.sites.items() if change is None]
        left += ["adaptive norms"] if self.adaptive_norm == "keep" else []
        return tuple(left + (["token embedding"] if self.embedding_bits == 16 else []))

    def scoped(self, scope: Scope) -> Recipe:
        """``paper`` keeps only backbone and action head; ``all`` is the recipe as written."""
        if scope == "all":
            return self
        return self.model_copy(
            update={
                "vision": None,
                "projector": None,
                "adaptive_norm": "keep",
                "embedding_bits": 16,
            }
        )

    @property
    def content_hash(self) -> str:
        """SHA-256 over the canonical JSON of everything that changes the result.

        A field at its default is not part of it: a new field changes no hash of a recipe that does
        not use it.  A default is therefore never changed.
        """
        content = self.model_dump(mode="json", exclude={"description"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, source: str | Path | Recipe) -> Recipe:
        """A recipe from its name, a YAML file, or itself.

        Raises:
            RecipeError: unknown name (lists the known ones), unreadable file, or invalid content.
        """
        if isinstance(source, Recipe):
            return source
        for folder in (_METHODS, _ABLATIONS):
            if str(source) in _names(folder):
                text = files("omega_qvla").joinpath(f"{folder}/{source}.yaml").read_text("utf-8")
                return cls._parse(text, f"recipe {source!r}")
        path = Path(source)
        if path.suffix not in (".yaml", ".yml"):
            known = [*recipe_names(), *ablation_names()]
            raise RecipeError(
                f"unknown recipe {str(source)!r}{did_you_mean(str(source), known)}; known recipes: "
                f"{', '.join(recipe_names())}; ablations: {', '.join(ablation_names())}; or give "
                "the path of a .yaml file"
            )
        try:
            return cls._parse(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read recipe file {path}: {error}") from error

    @classmethod
    def _parse(cls, text: str, where: str) -> Recipe:
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{where} is not valid YAML: {error}") from error
        if not isinstance(content, dict):
            raise RecipeError(f"{where} must be a mapping of recipe fields")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in item['loc']) or 'recipe'}: {item['msg']}"
                for item in error.errors()
            )
            raise RecipeError(f"{where} is not a valid recipe: {problems}") from error


def _names_site(pattern: str, site: Site) -> bool:
    """Whether a pattern is for a site: matches its name, or the names of all its linears.

    Raises:
        RecipeError: it matches some of the linears, which are quantized together with the others.
    """
    ending = re.compile(rf"(?:.*\.)?(?:{pattern})")
    matched = [name for name in site.linears if ending.fullmatch(name)]
    if ending.fullmatch(site.name) or len(matched) == len(site.linears):
        return True
    if matched:
        raise RecipeError(
            f"{pattern!r} under sites matches {', '.join(matched)} alone, which share their input "
            f"with the other linears of {site.name}: name that site, or all of its linears"
        )
    return False


def recipe_names() -> list[str]:
    """Names of the built-in recipes: the methods."""
    return _names(_METHODS)


def ablation_names() -> list[str]:
    """Names of the built-in variations of a method that show what each of its parts does."""
    return _names(_ABLATIONS)


def _names(folder: str) -> list[str]:
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in files("omega_qvla").joinpath(folder).iterdir()
        if entry.name.endswith(".yaml")
    )
