"""Models to and from a folder with `config.json` and one safetensors file (diffusers' layout)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sbldm_fast.files import read_json, whole_file, write_json

from ..config import Config
from ..errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
C = TypeVar("C", bound=Config)


class Pretrained(nn.Module, Generic[C]):
    """A module built from one configuration object, that saves and loads itself."""

    config_class: ClassVar[type[Any]]

    def __init__(self, config: C) -> None:
        super().__init__()
        self.config = config

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and the weights, in `dtype` if one is given; buffers are constants and keep theirs."""
        learned = dict(self.named_parameters())
        state = {
            k: v.detach().to(dtype if dtype and k in learned else v.dtype).cpu().contiguous()
            for k, v in self.state_dict().items()
        }
        write_json(Path(folder) / "config.json", self.config.to_dict())
        with whole_file(Path(folder) / WEIGHTS) as aside:
            write_tensors(state, aside)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model in `folder`, in float32 and evaluation mode.

        Raises:
            ValueError: a missing, unreadable or pickled file, or a tensor that is missing, left over, of another shape
                or of no floating-point numbers.
        """
        folder = Path(folder)
        if folder.is_file():
            raise UserError(
                f"{folder} is a file, allowed is a folder with config.json and {WEIGHTS} (no pickle is ever read)"
            )
        config = cls.config_class.from_dict(read_json(folder / "config.json"))
        tensors = read_tensors(folder / WEIGHTS)
        with torch.device("meta"):  # what a config asks for takes no memory before the weights are there to fill it
            fit(cls(config), tensors, str(folder / WEIGHTS))
        model = cls(config)
        model.load_state_dict(tensors)
        return model.eval()


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full or refuses.
    """
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"the weights could not be written: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: the file is missing or is something else.
    """
    if not path.is_file():
        pickles = [
            p.name for p in sorted(path.parent.glob("*")) if p.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl")
        ]
        beside = f"; {pickles[0]} beside it is a pickle, which is never read" if pickles else ""
        raise UserError(f"{path} does not exist{beside}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file, and nothing else is read: {error}") from None


def digest_weights(*models: nn.Module, beside: bytes = b"") -> str:
    """The sha256 of the bits of all weights and buffers, in their order, after the bytes `beside`."""
    digest = hashlib.sha256(beside)
    for model in models:
        for value in model.state_dict().values():
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy `tensors` into `model`; errors as `fit`."""
    fit(model, tensors, source)
    model.load_state_dict(tensors)


def fit(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Look whether `tensors` have just the names and shapes of `model`, and are floating-point numbers.

    Raises:
        ValueError: naming the first tensor that is missing, left over, of another shape or of another kind.
    """
    own = model.state_dict()
    for name, value in own.items():
        if name not in tensors:
            raise UserError(f"{source}: tensor {name} is missing")
        if tensors[name].shape != value.shape:
            raise UserError(
                f"{source}: tensor {name} has shape {list(tensors[name].shape)}, allowed is {list(value.shape)}"
            )
        if tensors[name].dtype not in FLOATS:
            raise UserError(
                f"{source}: tensor {name} is of {str(tensors[name].dtype)[6:]}, allowed are"
                f" {', '.join(str(d)[6:] for d in FLOATS)}"
            )
    if extra := sorted(tensors.keys() - own.keys()):
        raise UserError(f"{source}: tensor {extra[0]!r:.100} is not in the model")
