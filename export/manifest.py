"""`manifest.json`: what an exported folder says of itself, read and held against itself before anything is run.

`WHOLE`, `EACH` and `OPTIONAL` are the documentation of the format.
"""

from __future__ import annotations

import hashlib
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sbldm_fast import SolverTable
from sbldm_fast.errors import UserError
from sbldm_fast.files import read_json
from sbldm_fast.models.covariates import MAPS, Covariate

from .modules import Solver, input_name, table_inputs

FORMAT = 2
GRAPHS = ("unet", "step", "sampler", "vae_encoder", "vae_decoder")
MANIFEST, EXAMPLE = "manifest.json", "example.npz"
GUIDANCE = 2.0  # the guidance scale of the samples in the example of a conditional model
DTYPES = ("fp32", "fp16", "int8")
ANY = "any"  # an axis or a dtype that the manifest alone does not tell
Signature = dict[str, tuple[str, list[Any]]]


class Rule(NamedTuple):
    """What must hold of a value, in words for a message, and what the value means."""

    holds: Callable[[Any], bool]
    allowed: str
    meaning: str


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_size, value))


def _is_axis(value: Any) -> bool:
    return (isinstance(value, str) and len(value) < 100) or (type(value) is int and value >= 0)


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(v, dict)
        and isinstance(v.get("dtype"), str)
        and isinstance(v.get("shape"), list)
        and all(map(_is_axis, v["shape"]))
        for v in value.values()
    )


def _is_parity(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(value.get(k)) is float and 0 <= value[k] < math.inf for k in ("error", "allowed")
    )


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


def _one_of(allowed: tuple[str, ...], meaning: str) -> Rule:
    return Rule(lambda value: value in allowed, f"one of {', '.join(allowed)}", meaning)


# Beside these, for people: "notice", "license" and "versions" (of the packages that wrote the folder).
WHOLE: dict[str, Rule] = {
    "format": Rule(lambda v: v == FORMAT, str(FORMAT), "version of this format"),
    "graphs": Rule(
        lambda v: isinstance(v, dict) and set(v) <= set(GRAPHS),
        f"a mapping with names of {', '.join(GRAPHS)}",
        "each graph NAME.onnx, with the values of EACH",
    ),
    "target": _one_of(("ort", "tensorrt"), "the runtime that the graphs are made for"),
    "opset": Rule(_is_size, "a whole number", "opset of ai.onnx in every graph"),
    "dtype": _one_of(DTYPES, "arithmetic that the export was asked for"),
    "model": Rule(_is(dict), "a mapping", "class of the model; of a pipeline its configs, too"),
    "latent_shape": Rule(
        lambda v: _is_shape(v) and len(v) in (3, 4), "[C, H, W] or [C, D, H, W]", "one sample of the UNet"
    ),
    "cond": Rule(
        lambda v: isinstance(v, dict) and all(map(_is_shape, v.values())),
        "a mapping to shapes",
        "conditioning by the model's names ('' without one), shapes of one sample",
    ),
    "guided": Rule(_is(bool), "true or false", "whether `step` and `sampler` also take `uncond` and `guidance_scale`"),
    "covariates": Rule(
        lambda v: isinstance(v, list) and all(isinstance(c, dict) for c in v),
        "a list of mappings",
        "what `cond` means where the model has names for it: name, low and high or values, unit, definition",
    ),
    "decodes": Rule(_is(bool), "true or false", "whether `sampler` makes images or latents"),
    "solver": Rule(_is(dict), "a mapping", "the table whose rows the graphs take, as `SolverTable.to_dict` has it"),
}
EACH: dict[str, Rule] = {
    "sha256": Rule(_is(str), "a string", "of the file"),
    "dtype": _one_of(DTYPES, "arithmetic of this graph"),
    "inputs": Rule(_are_tensors, "dtype and shape by name", "in a shape a free axis is its name; a range for people"),
    "outputs": Rule(_are_tensors, "dtype and shape by name", "as inputs"),
}
OPTIONAL: dict[str, Rule] = {
    "parity": Rule(_is_parity, "error and allowed, 0 or more", "how far ONNX Runtime was from PyTorch, and might be"),
    "norms": Rule(_is(int), "a whole number", "group norms that a run computes"),
    "fused_norms": Rule(_is(int), "a whole number", "those that ONNX Runtime fuses for CUDA"),
}
EXAMPLE_FILE = {"sha256": EACH["sha256"]}  # beside the seed and the shapes of its arrays, for people


@dataclass(frozen=True)
class Manifest:
    """An exported folder, what its `manifest.json` holds, and the table that its graphs take."""

    folder: Path
    content: dict[str, Any]
    table: SolverTable

    @property
    def graphs(self) -> dict[str, dict[str, Any]]:
        """What the manifest says of each graph."""
        found: dict[str, dict[str, Any]] = self.content["graphs"]
        return found

    def read_graph(self, name: str) -> bytes:
        """The graph of a name, as `read_verified`."""
        return read_verified(self.folder, f"{name}.onnx", self.graphs[name])


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported folder, whose values that are used have been looked at.

    Raises:
        UserError: there is none, it is of another format, or a value is missing or is not what its key allows; file
            and key are named.
    """
    if not folder.is_dir():
        raise UserError(f"folder: {folder} is not a folder, allowed is one that sbldm-fast export wrote")
    path = folder / MANIFEST
    content = read_json(path)
    if "licence" in content:  # the key of earlier exports, read for one version
        content.setdefault("license", content.pop("licence"))
    content.setdefault("covariates", [])  # of exports before there were any
    content.setdefault("guided", bool(content.get("cond")))
    _require_all(path, content, WHOLE, "")
    if "example" in content:
        _require_all(path, content["example"], EXAMPLE_FILE, "example")
    for name, entry in content["graphs"].items():
        where = f"graphs.{name}"
        _require_all(path, entry, EACH, where)
        _require_all(path, entry, {k: rule for k, rule in OPTIONAL.items() if k in entry}, where)
        together = ("norms" in entry) == ("fused_norms" in entry)
        _require(path, together, where, sorted(entry), "norms and fused_norms together")
    table = SolverTable.from_dict(content["solver"], f"{path}: solver")
    covariates = read_covariates(content, str(path))
    named: dict[str, list[int]] = {c.name: [] for c in covariates}
    held = not named or {k: v for k, v in content["cond"].items() if k != MAPS} == named
    _require(path, held, "cond", content["cond"], f"{named}, as covariates say")
    for name, entry in content["graphs"].items():
        for side, wanted in zip(("inputs", "outputs"), _signature(name, content, table), strict=True):
            _require_signature(path, entry[side], wanted, f"graphs.{name}.{side}")
    return Manifest(folder, content, table)


def read_covariates(content: Mapping[str, Any], where: str) -> tuple[Covariate, ...]:
    """What the graphs can be asked for.

    Raises:
        UserError: one that is none.
    """
    try:
        return tuple(Covariate.from_dict(c) for c in content["covariates"])
    except UserError as error:
        raise UserError(f"{where}: covariates: {error}: export again") from None


def _require(path: Path, held: bool, key: str, got: object, allowed: str) -> None:
    if not held:
        raise UserError(f"{path}: {key}: got {reprlib.repr(got)}, allowed is {allowed}: export again")


def _require_all(path: Path, values: Any, rules: Mapping[str, Rule], where: str) -> None:
    _require(path, isinstance(values, dict), where or "it", values, "a mapping")
    for key, rule in rules.items():
        value = values.get(key)
        _require(path, rule.holds(value), f"{where}.{key}" if where else key, value, rule.allowed)


def _require_signature(path: Path, found: dict[str, Any], wanted: Signature, where: str) -> None:
    names = f"{', '.join(sorted(wanted))}, as solver and cond say"
    _require(path, set(found) == set(wanted), where, sorted(found), names)
    for key, (dtype, shape) in wanted.items():
        got = found[key]["shape"]
        fits = len(got) == len(shape) and all(
            isinstance(axis, str) or size in (axis, ANY) for axis, size in zip(got, shape, strict=True)
        )
        _require(path, fits, f"{where}.{key}.shape", got, f"{shape}, as solver, cond and latent_shape say")
        got = found[key]["dtype"]
        _require(path, dtype in (got, ANY), f"{where}.{key}.dtype", got, f"{dtype}, as solver says")


def _signature(name: str, content: dict[str, Any], table: SolverTable) -> tuple[Signature, Signature]:
    """Dtype and shape of what a graph is given and gives, by the table, the conditioning and the shape of a sample."""
    first = {"vae_encoder": "image", "vae_decoder": "z"}.get(name, "x")
    N = (content["graphs"][name]["inputs"].get(first, {}).get("shape") or [ANY])[0]  # the batch that the graph has
    x, image = ("float32", [N, *content["latent_shape"]]), ("float32", [N, ANY, ANY, ANY])
    if name == "vae_encoder":
        return {"image": image}, {"mean": x, "logvar": x}
    if name == "vae_decoder":
        return {"z": x}, {"image": image}
    cond: Signature = {input_name("cond", k): (ANY, [N, *v]) for k, v in content["cond"].items()}
    numbers = {k: (str(v.dtype)[6:], list(v.shape)) for k, v in table_inputs(table).items()}
    if name == "unet":
        return {"x": x, "t": (numbers["timesteps"][0], [N]), **cond}, {"prediction": x}
    solver, shape = Solver.of(table), content["latent_shape"]
    given: Signature = {"x": x, **numbers, **cond}
    if cond and content["guided"]:
        given |= {input_name("uncond", k): (ANY, [N, *v]) for k, v in content["cond"].items()}
        given["guidance_scale"] = ("float32", [N])
    if solver.stochastic:
        given["noise"] = ("float32", [solver.steps, N, *shape])
    if name == "sampler":
        return given, {"image": image} if content["decodes"] else {"latent": x}
    state: Signature = {"x": x, "index": ("int64", [1])}
    if solver.history:
        state["history"] = ("float32", [solver.history, 2, N, *shape])
    return given | state, {f"{k}_next": v for k, v in state.items()}


def sha256(data: bytes) -> str:
    """The digest that a manifest vouches with."""
    return hashlib.sha256(data).hexdigest()


def read_verified(folder: Path, name: str, entry: dict[str, Any]) -> bytes:
    """The content of a file that the manifest vouches for; `name` is one of ours, never a path out of the manifest.

    Raises:
        UserError: the file is missing, or is not the one that was written.
    """
    path = folder / name
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path}: not a file; the manifest names it")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the manifest names it") from None
    if sha256(data) != entry.get("sha256"):
        raise UserError(f"{path}: its sha256 is not the one in {MANIFEST}; the file was changed or cut short")
    return data


def describe_graph(model: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """Dtype and shape of the inputs and outputs of a graph, free axes by name, as the manifest has them."""
    import onnx

    def describe(value: Any) -> dict[str, Any]:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        return {"dtype": dtype, "shape": [d.dim_param or d.dim_value for d in tensor.shape.dim]}

    return {
        "inputs": {v.name: describe(v) for v in model.graph.input},
        "outputs": {v.name: describe(v) for v in model.graph.output},
    }


def find_misdescribed(model: Any, entry: dict[str, Any]) -> str:
    """Which inputs or outputs of a graph are not those that its manifest names, or ''."""
    try:
        held = describe_graph(model)
    except (KeyError, TypeError, ValueError):  # of no dtype
        return "inputs, outputs"
    named = {side: {k: {"dtype": v["dtype"], "shape": v["shape"]} for k, v in entry[side].items()} for side in held}
    return ", ".join(side for side in held if held[side] != named[side])
