"""Input checks shared by the quantization maths."""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.errors import NonFiniteError


def require_finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and Inf.

    Args:
        tensor: any shape, any floating dtype.
        what: the tensor's name in the message; callers that know the site add it.

    Raises:
        NonFiniteError: names ``what``, how many values are bad and the index of the first.
    """
    bad = ~torch.isfinite(tensor)
    if not bool(bad.any()):
        return
    first = [int(i) for i in bad.nonzero()[0]]
    raise NonFiniteError(
        f"{what} has {int(bad.sum())} non-finite value(s), the first at index {first}; "
        "quantization needs finite numbers: check where this tensor comes from"
    )
