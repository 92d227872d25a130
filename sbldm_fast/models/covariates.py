"""What a model is conditioned on: named covariates, each a number in a range or one of some values, any of them
unknown."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import UserError

MAPS = "maps"  # the name of concatenated maps in a condition
OCTAVES = 4  # sines and cosines of a number: a quarter of a turn over half of its range, and three doublings of it
MOST_VALUES = 256
LONGEST = {"values": 200, "unit": 40, "definition": 2000}  # characters: they are shown
LARGEST, FINEST, LEAST = 1e30, 1e-6, 1e-30  # of a range: float32 holds it, and tells its ends apart


@dataclass(frozen=True)
class Covariate(Config):
    """One thing that a model may be asked for.

    A number from `low` to `high`, both in `unit`, or, where there are `values`, one of these. `definition` says in a
    sentence what is meant: "brain volume" alone is not enough.
    """

    name: str = ""
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0
    unit: str = ""
    definition: str = ""

    LIKE: ClassVar[dict[str, Any]] = {"values": ("",)}
    BOUNDS: ClassVar[dict[str, tuple[float, float]]] = dict.fromkeys(("low", "high"), (-LARGEST, LARGEST))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch("[a-z][a-z0-9_]{0,63}", self.name or "a") or self.name == MAPS:
            raise UserError(
                f"Covariate: name is {self.name!r:.100}, allowed are small letters, digits and _, and not {MAPS}"
            )
        if len(set(self.values)) < len(self.values) or len(self.values) > MOST_VALUES or "" in self.values:
            raise UserError(f"Covariate: values of {self.name} are allowed to be {MOST_VALUES} different names at most")
        for field, most in LONGEST.items():
            for text in self.values if field == "values" else (getattr(self, field),):
                if len(text) > most or not text.isprintable():
                    raise UserError(
                        f"Covariate: {field} of {self.name} has {text!r:.60}, allowed are {most} characters that can be"
                        " printed"
                    )
        if not self.high - self.low > max(LEAST, FINEST * max(abs(self.low), abs(self.high))):
            raise UserError(
                f"Covariate: {self.name} is from {self.low:g} to {self.high:g}, allowed is a rising range that float32"
                " can tell apart"
            )

    @property
    def allowed(self) -> str:
        """What it may be, in words."""
        unit = f" {self.unit}" if self.unit else ""
        return f"{' or '.join(self.values):.500}" if self.values else f"{self.low:g} to {self.high:g}{unit}"

    def number(self, value: Any, extrapolate: bool = False, argument: str = "cond") -> float:
        """The number that stands for a value: itself, or the place among `values`; NaN for None, unknown.

        Raises:
            ValueError: an unknown value, or one out of range; with `extrapolate` the latter is a warning.
        """
        if value is None:
            return math.nan
        if isinstance(value, str) and value in self.values:
            return float(self.values.index(value))
        try:
            number = math.nan if isinstance(value, str) and self.values else float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = math.nan
        if math.isnan(number) or (self.values and number not in range(len(self.values))):
            raise UserError(
                f"{argument}[{self.name!r}]: got {value!r:.100}, allowed is {self.allowed}; None is unknown"
            )
        if self.values:
            # 3 of the grades 2, 3, 4 is the second, and the place 3 is none of them
            if (text := f"{number:g}") in self.values and self.values[int(number)] != text:
                raise UserError(
                    f"{argument}[{self.name!r}]: got {number:g}, allowed is a text, '{text}': names are numbers"
                )
            return number
        rounding = 1e-6 * max(abs(self.low), abs(self.high))  # a tensor has 16.15 as 16.149999618
        if not self.low - rounding <= number <= self.high + rounding:
            if not (extrapolate and abs(number) <= LARGEST):
                raise UserError(
                    f"{argument}[{self.name!r}]: got {number:g}, the model was trained on {self.allowed}; with"
                    " extrapolate others are taken"
                )
            warnings.warn(
                f"{argument}[{self.name!r}]: {number:g} lies outside {self.allowed}, on which the model was trained",
                stacklevel=4,
            )
        return number


def encode(
    covariates: Sequence[Covariate], given: Any, n: int, *, extrapolate: bool = False, argument: str = "cond"
) -> dict[str, Tensor]:
    """A condition as float32 `[n]` for each covariate, NaN where it is unknown; `maps`, if given, as they are.

    `given` maps names to a value for all samples or one for each: numbers, names of values, None, lists, arrays or
    tensors.

    Raises:
        ValueError: an unknown name or value, a value out of range, or another number of values.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{argument}: got {type(given).__name__}, allowed is a mapping of {_names(covariates)}")
    known = {c.name: c for c in covariates}
    found = {c.name: torch.full((n,), math.nan) for c in covariates}
    for name, value in given.items():
        if name == MAPS:
            try:
                found[MAPS] = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                raise UserError(f"{argument}[{MAPS!r}]: got {type(value).__name__}, allowed is a tensor") from None
            continue
        if name not in known:
            raise UserError(f"{argument}: got {name!r:.100}, allowed are {_names(covariates)}")
        if isinstance(value, (Tensor, np.ndarray)):
            value = value.reshape(-1).tolist()
        if isinstance(value, (Set, Mapping)):  # they would be taken in an order of their own
            raise UserError(f"{argument}[{name!r}]: got {type(value).__name__}, allowed is a value or a list of them")
        several = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
        if len(several) not in (1, n):
            raise UserError(f"{argument}[{name!r}]: got {len(several)} values, allowed is one, or {n}")
        numbers = [known[name].number(v, extrapolate, argument) for v in several]
        found[name] = torch.tensor(numbers, dtype=torch.float32).expand(n).clone()
    return found


def _names(covariates: Iterable[Covariate]) -> str:
    return f"{', '.join(c.name for c in covariates) or 'none':.500}"


class CovariateEmbedding(nn.Module):
    """Covariates `[N, K]`, NaN where unknown, to a token each, `[N, K, dim]`.

    A number is scaled to u in [-1, 1] and becomes `W [u, sin(2^k pi u / 2), cos(2^k pi u / 2)] + b`, k = 0 ... 3; a
    category its row of a table; what is unknown a vector that is learned.
    """

    def __init__(self, covariates: Sequence[Covariate], dim: int) -> None:
        super().__init__()
        self.covariates = tuple(covariates)
        self.embed = nn.ModuleList(
            nn.Embedding(len(c.values), dim) if c.values else nn.Linear(1 + 2 * OCTAVES, dim) for c in covariates
        )
        self.unknown = nn.Parameter(torch.zeros(len(self.covariates), dim))

    def forward(self, values: Tensor) -> Tensor:
        tokens = []
        for i, (covariate, embed) in enumerate(zip(self.covariates, self.embed, strict=True)):
            value = values[:, i].float()
            unknown = value.isnan()
            value = value.masked_fill(unknown, covariate.low if not covariate.values else 0.0)
            if covariate.values:
                token = embed(value.long())
            else:
                u = unit_range(covariate, value)[:, None]
                angle = u * (math.pi / 2 * 2.0 ** torch.arange(OCTAVES, device=u.device))
                token = embed(torch.cat([u, angle.sin(), angle.cos()], dim=1).to(self.unknown.dtype))
            tokens.append(torch.where(unknown[:, None], self.unknown[i], token))
        return torch.stack(tokens, dim=1)


def unit_range(covariate: Covariate, value: Tensor) -> Tensor:
    """Values of a covariate scaled to [-1, 1]."""
    low, high = (0.0, max(1.0, len(covariate.values) - 1.0)) if covariate.values else (covariate.low, covariate.high)
    return (value - low) * (2 / (high - low)) - 1
