"""The import direction, and what importing costs.

python tests/test_imports.py     the floors and rooms, each with those that it imports from
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = tuple(f"sbldm_fast.{name}" for name in ("errors", "machine", "files", "images", "volume_files", "config"))
FLOORS = {"kernels": 0, "sbldm_fast": 1, "export": 2, "benchmarks": 3}
# from the ground to the roof: each room imports from those before it
ROOMS = (
    "ground",
    "kernels",
    "diffusion",
    "models",
    "sampling",
    "data",
    "training",
    "evaluation",
    "doctor",
    "export",
    "benchmarks",
    "roof",
)


def _floor(module: str) -> int | None:
    if module.startswith(GROUND):
        return 0
    parts = module.split(".")
    if parts[0] != "sbldm_fast":
        return None
    return FLOORS.get(parts[1], 1) if len(parts) > 1 else 1


def _imports(path: Path, root: Path = ROOT, loading: bool = False) -> list[str]:
    """Every module that a file may import, relative imports resolved as the installed package resolves them; with
    `loading` only what it imports before a function of it is called."""
    package = [
        *(["sbldm_fast"] if path.parts[len(root.parts)] != "sbldm_fast" else []),
        *path.relative_to(root).parts[:-1],
    ]
    names = []
    left: list[ast.AST] = [ast.parse(path.read_text())]
    while left:
        node = left.pop()
        if not (loading and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            left += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return names


def _room(module: str) -> str | None:
    """The room of a module; none for other packages, and for the public names of `sbldm_fast` itself."""
    if module.startswith(GROUND):
        return "ground"
    top, _, rest = module.partition(".")
    name = rest.split(".")[0]
    if top == "sbldm_fast" and name.startswith(("cli", "__main__")):
        return "roof"
    return name if top == "sbldm_fast" and name in ROOMS else None


def _files() -> dict[str, Path]:
    """The files of the package by the name that they are imported as."""
    found = {}
    for folder in FLOORS:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if folder == "sbldm_fast" else ("sbldm_fast", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def _rooms() -> dict[str, set[str]]:
    """Each room with the other rooms that its files import from."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name, path in _files().items():
        if room := _room(name):
            found[room] |= {other for module in _imports(path) if (other := _room(module)) and other != room}
    return found


def test_imports_are_resolved(tmp_path: Path) -> None:
    file = tmp_path / "sbldm_fast" / "models" / "probe.py"
    file.parent.mkdir(parents=True)
    file.write_text("from ..export import graphs\nfrom sbldm_fast import benchmarks\nfrom . import vae\n")
    assert {"sbldm_fast.export.graphs", "sbldm_fast.benchmarks", "sbldm_fast.models.vae"} <= set(
        _imports(file, tmp_path)
    )
    assert (_floor("sbldm_fast.export.graphs"), _floor("sbldm_fast.benchmarks"), _floor("sbldm_fast.models.vae")) == (
        2,
        3,
        1,
    )


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_run_one_way(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        if folder == "sbldm_fast" and path.name.startswith(("cli", "__main__")):
            continue  # the roof
        for module in _imports(path):
            floor = _floor(module)
            if module == "sbldm_fast" and folder == "kernels":
                continue  # the package around all floors, of `from sbldm_fast.errors import`
            assert floor is None or floor <= FLOORS[folder], f"{path.relative_to(ROOT)} imports {module}"


def test_rooms_import_from_those_before_them() -> None:
    for room, others in _rooms().items():
        above = {other for other in others if ROOMS.index(other) > ROOMS.index(room)}
        assert not above, f"{room} imports from {', '.join(above)}"


def test_rooms_below_the_public_names_do_not_import_them() -> None:
    """`from sbldm_fast import FastSampler` would be an import from any room."""
    for name, path in _files().items():
        if (room := _room(name)) and room in ROOMS[: ROOMS.index("doctor")]:
            public = [m for m in _imports(path) if m.startswith("sbldm_fast.") and _room(m) is None]
            assert not public, f"{name} imports {', '.join(public)}"


def test_no_files_import_each_other_when_they_are_loaded() -> None:
    files = _files()
    left = {name: {m for m in _imports(path, loading=True) if m in files} for name, path in files.items()}
    for name, path in files.items():
        if path.name == "__init__.py":
            left[name] = set()  # it collects what stands in its folder
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_the_ground_floor_imports_nothing_above_it() -> None:
    for name in GROUND:
        for module in _imports(ROOT / f"{name.replace('.', '/')}.py"):
            assert module.startswith(GROUND) or not module.startswith("sbldm_fast."), f"{name} imports {module}"


def test_roof_imports_upper_floors_inside_commands() -> None:
    for path in (ROOT / "sbldm_fast").glob("cli*.py"):
        loaded = _imports(path, loading=True)
        above = [m for m in loaded if m.startswith("sbldm_fast.") and not m.startswith(("sbldm_fast.cli", *GROUND))]
        assert not above, path.name
        assert not {m.split(".")[0] for m in loaded} & {"torch", "numpy"}, path.name


@pytest.mark.parametrize(
    "line",
    [
        "from .sampling.sampler import FastSampler",
        "from sbldm_fast.benchmarks.suites import SUITES",
        "from torch import nn",
        "try:\n    from .cli_bench import bench\nexcept ImportError:\n    pass",
        "if True:\n    import torch",
    ],
)
def test_what_a_file_imports_as_it_is_loaded_is_seen(line: str, tmp_path: Path) -> None:
    file = tmp_path / "sbldm_fast" / "cli_probe.py"
    file.parent.mkdir()
    file.write_text(f"{line}\n\ndef later():\n    import numpy\n")
    found = set(_imports(file, tmp_path, loading=True))
    wanted = {"sbldm_fast.sampling.sampler", "sbldm_fast.benchmarks.suites", "torch", "sbldm_fast.cli_bench"}
    assert found & wanted
    assert "numpy" not in found
    assert "numpy" in _imports(file, tmp_path)


def test_import_needs_no_triton_no_extras_and_no_gpu() -> None:
    code = """
import sys
for name in ("triton", "onnx", "onnxruntime", "onnxscript", "nibabel", "nilearn", "diffusers", "monai", "matplotlib"):
    sys.modules[name] = None
import torch
import sbldm_fast
from sbldm_fast.kernels import group_norm_silu
y = group_norm_silu(torch.randn(1, 8, 2, 2), 4)
assert y.shape == (1, 8, 2, 2)
assert not torch.cuda.is_initialized()
try:
    with sbldm_fast.kernels.backend("triton"):
        group_norm_silu(torch.randn(1, 8, 2, 2), 4)
except ValueError as error:
    assert "triton is not installed" in str(error)
else:
    raise SystemExit("backend='triton' ran without triton")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr


def test_imported_modules_of_the_library_load_no_extra() -> None:
    code = (
        "import sys, sbldm_fast, sbldm_fast.cli; print([m for m in ('onnx', 'onnxruntime', 'nibabel', 'nilearn',"
        " 'diffusers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "[]"


if __name__ == "__main__":
    for room, others in reversed(_rooms().items()):
        print(f"{room:11} <- {', '.join(sorted(others, key=ROOMS.index))}")
