"""What every configuration is: a frozen dataclass with checked fields, which goes to and from JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from reprlib import repr as short  # what a file holds may be of any length, and no text for a terminal
from typing import Any, ClassVar, Self

from .errors import UserError


@dataclass(frozen=True)
class Config:
    """A frozen dataclass that goes to and from the JSON of a `config.json`.

    Each field is held to the type of its default, or of its entry in `LIKE`, and to its entry in `BOUNDS`; one in
    `PAIRS` may be two of it instead.
    """

    LIKE: ClassVar[dict[str, Any]] = {}
    BOUNDS: ClassVar[dict[str, tuple[float, float]]] = {}
    PAIRS: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields, tuples as lists, with the class's name as diffusers writes it."""
        return {"_class_name": type(self).__name__.removesuffix("Config"), **asdict(self)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The configuration in `content`; keys that begin with an underscore are passed over.

        Raises:
            ValueError: a key that this configuration does not have, or a value of another type or out of bounds.
        """
        names = {f.name for f in fields(cls)}
        # betas as an array
        listed = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in content.items() if not k.startswith("_")}
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in listed.items()}
        if unknown := given.keys() - names:
            raise UserError(
                f"{cls.__name__}: got {', '.join(short(k) for k in sorted(unknown))}, allowed are"
                f" {', '.join(sorted(names))}"
            )
        return cls(**given)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, likes = getattr(self, f.name), self.LIKE.get(f.name, f.default)
            if f.default is None and value is None:
                continue
            paired = f.name in self.PAIRS and isinstance(value, (tuple, list))
            if paired and len(value) != 2:
                raise UserError(
                    f"{type(self).__name__}: {f.name} is {short(value)}, allowed is one like {likes!r}, or two"
                )
            several = paired or isinstance(likes, tuple)
            if several and not isinstance(value, (tuple, list)):
                raise UserError(f"{type(self).__name__}: {f.name} is {short(value)}, allowed is one like {likes!r}")
            for one in value if several else (value,):
                like = likes[0] if isinstance(likes, tuple) else likes
                kinds = (int, float) if isinstance(like, float) else type(like)
                # True is an int to Python, and to nobody else
                if not isinstance(one, kinds) or isinstance(one, bool) != isinstance(like, bool):
                    raise UserError(f"{type(self).__name__}: {f.name} is {short(value)}, allowed is one like {likes!r}")
                if isinstance(one, (int, float)) and not abs(one) < math.inf:
                    raise UserError(f"{type(self).__name__}: {f.name} is {short(value)}, allowed are finite numbers")
            least, most = self.BOUNDS.get(f.name, (None, None))
            if least is not None and not all(least <= one <= most for one in (value if several else (value,))):
                raise UserError(f"{type(self).__name__}: {f.name} is {short(value)}, allowed is {least} to {most}")
