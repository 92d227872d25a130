"""What an exported folder says of itself: read, and held against itself and its graphs before anything is run."""

from __future__ import annotations

import hashlib
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sbldm_fast import SolverTable
from sbldm_fast.errors import UserError
from sbldm_fast.files import read_json

from .modules import Solver, conditioned, table_inputs

FORMAT = 2
GRAPHS = ("unet", "step", "sampler", "vae_encoder", "vae_decoder")
MANIFEST, EXAMPLE = "manifest.json", "example.npz"
DTYPES = ("fp32", "fp16", "int8")
ANY = "any"  # an axis or a dtype that the manifest alone does not tell
Rule = tuple[Callable[[Any], bool], str]
Signature = dict[str, tuple[str, list[Any]]]


def _size(value: Any) -> bool:
    return type(value) is int and value > 0


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_size, value))


def _described(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(v, dict)
        and isinstance(v.get("dtype"), str)
        and isinstance(v.get("shape"), list)
        and all((isinstance(d, str) and len(d) < 100) or (type(d) is int and d >= 0) for d in v["shape"])
        for v in value.values()
    )


def _parity(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(value.get(k)) is float and 0 <= value[k] < math.inf for k in ("error", "allowed")
    )


def _one_of(*allowed: str) -> Rule:
    return lambda value: value in allowed, f"one of {', '.join(allowed)}"


# what must hold of each value that is used, and the words for it; of the optional ones, where they are there
WHOLE: dict[str, Rule] = {
    "graphs": (lambda v: isinstance(v, dict) and set(v) <= set(GRAPHS), f"a mapping with names of {', '.join(GRAPHS)}"),
    "target": _one_of("ort", "tensorrt"),
    "opset": (_size, "a whole number"),
    "dtype": _one_of(*DTYPES),
    "model": (lambda v: isinstance(v, dict), "a mapping"),
    "latent_shape": (lambda v: _sizes(v) and len(v) == 3, "[C, H, W]"),
    "cond": (lambda v: isinstance(v, dict) and all(map(_sizes, v.values())), "a mapping to shapes"),
    "decodes": (lambda v: isinstance(v, bool), "true or false"),
    "solver": (lambda v: isinstance(v, dict), "a mapping"),
}
EACH: dict[str, Rule] = {
    "sha256": (lambda v: isinstance(v, str), "a string"),
    "dtype": _one_of(*DTYPES),
    "inputs": (_described, "dtype and shape by name"),
    "outputs": (_described, "dtype and shape by name"),
}
OPTIONAL: dict[str, Rule] = {
    "parity": (_parity, "error and allowed, 0 or more"),
    "norms": (lambda v: type(v) is int, "a whole number"),
    "fused_norms": (lambda v: type(v) is int, "a whole number"),
}
EXAMPLE_FILE = {"sha256": EACH["sha256"]}


def manifest_of(folder: Path) -> tuple[dict[str, Any], SolverTable]:
    """The manifest of an exported folder, whose values that are used have been looked at, and its table, which the
    graphs take.

    Raises:
        ValueError: there is none, it is of another format, or a value is missing or is not what its key allows; file
            and key are named.
    """
    if not folder.is_dir():
        raise UserError(f"folder: {folder} is not a folder, allowed is one that sbldm-fast export wrote")
    path = folder / MANIFEST
    manifest = read_json(path)

    def need(held: bool, key: str, got: object, allowed: str) -> None:
        if not held:
            raise UserError(f"{path}: {key}: got {reprlib.repr(got)}, allowed is {allowed}: export again")

    def all_of(values: Any, rules: Mapping[str, Rule], where: str) -> None:
        need(isinstance(values, dict), where or "it", values, "a mapping")
        for key, (holds, allowed) in rules.items():
            need(holds(values.get(key)), f"{where}{'.' if where else ''}{key}", values.get(key), allowed)

    need(manifest.get("format") == FORMAT, "format", manifest.get("format"), str(FORMAT))
    all_of(manifest, WHOLE, "")
    if "example" in manifest:
        all_of(manifest["example"], EXAMPLE_FILE, "example")
    for name, entry in manifest["graphs"].items():
        all_of(entry, EACH, f"graphs.{name}")
        all_of(entry, {k: rule for k, rule in OPTIONAL.items() if k in entry}, f"graphs.{name}")
        need(
            ("norms" in entry) == ("fused_norms" in entry),
            f"graphs.{name}",
            sorted(entry),
            "norms and fused_norms together",
        )
    table = SolverTable.from_dict(manifest["solver"], f"{path}: solver")
    for name, entry in manifest["graphs"].items():
        for side, wanted in zip(("inputs", "outputs"), _signature(name, manifest, table), strict=True):
            has = entry[side]
            need(
                set(has) == set(wanted),
                f"graphs.{name}.{side}",
                sorted(has),
                f"{', '.join(sorted(wanted))}, as solver and cond say",
            )
            for key, (dtype, shape) in wanted.items():
                fits = len(has[key]["shape"]) == len(shape) and all(
                    isinstance(d, str) or w in (d, ANY) for d, w in zip(has[key]["shape"], shape, strict=True)
                )
                need(
                    fits,
                    f"graphs.{name}.{side}.{key}.shape",
                    has[key]["shape"],
                    f"{shape}, as solver, cond and latent_shape say",
                )
                need(
                    dtype in (has[key]["dtype"], ANY),
                    f"graphs.{name}.{side}.{key}.dtype",
                    has[key]["dtype"],
                    f"{dtype}, as solver says",
                )
    return manifest, table


def _signature(name: str, manifest: dict[str, Any], table: SolverTable) -> tuple[Signature, Signature]:
    """Dtype and shape of what a graph is given and gives, by the table, the conditioning and the shape of a sample."""
    first = {"vae_encoder": "image", "vae_decoder": "z"}.get(name, "x")
    N = (manifest["graphs"][name]["inputs"].get(first, {}).get("shape") or [ANY])[0]  # the batch that the graph has
    x, image = ("float32", [N, *manifest["latent_shape"]]), ("float32", [N, ANY, ANY, ANY])
    if name == "vae_encoder":
        return {"image": image}, {"mean": x, "logvar": x}
    if name == "vae_decoder":
        return {"z": x}, {"image": image}
    cond: Signature = {conditioned("cond", k): (ANY, [N, *v]) for k, v in manifest["cond"].items()}
    numbers = {k: (str(v.dtype)[6:], list(v.shape)) for k, v in table_inputs(table).items()}
    if name == "unet":
        return {"x": x, "t": (numbers["timesteps"][0], [N]), **cond}, {"prediction": x}
    solver, shape = Solver.of(table), manifest["latent_shape"]
    given: Signature = {"x": x, **numbers, **cond}
    if cond:
        given |= {conditioned("uncond", k): (ANY, [N, *v]) for k, v in manifest["cond"].items()} | {
            "guidance_scale": ("float32", [N])
        }
    if solver.stochastic:
        given["noise"] = ("float32", [solver.steps, N, *shape])
    if name == "sampler":
        return given, {"image": image} if manifest["decodes"] else {"latent": x}
    state: Signature = {"x": x, "index": ("int64", [1])}
    if solver.history:
        state["history"] = ("float32", [solver.history, 2, N, *shape])
    return given | state, {f"{k}_next": v for k, v in state.items()}


def verified(folder: Path, name: str, entry: dict[str, Any]) -> bytes:
    """The content of a file that the manifest vouches for; `name` is one of ours, never a path out of the manifest.

    Raises:
        ValueError: the file is missing, or is not the one that was written.
    """
    if (folder / name).exists() and not (folder / name).is_file():  # a pipe would be waited for
        raise UserError(f"{folder / name}: not a file; the manifest names it")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise UserError(f"{folder / name}: {error.strerror}; the manifest names it") from None
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise UserError(f"{folder / name}: its sha256 is not the one in {MANIFEST}; the file was changed or cut short")
    return data


def described(model: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """Dtype and shape of the inputs and outputs of a graph, free axes by name, as the manifest has them."""
    import onnx

    return {
        f"{side}s": {
            v.name: {
                "dtype": onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name,
                "shape": [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            }
            for v in getattr(model.graph, side)
        }
        for side in ("input", "output")
    }


def misdescribed(model: Any, entry: dict[str, Any]) -> str:
    """Which inputs or outputs of a graph are not those that its manifest names, or ''."""
    try:
        held = described(model)
    except (KeyError, TypeError, ValueError):  # of no dtype
        return "inputs, outputs"
    return ", ".join(
        side
        for side in held
        if held[side] != {k: {key: v[key] for key in ("dtype", "shape")} for k, v in entry[side].items()}
    )
