"""The state of a run on disk: whole or not there, and never the only copy replaced."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor, nn

from sbldm_fast.errors import UserError
from sbldm_fast.files import read_json, whole_file, whole_folder, write_json
from sbldm_fast.models.weights import load_tensors, read_tensors, write_tensors

NUMBER = (int, float)
STATE: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "since": (int,),
    "seconds": NUMBER,
    "loss": NUMBER,
    "best": (*NUMBER, type(None)),
    "settings": (dict,),
    "scaler": (dict,),
}


def newest(folder: Path, name: str) -> Path | None:
    """The last checkpoint of stage `name`."""
    return max(checkpoints(folder, name), default=None)


def checkpoints(folder: Path, name: str = "*") -> list[Path]:
    """Those of a stage, or of all, by step; a folder of another name is the user's."""
    return sorted(folder.glob(f"checkpoint-{name}-" + "[0-9]" * 8))


def save(
    folder: Path,
    name: str,
    state: dict[str, Any],
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> None:
    """Write `checkpoint-<name>-<step>`, then remove all but the last `keep`: killed at any point, a whole one is
    left."""
    moments = {f"{i}.{k}": v for i, values in optimizer.state_dict()["state"].items() for k, v in values.items()}
    with whole_folder(folder / f"checkpoint-{name}-{state['step']:08d}") as aside:
        write_tensors(_plain(model.state_dict()), aside / "model.safetensors")
        write_tensors(_plain(moments), aside / "optimizer.safetensors")
        if ema is not None:
            write_tensors(_plain(ema.state_dict()), aside / "ema.safetensors")
        write_json(aside / "state.json", state)
    for old in checkpoints(folder, name)[:-keep]:
        shutil.rmtree(old)


@contextmanager
def name_last_checkpoint(folder: Path) -> Iterator[None]:
    """Say of a write that failed what is not lost."""
    try:
        yield
    except OSError as error:
        last = max(checkpoints(folder), default=None, key=lambda path: path.stat().st_mtime)
        raise OSError(f"{error}; last good checkpoint: {last or 'none yet'}") from error


def load(
    path: Path, settings: dict[str, Any], model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint back; return its state.

    Raises:
        ValueError: it is of another model or of other settings, or damaged.
    """
    state = read_json(path / "state.json")
    for key, kind in STATE.items():
        value, least = state.get(key), 0 if key in ("step", "since") else -math.inf
        if type(value) not in kind or (isinstance(value, (int, float)) and not least <= value < 2**53):
            raise UserError(
                f"{path / 'state.json'}: {key} is {short(value)}, which is no state of a run: the file is damaged"
            )
    for key, value in settings.items():
        if state["settings"].get(key) != value:
            raise UserError(
                f"{key}: got {value}, but {path} was made with {short(state['settings'].get(key))}; use that or another"
                " run folder"
            )
    load_tensors(model, read_tensors(path / "model.safetensors"), str(path))
    if ema is not None:
        load_tensors(ema, read_tensors(path / "ema.safetensors"), str(path))
    saved: dict[int, dict[str, Tensor]] = {}
    parameters = optimizer.param_groups[0]["params"]
    for key, value in read_tensors(path / "optimizer.safetensors").items():
        index, _, what = key.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters) or what not in ("step", "exp_avg", "exp_avg_sq"):
            raise UserError(f"{path / 'optimizer.safetensors'}: tensor {key!r:.100} is of no parameter of this model")
        like = parameters[int(index)]
        if value.shape != (like.shape if what != "step" else ()):
            raise UserError(
                f"{path / 'optimizer.safetensors'}: tensor {key} has shape {list(value.shape)}, allowed is"
                f" {list(like.shape)}"
            )
        # a fused step walks memory: the moments must lie as the weights do
        saved.setdefault(int(index), {})[what] = (
            torch.empty_like(like).copy_(value) if value.shape == like.shape else value.to(like.device)
        )
    optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def save_best(folder: Path, name: str, model: nn.Module, step: int, value: float) -> None:
    """Replace `best-<name>`: the weights with the lowest validation loss."""
    with whole_folder(folder / f"best-{name}", lose=True) as aside:
        write_tensors(_plain(model.state_dict()), aside / "model.safetensors")
        write_json(aside / "state.json", {"step": step, "val": value})


def load_best(folder: Path, name: str, model: nn.Module) -> None:
    """Put the weights with the lowest validation loss into `model`."""
    path = folder / f"best-{name}"
    load_tensors(model, read_tensors(path / "model.safetensors"), str(path))


def kept_step(folder: Path, name: str, steps: int) -> int:
    """The step of the weights that a finished stage keeps."""
    path = folder / f"best-{name}" / "state.json"
    if not path.exists():
        return steps
    step = read_json(path).get("step")
    if not isinstance(step, int):
        raise UserError(f"{path}: step is {short(step)}, allowed is a whole number: the file is damaged")
    return step


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of `log.jsonl`; a last line that was cut off is left out.

    Raises:
        ValueError: a whole line that is no row.
    """
    path = folder / "log.jsonl"
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no file, allowed is the log of a run")
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                rows.append(json.loads(line))
                rows[-1]["stage"], rows[-1]["step"] + 0
            except (json.JSONDecodeError, RecursionError, KeyError, TypeError):
                raise UserError(f"{path}, line {number} is no row of a run: the file is damaged") from None
    return rows


def rewind_log(folder: Path, name: str, step: int) -> None:
    """Drop the rows of stage `name` beyond `step`: they are made again."""
    rows = [row for row in read_log(folder) if row["stage"] != name or row["step"] <= step]
    with whole_file(folder / "log.jsonl") as aside:
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors takes tensors that lie in order and share no memory
    return {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
