"""Numbers and names as words: one way to say each thing, in text, captions and tables."""

from __future__ import annotations

from collections.abc import Iterable

from omega_qvla.report.table import MISSING, human_bytes
from omega_qvla.results.rows import Row

NO_BREAK = "\u00a0"
_BLOCKS = (
    ("vision", "vision"),
    ("gemma_expert", "action expert"),
    ("vl_self_attention", "VL self-attention"),
    ("action_head", "action head"),
    ("projector", "projector"),
    ("language_model", "backbone"),
)
_KINDS = {
    "self_attn.qkv_proj": "q/k/v",
    "self_attn.kv_proj": "k/v",
    "self_attn.out_proj": "out",
    "self_attn.o_proj": "out",
    "mlp.gate_up_proj": "gate/up",
    "mlp.down_proj": "down",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "attn1.to_qkv": "q/k/v",
    "attn1.to_q": "q",
    "attn1.to_kv": "k/v",
    "attn1.to_out.0": "out",
    "ff.net.0.proj": "ff in",
    "ff.net.2": "ff out",
    "": "linear",
}


def condition_words(condition: str) -> str:
    """``stress:30`` → ``stress 30×``; everything else as it is."""
    name, _, magnitude = condition.partition(":")
    return f"{name} {magnitude}×" if magnitude else name


def row_name(row: Row) -> str:
    """A recipe's name with what must be known of the row: scope, simulated, unfinished."""
    name = row.recipe if row.scope in (None, "all") else f"{row.recipe} ({row.scope} scope)"
    name += "" if row.realizable else "*"
    return f"{name}, unfinished" if row.unfinished else name


def error_words(value: float | None) -> str:
    """Three significant digits, or a dash."""
    return MISSING if value is None else "0" if value == 0 else f"{value:.3g}"


def share(value: float) -> str:
    """0.531 → ``53.1 %``, on one line."""
    return f"{100 * value:.1f}{NO_BREAK}%"


def size_words(count: int) -> str:
    """A number of bytes, on one line."""
    return human_bytes(count).replace(" ", NO_BREAK)


def points(value: float) -> str:
    """A difference of rates in percentage points with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def listing(names: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    given = list(names)
    return (
        given[0] if len(given) == 1 else f"{', '.join(given[:-1])} and {given[-1]}" if given else ""
    )


def site_place(name: str) -> tuple[str, int | None, str]:
    """A site's name → (block, layer, kind): where it belongs in a map of the network.

    The layer is the first number of the dotted path, the block what stands before it, the kind
    what follows; a site without a number is a block of its own and has no layer.
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return name, None, "linear"
    kind = ".".join(parts[number + 1 :])
    return ".".join(parts[:number]), int(parts[number]), _KINDS.get(kind, kind)


def block_words(block: str, component: str) -> str:
    """What a reader calls a block: ``action expert``; the component's name where unknown."""
    return next((words for mark, words in _BLOCKS if mark in block), component.replace("_", " "))


def site_words(name: str, component: str) -> str:
    """A site's name as a reader says it: ``action expert 4 down``."""
    block, layer, kind = site_place(name)
    words = block_words(block, component)
    return words if layer is None else f"{words} {layer} {kind}"


def quantity(count: int, one: str, many: str | None = None) -> str:
    """``1 episode``, ``4 episodes``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
