"""How good samples are, and whether they are copies."""

from .memorisation import Neighbours, nearest

__all__ = ["Neighbours", "nearest"]
