"""A step compiled ahead of time for a CPU and kept on disk, so that a second process loads it instead of compiling again.

AOTInductor makes a shared library of the whole step, weights packed for oneDNN inside it; no Python runs between its operators.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

KEPT = 8  # packages, each about as large as the weights


def cache_folder() -> Path:
    """Where packages are kept: `SBLDM_FAST_CACHE`, or `sbldm_fast` in the user's cache folder; only the user may write there.

    Raises:
        ValueError: the folder belongs to somebody else, who could have put code there.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = Path(os.environ.get("SBLDM_FAST_CACHE", base / "sbldm_fast"))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise ValueError(f"SBLDM_FAST_CACHE: {folder} can be written by others, allowed is a folder that only its user may write to")
    return folder


def compiled_ahead(
    function: Callable[..., Tensor], model: object, arguments: tuple[Any, ...], mode: str
) -> tuple[Callable[..., Tensor], bool]:
    """`function` of tensors, and of dicts of them, compiled for just these shapes; and whether it was on disk.

    The name of the package is a hash of the traced graph, the weights, the mode, torch, the processor and its threads.

    Raises:
        Exception: whatever torch.export raises on a model that it cannot trace.
    """

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model  # its weights become the program's

        def forward(self, *arguments: Any) -> Tensor:
            return function(*arguments)

    with torch.no_grad():
        program = torch.export.export(Traced(), arguments, strict=False)
        path = cache_folder() / f"{_digest(program, arguments, mode)}.pt2"
        if path.exists():
            try:
                path.touch()  # used last
                return torch._inductor.aoti_load_package(str(path)), True
            except RuntimeError:  # cut short, or of another build
                path.unlink(missing_ok=True)
        options = {**torch._inductor.list_mode_options(mode), "freezing": True}
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/step.pt2", inductor_configs=options)
            Path(made).replace(path)
    for old in sorted(path.parent.glob("*.pt2"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
        old.unlink(missing_ok=True)
    return torch._inductor.aoti_load_package(str(path)), False


def _digest(program: Any, arguments: tuple[Any, ...], mode: str) -> str:
    shapes = [(tuple(t.shape), t.stride(), str(t.dtype)) for t in torch.utils._pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
    where = (torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), mode, shapes)
    digest = hashlib.sha256(f"{program.graph_module.code}{where}".encode())
    for tensors in (program.state_dict, program.constants):
        for name, value in sorted(tensors.items()):
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
