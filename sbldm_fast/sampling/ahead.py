"""A step compiled ahead of time for a CPU and kept on disk, so that a second process loads it instead of compiling
again.

AOTInductor makes a shared library of the whole step, weights packed for oneDNN inside it; no Python runs between its
operators. To load one is to run its code, so only what this user alone can have written is loaded, and its name is a
hash of all that it depends on.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

KEPT = 8  # packages, each about as large as the weights


class Unavailable(UserError):
    """Nothing can be compiled here, or nowhere be kept; the message says why."""


class NotTraceable(UserError):
    """torch.export cannot trace a model; the message is its own."""


def cache_folder() -> Path:
    """Where packages are kept: `SBLDM_FAST_CACHE`, or `sbldm_fast` in the user's cache folder; only the user may write
    there.

    Raises:
        Unavailable: the folder or one above it belongs to somebody else, or can be written by others, who could put
            code there.
    """
    try:
        asked = (
            os.environ.get("SBLDM_FAST_CACHE")
            or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sbldm_fast"
        )
        folder = Path(asked).expanduser().absolute()
        for path in reversed((folder, *folder.parents)):
            if not path.exists():
                path.mkdir(mode=0o700)  # also those above, whatever the umask
        folder = folder.resolve(strict=True)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file")
    except (OSError, RuntimeError) as error:  # no home, no current folder, a file in the way
        why = getattr(error, "strerror", None) or error
        raise Unavailable(
            f"SBLDM_FAST_CACHE: no folder can be made: {why}; allowed is one that its user may write to"
        ) from None
    for path in (folder, *folder.parents):
        found = path.stat()
        # in a sticky folder each has his own
        shared = found.st_mode & 0o022 and not (path != folder and found.st_mode & stat.S_ISVTX)
        if found.st_uid not in (os.getuid(), *([0] if path != folder else [])) or shared:
            where = (
                f"{folder} can be written by others"
                if path == folder
                else f"{path}, above {folder}, can be written by others"
            )
            raise Unavailable(
                f"SBLDM_FAST_CACHE: {where}, allowed is a folder that only its user may write to, in folders of the"
                " same kind"
            )
    return folder


def require_compiler() -> None:
    """Look for the C++ compiler that Inductor would call.

    Raises:
        Unavailable: there is none.
    """
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError, RuntimeError):
        raise Unavailable(
            "mode: compiling on a CPU needs a C++ compiler, and none was found: install g++, or name one in CXX"
        ) from None


@contextmanager
def private_caches(device: torch.device) -> Iterator[None]:
    """Inside, Inductor keeps its files below `cache_folder`, not in a folder of /tmp whose owner nobody asks for.

    Raises:
        Unavailable: as `cache_folder`; and, to compile for a CPU, without a compiler.
    """
    if device.type == "cpu":
        require_compiler()
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder() / "inductor")
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def compile_ahead(
    function: Callable[..., Tensor], model: object, arguments: tuple[Any, ...], mode: str
) -> tuple[Callable[..., Tensor], bool]:
    """`function` of tensors, and of dicts of them, compiled for just these shapes; and whether it was on disk.

    The name of the package is a hash of the traced program with all graphs inside it, its weights and constants, the
    options of Inductor, torch, the library, the processor and its threads.

    Raises:
        NotTraceable: torch.export cannot trace it.
        Unavailable: no compiler, or no folder that is the user's own.
    """

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model  # its weights become the program's

        def forward(self, *arguments: Any) -> Tensor:
            return function(*arguments)

    with torch.no_grad(), private_caches(torch.device("cpu")):
        try:
            program = torch.export.export(Traced(), arguments, strict=False)
        except Exception as failure:  # whatever the tracer raises on a foreign model
            raise NotTraceable(str(failure) or type(failure).__name__) from failure
        options = {**torch._inductor.list_mode_options(mode), "freezing": True}
        path = cache_folder() / f"{_digest(program, arguments, options)}.pt2"
        if _own(path):
            try:
                path.touch()  # used last
                return torch._inductor.aoti_load_package(str(path)), True
            except RuntimeError:  # cut short
                pass
        if path.is_dir():
            raise Unavailable(f"SBLDM_FAST_CACHE: {path} is a folder, allowed at that name is what was compiled")
        path.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            try:
                made = torch._inductor.aoti_compile_and_package(
                    program, package_path=f"{folder}/step.pt2", inductor_configs=options
                )
            # whatever Inductor meets in a foreign model, or the compiler in what Inductor wrote
            except Exception as failure:
                raise NotTraceable(str(failure) or type(failure).__name__) from failure
            Path(made).chmod(0o600)
            Path(made).replace(path)
    others = [(p.lstat().st_mtime, p) for p in path.parent.glob("[0-9a-f]" * 64 + ".pt2") if p != path]
    for _, old in sorted(others)[: 1 - KEPT]:
        old.unlink(missing_ok=True)
    return torch._inductor.aoti_load_package(str(path)), False


def _own(path: Path) -> bool:
    """Whether there is a package that this user alone can have written: a file, no link."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _digest(program: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    from torch._inductor import config

    import sbldm_fast

    shapes = [
        (tuple(t.shape), t.stride(), str(t.dtype))
        for t in torch.utils._pytree.tree_leaves(arguments)
        if isinstance(t, Tensor)
    ]
    where = torch.__version__, torch.__config__.show(), sbldm_fast.__version__, torch.get_num_threads(), _processor()
    digest = hashlib.sha256(repr((where, sorted(options.items()), config.get_hash(), shapes)).encode())
    # a region with numbers of its own is a graph inside the graph
    for name, module in program.graph_module.named_modules():
        digest.update(f"{name}{getattr(module, 'code', '')}".encode())
    for tensors in (program.state_dict, program.constants):
        for name, value in sorted(tensors.items()):
            digest.update(f"{name}{getattr(value, 'shape', value)}{getattr(value, 'dtype', '')}".encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@cache
def _processor() -> str:
    """What machine code may depend on: the instructions that the processor has, not its clock."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if not info.is_file() or line.split(":")[0].strip() in wanted}))
