"""Write docs/json.md from the documents of ``omega_qvla.results``, or check it.

Usage: ``python tools/json_page.py [--check]``.  A key's type is that of its field, its meaning is
what its class says of it under ``Attributes``; a field that says nothing there is an error.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from omega_qvla.results.backbone import BackboneBench
from omega_qvla.results.diagnostics import Diagnostics
from omega_qvla.results.episodes import EpisodeRecord
from omega_qvla.results.memory import Inspection, Verification
from omega_qvla.results.rows import Comparison, Evaluation, MadeBy
from omega_qvla.results.speed import KernelBench, PolicyBench, Roofline
from omega_qvla.results.summaries import Checkup, RecipeList, ReportSummary, Served

PAGE = Path(__file__).resolve().parent.parent / "docs" / "json.md"
HEAD = """# JSON results

Written by `python tools/json_page.py` from `src/omega_qvla/results/`, which also checks every file
that is read.

Every command takes `--json FILE` and writes one object; `--json -` prints it, and everything else
goes to standard error. Keys are stable; new ones may be added, and
`schema` grows when one changes its meaning: it is 1 everywhere. Numbers that were not measured are
`null`; a key marked *optional* is absent where it does not apply. Bytes are bytes, times are
milliseconds unless the name says otherwise, rates and reductions are fractions.
"""
SECTIONS: tuple[tuple[str, str, tuple[type, ...]], ...] = (
    (
        "`demo`, `compare`, `benchmark`, `unseen`",
        """Full precision is the row whose recipe is `fp32` (or `bf16`). Without a simulator
`success` is `{}`, `seeds` is `[]`, and the other closed-loop values are null.""",
        (Comparison,),
    ),
    (
        "`made-by.json`, journals",
        """In the folder of a comparison lies `made-by.json`, written before the work. While it
runs, finished episodes are in a journal per row: JSON lines, the first of which says what is
evaluated.""",
        (MadeBy, EpisodeRecord),
    ),
    ("`eval`", "", (Evaluation,)),
    (
        "`inspect`, `quantize`",
        """`inspect` reads the manifest and the small files, no tensor. `quantize` writes what it
would say about its output; `quantize --dry-run` the same, predicted: tensors to the byte unless
calibration chooses a scale, the whole directory to within 1 %. It reads headers, and of a float32
checkpoint the tensors that stay unquantized.""",
        (Inspection,),
    ),
    ("`verify`", "It has no `schema`.", (Verification,)),
    ("`backbone`", "", (BackboneBench,)),
    ("`bench kernels`", "", (KernelBench,)),
    ("`bench policy`", "", (PolicyBench,)),
    (
        "`bench policy --roofline`",
        "Nothing is measured: the least time a chunk can take on a device ([gpu.md](gpu.md)).",
        (Roofline,),
    ),
    (
        "`diagnose`",
        """A SITE has one value per denoising step in every list, or just one where it runs once per
chunk. x is the input in full precision, y the output, x' = x T the transformed input; numbers keep
five significant digits.""",
        (Diagnostics,),
    ),
    ("`report`", "", (ReportSummary,)),
    ("`serve`", "Written when the server ends.", (Served,)),
    ("`recipes`", "", (RecipeList,)),
    ("`doctor`", "", (Checkup,)),
)
TAIL = """## `make bench-gpu`

One object per GPU, `{"schema": 1, "machine", "capability", "torch", "cuda", "library", "unfinished",
..}`. A part that failed or ran out of time is in `unfinished` with the reason, and what it would have
found further is absent.

| key | meaning |
|---|---|
| `checks` | `layers_equal_bit_for_bit`: how many random layers did; per tiny policy `action_error_against_cpu`; per recipe, of an embedded policy quantized on both, `action_error_cpu` and `action_error_gpu` against full precision, and `words_equal`, the share of packed weight words |
| `quantizing` | full-size pi0.5 quantized on the GPU: `policy`, `recipe`, `observations`, `sites`, `sites_done`, `share_of_work` (estimated from shapes), `seconds_until_first_site` (weights checked and fingerprinted, embedding done), `minutes`, `gpu_bytes_peak`, `gpu_bytes_asked` (what is asked to be free beforehand), `finished`; of a run cut short, how far it came |
| `peak_gmacs`, `memory_gbytes` | the rate of a large int8 product and of copying, as measured there |
| `rows` | layers as of `bench kernels`, `kernel` being `triton` or `cuBLAS bf16`, with `vs_bf16`; `weights_in_cache` is true where all calls read one weight |
| `policies` | per full-size policy `precision`, `kernel`, `graph`, the parts' times as of `bench policy`, `load_s`, `gpu_bytes_resident`, `gpu_bytes_peak` |
| `chunks` | per full-size policy and `subject` (`w4a4 eager`, `w4a4 graph`, `bf16 eager`, `bf16 graph`; `bf16 torch.compile max-autotune` and the graph beside it): `chunk_ms`, encoded inputs to actions, `rounds`, `weight_bytes`, `gpu_bytes_peak_all_held`, the most memory held in its first two chunks with all subjects of the part in memory |

## `train`

The provenance file of the policy (`provenance.json`): `policy`, `command`, `machine`, `minutes` per
part, `tasks`, `admitted`, `results` (per task: `plain`, `blank` and `shuffled` success with Wilson
intervals), `seeds`, `demonstrations`, `training` and the loss `curve`.
"""  # noqa: E501 - a row of a table is a line
_SCALARS = {str: "str", int: "int", bool: "bool", float: "number", type(None): "null", Any: "any"}
_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*)$")


def page() -> str:
    """The whole document."""
    lines, shown = [HEAD], set[type]()
    for title, text, models in SECTIONS:
        lines += [f"## {title}\n", *([f"{text}\n"] if text else [])]
        for model in models:
            for part in dict.fromkeys(_with_parts(model)):
                if part not in shown:
                    lines.append(_described(part, alone=part is models[0]))
                    shown.add(part)
    return "\n".join([*lines, TAIL])


def _with_parts(model: type) -> Iterator[type]:
    """A document and all that it is made of, each before its own parts."""
    yield model
    for kind, _ in _keys(model).values():
        for part in _models_in(kind):
            yield from _with_parts(part)


def _models_in(kind: Any) -> Iterator[type]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for inner in get_args(kind):
        yield from _models_in(inner)


def _keys(model: type) -> dict[str, tuple[Any, bool]]:
    """Key → its type, and whether it can be absent."""
    if is_dataclass(model):
        hints = get_type_hints(model)
        return {field.name: (hints[field.name], False) for field in fields(model)}
    assert issubclass(model, BaseModel)
    return {
        name: (field.annotation, not field.is_required())
        for name, field in model.model_fields.items()
        if not field.exclude
    }


def _described(model: type, *, alone: bool) -> str:
    keys, entries = _keys(model), _attributes(model)
    said = [name for names, _ in entries for name in names]
    if missing := [name for name in keys if name not in said]:
        sys.exit(f"{model.__name__} says nothing of {', '.join(missing)} under Attributes")
    lines = [] if alone else [f"{_name(model)}: {_first_sentence(model)}\n"]
    lines += ["| key | type | meaning |", "|---|---|---|"]
    for names, meaning in entries:
        shown = [name for name in names if name in keys]
        kinds = list(dict.fromkeys(_kind(*keys[name]) for name in shown))
        if shown:
            cell = ", ".join(f"`{name}`" for name in shown)
            lines.append(f"| {cell} | {kinds[0] if len(kinds) == 1 else ''} | {meaning} |")
    return "\n".join(lines) + "\n"


def _attributes(model: type) -> list[tuple[list[str], str]]:
    """(names, meaning) as the classes it is derived from and its own documentation have them."""
    entries: list[tuple[list[str], str]] = []
    for base in reversed(model.__mro__):
        if base.__module__.startswith("omega_qvla"):
            entries += _own_attributes(base)
    return [(names, meaning.replace("``", "`")) for names, meaning in entries]


def _own_attributes(model: type) -> list[tuple[list[str], str]]:
    text = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")[2]
    entries: list[tuple[list[str], str]] = []
    for line in text.splitlines():
        if found := _ENTRY.match(line):
            entries.append((found.group(1).split(", "), found.group(2)))
        elif line.strip():
            names, meaning = entries[-1]
            entries[-1] = names, f"{meaning} {line.strip()}"
    return entries


def _first_sentence(model: type) -> str:
    return inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0].replace("\n", " ")


def _name(model: type) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", model.__name__).upper()


def _kind(kind: Any, can_be_absent: bool) -> str:
    text = _type(kind)
    return f"{text.removesuffix(' or null')}, *optional*" if can_be_absent else text


def _type(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if kind in _SCALARS:
        return _SCALARS[kind]
    if origin is Annotated:
        return _type(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(_type(one) for one in inner)
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in inner)
    if origin is list:
        return f"[{_type(inner[0])}, ...]"
    if origin is tuple:
        return f"[{', '.join(_type(one) for one in inner)}]"
    if origin is dict:
        return f"{{{_type(inner[0])}: {_type(inner[1])}}}"
    return _name(kind)


def main(arguments: list[str]) -> int:
    """Rewrite or check; returns the exit status."""
    wanted = page()
    if arguments == ["--check"]:
        if PAGE.read_text("utf-8") != wanted:
            print("docs/json.md is out of date; run python tools/json_page.py")
            return 1
        return 0
    PAGE.write_text(wanted, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
