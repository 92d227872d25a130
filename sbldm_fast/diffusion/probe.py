"""Reading a solver's table off any scheduler: run it on random numbers, solve for the coefficients, prove them.

A scheduler with fixed timesteps is a sum of what came before a step, whether it says so or not. Run on random model
outputs, one per element of a tensor, it gives as many equations per step as there are elements, and least squares
gives the coefficients. A second run on other numbers proves them.
"""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from ..errors import UserError
from .table import NotLinear, SolverTable

ELEMENTS = 64  # equations per step, for at most 6 + 2 * MAX_HISTORY unknowns
MAX_HISTORY = 12  # diffusers' PNDM looks that far back after its Runge-Kutta steps
# of model outputs: clipping must show at every step, also where an ordinary x0 stays inside
SIZES = (1.0, 1.0, 30.0, 1000.0)
EXACT = 1e-11  # a residual of float64, relative
ROUNDED = 2e-6  # and of a scheduler that casts to float32 inside
LAST_DIGIT = 3e-7  # a longer history that gains less than this fits what float32 rounded
PROOF = 2e-5  # largest relative error of a whole run


def read_table(scheduler: Any, steps: int, eta: float | None = None, start: int = 0) -> SolverTable:
    """The table of `scheduler`, as `SolverTable.from_scheduler` describes it."""
    own = copy_with_timesteps(scheduler, steps, eta)
    if not 0 <= start < len(own.timesteps):
        raise UserError(f"start: got {start}, allowed is 0 to {len(own.timesteps) - 1}")
    if start == 0:
        _warn_of_a_late_start(own, steps)
    if str(getattr(getattr(own, "config", own), "variance_type", None)).startswith("learned"):
        raise NotLinear("its model also predicts the variance, in as many channels again")
    alpha, sigma = (v[start:] for v in _noise_levels(own))
    run = _run_on_random_numbers(copy_with_timesteps(scheduler, steps, eta, start), eta, start, seed=0)
    predictions, clip_range = _fit_predictions(run, scheduler, alpha, sigma)
    rows, draw = _fit_rows(run, predictions, clip_range)
    width = max(len(row) for row in rows)
    timesteps = own.timesteps[start:].cpu()
    table = SolverTable(
        timesteps.double() if timesteps.is_floating_point() else timesteps.long(),
        torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows]),
        torch.tensor(run.input_scale, dtype=torch.float64),
        alpha,
        sigma,
        _first_sigma(own),
        clip_range,
    )
    error = _largest_error(
        table, _run_on_random_numbers(copy_with_timesteps(scheduler, steps, eta, start), eta, start, seed=1), draw
    )
    if not error <= PROOF:
        raise NotLinear(f"a run of its table differs from its own by {error:.1e}, allowed is {PROOF:.0e}")
    return table


def copy_with_timesteps(scheduler: Any, steps: int, eta: float | None = None, start: int = 0) -> Any:
    """A copy of `scheduler` with its timesteps set, to be stepped from timestep number `start` on.

    Raises:
        ValueError: it has no `set_timesteps` or `step`, or does not take `steps` or `eta`, or its timesteps are no list
            of numbers.
    """
    name = type(scheduler).__name__
    if not hasattr(scheduler, "set_timesteps") or not hasattr(scheduler, "step"):
        raise UserError(f"scheduler: got {name}, allowed is a scheduler with set_timesteps and step, or a SolverTable")
    config = getattr(scheduler, "config", scheduler)
    T = getattr(config, "num_train_timesteps", None) or 1000
    if isinstance(steps, bool) or not isinstance(steps, SupportsIndex) or not 1 <= operator.index(steps) <= T:
        raise UserError(f"steps: got {steps!r}, allowed is 1 to num_train_timesteps = {T}")
    if eta is not None and (not 0 <= eta <= 1 or (eta and "eta" not in inspect.signature(scheduler.step).parameters)):
        raise UserError(f"eta: got {eta}, allowed is 0 to 1, and 0 alone for a scheduler whose step does not take it")
    own = copy.deepcopy(scheduler)
    try:
        own.set_timesteps(operator.index(steps))
    except Exception as wrong:  # whatever another library raises
        raise UserError(f"scheduler: {name}.set_timesteps({steps}) failed: {type(wrong).__name__}: {wrong}") from wrong
    times = own.timesteps
    if not isinstance(times, Tensor) or times.dim() != 1 or not len(times) or not times.double().isfinite().all():
        raise UserError(
            f"scheduler: {name} has timesteps {times}, allowed is a tensor of finite numbers, one for each model call"
        )
    if start and hasattr(own, "set_begin_index"):
        own.set_begin_index(start)
    return own


def _warn_of_a_late_start(own: Any, steps: int) -> None:
    """A run starts from pure noise: where its first timestep is far below T - 1, the model takes some of that noise for
    an image."""
    T, times = getattr(getattr(own, "config", own), "num_train_timesteps", None), own.timesteps
    first = float(times[0])
    # DDIM's usual 50 steps of `leading` start a fiftieth late; timesteps up to 1 are of another unit
    if T and steps > 1 and first > max(1.0, float(times[-1])) and first < T - 1 - T / 50:
        warnings.warn(
            f"{type(own).__name__}: a run of {steps} steps starts at t = {first:g}, not at {T - 1}, from pure noise; "
            "timestep_spacing='trailing' starts there",
            stacklevel=4,
        )


def scheduler_step(
    scheduler: Any, m: Tensor, i: int, x: Tensor, eta: float | None, noise: torch.Generator | Tensor
) -> tuple[Tensor, Tensor | None]:
    """Step i of a prepared scheduler in whichever protocol it speaks: the next x, and x0 if it tells."""
    takes = inspect.signature(scheduler.step).parameters
    t = scheduler.timesteps
    following = t[i + 1] if i + 1 < len(t) else None
    source = "variance_noise" if isinstance(noise, Tensor) else "generator"
    optional = {
        "eta": eta,
        source: noise,
        "next_timestep": torch.zeros_like(t[0]) if following is None else following,  # MONAI's RFlow
        "prev_timestep": following,  # diffusers' UnCLIP, which takes t - 1 for what it is not told
    }
    out = scheduler.step(m, t[i], x, **{k: v for k, v in optional.items() if k in takes and v is not None})
    if hasattr(out, "prev_sample"):
        return out.prev_sample, getattr(out, "pred_original_sample", None)
    return out[0], out[1] if len(out) > 1 else None


def scaled_input(scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
    """What the model is given for x: `scale_model_input` where there is one."""
    out: Tensor = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    return out


def _first_sigma(scheduler: Any) -> float:
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


class _Run(NamedTuple):
    """A scheduler's own run on random model outputs, `[ELEMENTS]` each: S + 1 of x, S of the others."""

    x: list[Tensor]
    m: list[Tensor]
    z: list[list[Tensor]]  # what it may have drawn in a step: in float64, then in float32; empty if it drew nothing
    x0: list[Tensor | None]
    small_x0: list[Tensor | None]  # of x and m a million times smaller, which no clipping reaches, scaled back
    input_scale: list[float]


def _run_on_random_numbers(scheduler: Any, eta: float | None, start: int, seed: int) -> _Run:
    random, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 2)
    shape = (1, 1, 8, ELEMENTS // 8)
    size = torch.tensor(SIZES, dtype=torch.float64).repeat(ELEMENTS // len(SIZES)).reshape(shape)
    run = _Run(
        [torch.randn(shape, generator=random, dtype=torch.float64) * size * _first_sigma(scheduler)], [], [], [], [], []
    )
    small = copy.deepcopy(scheduler)
    with torch.random.fork_rng(devices=[]):
        for i, t in enumerate(scheduler.timesteps[start:], start):
            x, m = run.x[-1], torch.randn(shape, generator=random, dtype=torch.float64) * size
            ones = scaled_input(scheduler, torch.ones_like(x), t)
            scaled_input(small, x, t)  # some schedulers count on being asked
            before = noise.get_state()
            try:
                following, x0 = scheduler_step(scheduler, m, i, x, eta, noise)
                small_x0 = (
                    None if x0 is None else scheduler_step(small, m * 1e-6, i, x * 1e-6, eta, noise.clone_state())[1]
                )
            except Exception as failure:  # whatever another library raises; stepping will show it to the user
                raise NotLinear(f"its step {i} failed: {type(failure).__name__}: {failure}") from failure
            if not following.isfinite().all():
                raise NotLinear(f"its step {i} gives numbers that are not finite")
            drew = not torch.equal(before, noise.get_state())
            run.x.append(following.double())
            run.m.append(m)
            run.z.append([_redraw(shape, before, dtype) for dtype in (torch.float64, torch.float32)] if drew else [])
            run.x0.append(None if x0 is None else x0.double())
            run.small_x0.append(None if small_x0 is None else small_x0.double() * 1e6)
            run.input_scale.append(float(ones.flatten()[0]))
    return run


def _redraw(shape: tuple[int, ...], state: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().set_state(state), dtype=dtype).double()


def _noise_levels(scheduler: Any) -> tuple[Tensor, Tensor]:
    """alpha and sigma `[S]` of `add_noise` at each timestep; NaN where the scheduler has none."""
    t = scheduler.timesteps
    one = torch.ones(len(t), 1, 1, 1, dtype=torch.float64)
    if not hasattr(scheduler, "add_noise"):
        return (one * torch.nan).flatten(), (one * torch.nan).flatten()
    try:
        alpha, sigma = scheduler.add_noise(one, 0 * one, t), scheduler.add_noise(0 * one, one, t)
    except Exception:  # whatever another library raises, RePaint that it must not be asked: then it is not known
        return (one * torch.nan).flatten(), (one * torch.nan).flatten()
    return alpha.double().flatten(), sigma.double().flatten()


def _fit_predictions(run: _Run, scheduler: Any, alpha: Tensor, sigma: Tensor) -> tuple[list[Tensor], float | None]:
    """`[c_x, c_m]` of each step, and the range that x0 is clipped to."""
    kind = getattr(getattr(scheduler, "config", scheduler), "prediction_type", None)
    r = (alpha**2 + sigma**2).sqrt()
    known = {
        "epsilon": (1 / alpha, -sigma / alpha),
        "sample": (0 * alpha, 1 + 0 * alpha),
        "v_prediction": (alpha / r**2, -sigma / r),
        "flow_prediction": (1 + 0 * alpha, -sigma),
    }.get(str(kind), (alpha * torch.nan, alpha * torch.nan))
    c, clipped = list(torch.stack(known, dim=1)), []
    for i, (x0, small) in enumerate(zip(run.x0, run.small_x0, strict=True)):
        if x0 is None or small is None:
            continue
        c[i], error = _least_squares([run.x[i], run.m[i]], small)
        unclipped = c[i][0] * run.x[i] + c[i][1] * run.m[i]
        if error > ROUNDED:
            raise NotLinear(f"x0 of step {i} is not a sum of x and the model's output")
        if float((unclipped - x0).abs().max()) > 1e-5 * float(unclipped.abs().max()):
            clipped.append((i, unclipped, x0))
    if not clipped:
        return c, None
    limit = max(float(x0.abs().max()) for _, _, x0 in clipped)
    for i, unclipped, x0 in clipped:
        if float((unclipped.clamp(-limit, limit) - x0).abs().max()) > 1e-5 * limit:
            raise NotLinear(
                f"x0 of step {i} is neither as predicted nor clipped to a fixed range (thresholding, or limits of two"
                " sizes)"
            )
    return c, limit


def _fit_rows(run: _Run, c: list[Tensor], clip_range: float | None) -> tuple[list[Tensor], int]:
    """The row of each step, each as long as its history needs, and which of the two draws the noise was."""
    try:
        return [_fit_row(run, i, c[i], clip_range, 0) for i in range(len(run.m))], 0
    except NotLinear:
        if not any(run.z):
            raise
    return [_fit_row(run, i, c[i], clip_range, 1) for i in range(len(run.m))], 1


def _fit_row(run: _Run, i: int, c: Tensor, clip_range: float | None, draw: int) -> Tensor:
    # column j of the equations is entry places[j] of the row
    now = {4: run.x[i], 5: run.m[i]}
    x0 = run.x0[i]
    if clip_range is not None and x0 is not None:
        now[2] = x0
    if run.z[i]:
        now[3] = run.z[i][draw]
    tried: list[tuple[float, list[int], Tensor]] = []
    for k in range(min(i, MAX_HISTORY) + 1):
        past_m = {5 + 2 * j: run.m[i - j] for j in range(1, k + 1)}
        past_x = {4 + 2 * j: run.x[i - j] for j in range(1, k + 1)}
        # without earlier x first: most multistep solvers remember model outputs alone
        for columns in (now | past_m, now | past_m | past_x) if k else (now,):
            solution, error = _least_squares(list(columns.values()), run.x[i + 1])
            tried.append((error, list(columns), solution))
            if error <= EXACT:
                return _as_row(c, *tried[-1][1:])
        if k == 3 and min(tried, key=lambda t: t[0])[0] <= ROUNDED:
            break
    best = min(error for error, _, _ in tried)
    if best > ROUNDED:
        raise NotLinear(f"step {i} is not a sum of what came before it: {best:.1e} of it is left over")
    return _as_row(c, *next(t[1:] for t in tried if t[0] <= max(4 * best, LAST_DIGIT)))


def _as_row(c: Tensor, places: list[int], values: Tensor) -> Tensor:
    row = torch.zeros(6 + 2 * ((max(places) - 4) // 2), dtype=torch.float64)
    row[:2] = c
    row[places] = values
    return row


def _least_squares(columns: list[Tensor], target: Tensor) -> tuple[Tensor, float]:
    """Least squares, and the largest error relative to the target; each equation and each column scaled to one."""
    A, b = torch.stack([v.flatten() for v in columns], dim=1), target.flatten()
    size = A.abs().amax(dim=1).clamp(min=1e-300)
    A, b = A / size[:, None], b / size
    norms = A.norm(dim=0).clamp(min=1e-300)
    solution = torch.linalg.lstsq(A / norms, b[:, None], rcond=1e-10, driver="gelsd").solution[:, 0] / norms
    return solution, float((A @ solution - b).abs().max() / b.abs().max().clamp(min=1e-300))


def _largest_error(table: SolverTable, run: _Run, draw: int) -> float:
    """The largest error of any x of a run, relative to the largest x of its step among elements of its size."""
    x, worst = [run.x[0]], 0.0
    for i in range(len(run.m)):
        x.append(table.step(i, x, run.m[: i + 1], run.z[i][draw] if run.z[i] else 0.0))
        off, own = ((v.reshape(-1, len(SIZES))).abs().amax(0) for v in (x[-1] - run.x[i + 1], run.x[i + 1]))
        worst = max(worst, float((off / own).max()))
    return worst
