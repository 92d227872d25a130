"""What the command line exports: a pipeline of ours, or a UNet and its scheduler as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from sbldm_fast import Pipeline
from sbldm_fast.errors import MissingExtra, UserError
from sbldm_fast.files import read_json
from sbldm_fast.sampling.pipeline import BUNDLED


def load(folder: str) -> tuple[Pipeline | nn.Module, dict[str, Any]]:
    """A pipeline, or the UNet of a diffusers pipeline folder, and what `export` is to know of it: license, or shape and
    scheduler.

    Raises:
        ValueError: neither, a UNet that is conditioned. ImportError: diffusers is not installed.
    """
    where = BUNDLED.get(folder, Path(folder))
    parts = (
        read_json(where / "model_index.json") if (where / "model_index.json").is_file() else {"_class_name": "Pipeline"}
    )
    if parts.get("_class_name") == "Pipeline":
        return Pipeline.from_pretrained(folder), {"license": parts["license"]} if "license" in parts else {}
    if parts.get("unet") != ["diffusers", "UNet2DModel"]:
        raise UserError(
            f"{folder}: got a pipeline of {parts.get('unet')}, allowed are ours and diffusers' with a UNet2DModel"
        )
    try:
        import diffusers
    except ImportError:
        raise MissingExtra(f"{folder}", "diffusers", "bench") from None
    name = str((parts.get("scheduler") or [None, None])[1])
    kind: Any = getattr(diffusers, name, None)
    if not hasattr(kind, "set_timesteps"):
        raise UserError(f"{folder}: got the scheduler {name!r}, allowed is one of diffusers")
    unet = diffusers.UNet2DModel.from_pretrained(
        where / "unet", use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
    )
    scheduler = kind.from_pretrained(where / "scheduler", local_files_only=True)
    size = unet.config.sample_size
    if size is None:
        raise UserError(
            f"{folder}: got a UNet2DModel without sample_size, allowed is one with it, or"
            " sbldm_fast.export.export(shape=...)"
        )
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return unet, {"shape": (unet.config.in_channels, height, width), "scheduler": scheduler}
