"""What a user can put right, apart from what only we can.

The command line says one of these, or an `OSError` of a file or a disk, in a sentence; all else is a bug and keeps its
traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """An argument, a file or a machine is not what is needed: the text names it, what came and what is allowed."""


class MissingExtra(ImportError):
    """A package of an extra is not installed.

    Args:
        need: what needs it, such as "reading NIfTI".
        package: the package that was not found.
        extra: the extra of sbldm_fast that brings it.
    """

    def __init__(self, need: str, package: str, extra: str) -> None:
        self.reason = need, package, extra
        super().__init__(f"{need} needs {package}: pip install 'sbldm_fast[{extra}]'", name=package)

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str, str]]:
        return MissingExtra, self.reason  # as another process gets it


class NotFinite(UserError, FloatingPointError):
    """NaN or infinity where numbers should be."""


class TooLarge(UserError, MemoryError):
    """What was asked for does not fit the memory."""
