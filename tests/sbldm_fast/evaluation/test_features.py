"""Extractors: what they give, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sbldm_fast import Pipeline
from sbldm_fast.evaluation import features
from sbldm_fast.evaluation.distribution import kid
from sbldm_fast.evaluation.features import extract
from sbldm_fast.evaluation.metrics import _to_255


def images(n: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 1, 12, 12, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(128, 128), mode="bicubic").clamp(-1, 1)


def test_efficientnet_ranks_degradations() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra eval is not installed")
    generator = torch.Generator().manual_seed(1)
    x = (images(24) + 0.3 * torch.randn(24, 1, 128, 128, generator=generator)).clamp(-1, 1)
    real = extract("efficientnet-lite0", x)
    assert real.values.shape == (24, 1280)
    assert real.extractor == "efficientnet-lite0 at 224 pixels"
    blurred = [torch.nn.functional.avg_pool2d(x, k, 1, k // 2) for k in (3, 9, 21)]
    found = [kid(extract("efficientnet-lite0", y), real)[0] for y in blurred]
    assert 0.01 < found[0] < found[1] < found[2], found


def test_the_autoencoder_gives_scaled_means(fresh_demo: Path) -> None:
    vae = Pipeline.from_pretrained(fresh_demo).vae
    found = extract("vae", images(), vae=vae)
    with torch.no_grad():
        wanted = vae.encode(images()).mean.flatten(1) * vae.config.scaling_factor
    torch.testing.assert_close(found.values, wanted.double(), rtol=1e-4, atol=1e-5)
    assert found.extractor.startswith("vae ")


def test_a_callable_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_a_user.py").write_text("def mean(x):\n    return x.mean((2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = extract("of_a_user:mean", images())
    torch.testing.assert_close(found.values, images().mean((2, 3)).double())
    assert found.extractor == "of_a_user:mean"


def test_a_callable_of_an_installed_module() -> None:
    """`torch:flatten` is one: [N, 1, H, W] to a vector, which is refused; `_to_255` keeps four dimensions."""
    for name in ("torch:flatten", f"{_to_255.__module__}:_to_255"):
        with pytest.raises(ValueError, match=r"gave no tensors \[N, d\] for N images"):
            extract(name, images())


BAD: list[tuple[dict[str, object], str]] = [
    ({"extractor": "resnet"}, "extractor: got 'resnet', allowed are efficientnet-lite0, vae, inception or"),
    ({"extractor": "no_such_package:net"}, "extractor: no_such_package:net cannot be imported"),
    ({"extractor": "torch:no_such_name"}, "extractor: torch:no_such_name cannot be imported"),
    ({"extractor": "torch:__version__"}, "is a TorchVersion, allowed is a callable"),
    ({"extractor": "vae"}, "vae: got None, allowed with extractor vae is an autoencoder"),
    ({"extractor": "inception"}, "weights: got None, allowed with extractor inception is the file"),
    ({"extractor": "vae", "weights": "f"}, "weights: got a file, allowed with extractor inception alone, not vae"),
    ({"extractor": "inception", "weights": "no-such-file"}, "no-such-file does not exist, or is no file"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_what_cannot_be_extracted_is_named(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        extract(images=images(), **arguments)  # type: ignore[arg-type]


def test_weights_with_another_hash_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"something else")
    with pytest.raises(
        ValueError, match=r"has sha256 \w{8}\.\.\., allowed is the file whose sha256 starts with 6726825d"
    ):
        extract("inception", images(), weights=path)


def test_weights_that_would_run_something_are_not_run(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    path = tmp_path / "weights.pth"
    torch.save({"w": Runs()}, path)
    with pytest.raises(ValueError, match="is not readable as tensors alone"):
        features._read_tensors(path)
    assert not (tmp_path / "ran").exists()
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="holds a list, allowed are tensors by name"):
        features._read_tensors(path)


def test_images_are_checked() -> None:
    with pytest.raises(ValueError, match="images: got values from 3 to 3"):
        extract("vae", torch.full((8, 1, 128, 128), 3.0))
