"""What a row of results holds: every key with its unit and meaning, and what is allowed in it.

A row is a JSON object on a line of its own. `RowSchema` is the documentation of the format and what files are checked
against.

python -m sbldm_fast.benchmarks.schema     the keys as a table
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sbldm_fast.models.presets import PRESETS

Rule = tuple[Callable[[Any], bool], str]
LEAST, MOST = 1e-12, 1e21  # of what is drawn and divided by: within these a quotient of two is finite
DEEPEST = 20


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _or_none(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or null"


def _each(rule: Rule, least: int = 0) -> Rule:
    return (
        lambda value: isinstance(value, list) and len(value) >= least and all(map(rule[0], value)),
        f"a list, each {rule[1]}",
    )


def _of(**rules: Rule) -> Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, dict) and all(key in value and rule[0](value[key]) for key, rule in rules.items())

    return holds, f"a mapping with {', '.join(f'{key} ({rule[1]})' for key, rule in rules.items())}"


def _each_value(rule: Rule) -> Rule:
    return (
        lambda value: isinstance(value, dict) and all(map(rule[0], value.values())),
        f"a mapping, each value {rule[1]}",
    )


def _either(one: Rule, other: Rule) -> Rule:
    return lambda value: one[0](value) or other[0](value), f"{one[1]}, or {other[1]}"


def _one_of(*names: str) -> Rule:
    return lambda value: value in names, f"one of {', '.join(names)}"


TEXT: Rule = (lambda value: isinstance(value, str), "a text")
TRUTH: Rule = (lambda value: isinstance(value, bool), "true or false")
NUMBER: Rule = (_number, "a number")
ABOVE: Rule = (lambda value: _number(value) and LEAST <= value <= MOST, "a number above 0")
COUNT: Rule = (lambda value: type(value) is int and 1 <= value <= 10**9, "1 or more")
NAMES: Rule = (
    lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values()),
    "a mapping of texts",
)
SHARE: Rule = _of(ok=TRUTH, error=_or_none(NUMBER), against=TEXT)
PARITY: Rule = (
    lambda value: SHARE[0](value) and (value["ok"] or _number(value.get("allowed"))),
    f"{SHARE[1]}, allowed (a number)",
)
_mapping: Rule = (lambda value: isinstance(value, dict), "a mapping")
FLOAT, PRESET = _one_of("float32", "float16", "bfloat16"), _one_of(*PRESETS)
ENV_RULES = {
    "gpu": _or_none(TEXT),
    "cpu": TEXT,
    "commit": TEXT,
    "cores": COUNT,
    "threads": COUNT,
    "cpu_capability": TEXT,
    "packages": NAMES,
}
FAMILIES = {
    "ours": "this library",
    "reference": "our model and scheduler in a plain PyTorch loop",
    "peer": "another library, or PyTorch itself",
    "drop-in": "another library's model and scheduler under FastSampler",
    "machine": "what the machine can do at most",
}


def key(rule: Rule, meaning: str, unit: str = "") -> Any:
    """A key of a row; `rule` holds where the key is there."""
    return field(default=None, metadata={"rule": rule, "meaning": meaning, "unit": unit})


@dataclass(frozen=True, kw_only=True)
class RowSchema:
    """The keys of a row, of all suites; a row has those that its suite gives (`ALWAYS`, `FIGURES`)."""

    # what was measured, when and where
    target: str = key(TEXT, "the suite")
    run: str = key(TEXT, "when the run began, UTC; rows of one problem and run were timed in turns")
    env: dict[str, Any] = key(_of(**ENV_RULES), "machine, versions, commit, and a hash of the sources")
    device: str = key(TEXT, "where tensors were")
    preset: str = key(TEXT, "the models' configuration")
    shape: Any = key(_either(TEXT, _each(COUNT)), "of the tensor; of an op with its groups")
    layout: str = key(TEXT, "of the op's tensors in memory")
    dtype: str = key(TEXT, "precision of the arithmetic")
    batch: int = key(COUNT, "samples at a time")
    steps: int = key(COUNT, "model calls of a run, or training steps")
    processes: int = key(COUNT, "that shared the machine")
    op: str = key(TEXT, "of `sbldm_fast.kernels`; `ceilings`: what the machine can do")
    solver: str = key(TEXT, "name of `Pipeline.sampler`")
    parameters: dict[str, int] = key(_each_value(COUNT), "of each network, to show that they are of one size")
    # who, and what became of it
    provider: str = key(TEXT, "who did it, as tables call it")
    family: str = key(_one_of(*FAMILIES), "; ".join(f"{name}: {what}" for name, what in FAMILIES.items()))
    decodes: bool = key(TRUTH, "whether images are made, and not latents")
    prepares: bool = key(TRUTH, "whether the first call compiles or captures")
    approximate: bool = key(TRUTH, "another function by design: no parity and no speed-up")
    absent: str = key(TEXT, "why there is no figure: not installed, or not for this machine")
    failed: str = key(TEXT, "the error that it ended with")
    interrupted: bool = key(TRUTH, "whether the run was ended before its rounds were")
    note: str = key(TEXT, "what else is to be known")
    # time
    raw_s: list[float] = key(_each(ABOVE, 1), "of each round, in the order of time", "s")
    median_s: float = key(ABOVE, "of the rounds", "s")
    p10_s: float = key(ABOVE, "tenth percentile of the rounds", "s")
    p90_s: float = key(ABOVE, "ninetieth percentile of the rounds", "s")
    iqr_s: float = key(NUMBER, "interquartile range of the rounds", "s")
    n: int = key(COUNT, "rounds")
    build_s: float = key(NUMBER, "to prepare the provider", "s")
    first_call_s: float = key(NUMBER, "of the first call", "s")
    compile_s: float | None = key(_or_none(NUMBER), "first call beyond the median", "s")
    ms_per_step: float = key(ABOVE, "of a whole batch", "ms")
    ms_per_image: float = key(ABOVE, "of one sample of the batch", "ms")
    images_per_s: float = key(ABOVE, "samples", "1/s")
    items_per_s: float = key(ABOVE, "training samples", "1/s")
    minutes_per_100k_steps: float = key(ABOVE, "of training", "min")
    cold: dict[str, Any] = key(_of(median_s=ABOVE), "single calls after the caches were flushed", "s")
    timed: str = key(TEXT, "how calls of less than 2 ms were bundled")
    remarks: list[str] = key(_each(TEXT), "what may have disturbed the figure")
    # right or wrong
    parity: dict[str, Any] | None = key(_or_none(PARITY), "largest difference from `against`, relative, and allowed")
    speedup: dict[str, Any] | None = key(_or_none(_of(over=TEXT, factor=ABOVE)), "of medians; null without parity")
    rms: float = key(NUMBER, "difference of images in [-1, 1] from those of DDIM with 1000 steps, all asked for")
    rms_unasked: float = key(NUMBER, "the same of images that were asked for nothing")
    judged: int = key(COUNT, "images that both differences are of")
    calls: float = key(NUMBER, "mean model calls of an image, of both kinds")
    # memory, energy, work
    peak_bytes: int | None = key(_or_none(NUMBER), "beyond what was there before", "bytes")
    energy: dict[str, float] | None = key(
        _or_none(_of(joules=NUMBER, joules_above_idle=NUMBER, idle_watts=NUMBER)), "of a call, by NVML", "J"
    )
    clock_mhz: dict[str, float] = key(_of(median=ABOVE), "of the GPU while it was timed", "MHz")
    work: dict[str, int] = key(_of(flops=ABOVE, bytes=ABOVE), "launches, bytes and operations counted of a step")
    gb_s: float = key(ABOVE, "bytes that must move over the median", "GB/s")
    of_copy: float | None = key(_or_none(NUMBER), "a copy of these bytes over the median")
    moved: int = key(ABOVE, "bytes that must be read and written", "bytes")
    again: int = key(NUMBER, "bytes that are read a second time", "bytes")
    flops: int = key(ABOVE, "operations of the op")
    rate: float = key(ABOVE, "a ceiling of the machine, in `unit`")
    unit: str = key(TEXT, "of `rate`")
    # a process: startup, scaling
    parts: dict[str, float] = key(_of(import_s=NUMBER, build_s=NUMBER, run_s=NUMBER), "of the first image", "s")
    cold_cache_s: float = key(ABOVE, "first image of the first process of all", "s")
    import_s: float = key(NUMBER, "to import the library", "s")
    run_s: float = key(NUMBER, "of the first batch, decoded", "s")
    first_s: float = key(NUMBER, "from the start of the process to the first batch", "s")
    cost: list[dict[str, Any]] = key(
        _each(_of(images=COUNT, ms_per_image=ABOVE, extrapolated=TRUTH), 1), "of n images, everything included"
    )
    images: int = key(NUMBER, "made by all processes in `together_s`")
    together_s: float = key(NUMBER, "of the slowest process", "s")
    # checks of a GPU run
    check: str = key(TEXT, "name of a check")
    ok: bool = key(TRUTH, "whether it held")
    error: float = key(NUMBER, "how far it was off")
    allowed: float = key(NUMBER, "how far it may be off")
    part: str = key(TEXT, "a part of `benchmarks.gpu`")
    code: int | None = key(_or_none(NUMBER), "exit code of a part; null, in older rows -1: it was ended")
    passed: int = key(NUMBER, "tests")
    skipped: int = key(NUMBER, "tests")
    failures: list[str] = key(_each(TEXT), "a line for each test that failed")
    seconds: float = key(NUMBER, "that it took", "s")
    launches: float = key(NUMBER, "kernels of a step, or of an op")
    us: float = key(NUMBER, "of all kernels of a step on the device", "us")
    kernels: dict[str, Any] = key(_mapping, "launches and microseconds of each kernel by name")
    modelled: dict[str, Any] = key(_of(launches=NUMBER), "the same, counted without a GPU")
    speedup_over_eager: float | None = key(_or_none(NUMBER), "`speedup` of the first rows of ops")


RULES: dict[str, Rule] = {f.name: f.metadata["rule"] for f in fields(RowSchema)}
# of one target alone: `shape` is a list elsewhere, and nothing reads it
OWN: dict[str, dict[str, Rule]] = {
    "kernels": {"shape": TEXT},
    "checks": {"env": _of(**ENV_RULES, source=TEXT)},
    "training": {"parity": PARITY},
    "memory": {"peak_bytes": NUMBER},
}
# the keys that every row of a target has, and those of a row with a figure
LOOP, TIMED = ("provider", "preset", "batch", "steps"), ("median_s", "p10_s", "p90_s", "n", "raw_s")
ALWAYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("sampling", "export", "training", "startup", "memory", "solvers", "volumes"), LOOP),
    "scaling": (*LOOP, "processes"),
    "kernels": ("provider", "op", "shape", "layout", "dtype"),
    "checks": ("check",),
    "parity": ("part", "passed", "skipped", "failures", "seconds"),
    "launches": ("batch", "dtype", "modelled", "launches", "us"),
}
FIGURES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("sampling", "export", "volumes"), (*TIMED, "dtype", "ms_per_step", "ms_per_image", "parity")),
    "training": (*TIMED, "ms_per_step", "items_per_s", "minutes_per_100k_steps", "parity"),
    "startup": (*TIMED, "parts", "cold_cache_s"),
    "memory": ("peak_bytes", "device"),
    "solvers": (*TIMED, "solver", "ms_per_image"),
    "kernels": (*TIMED, "gb_s"),
    "checks": ("ok", "error", "allowed"),
}


def fault_of(row: Mapping[str, Any]) -> str:
    """What of a row no table, picture or verdict can use, or ''."""
    target = row["target"]
    if not isinstance(target, str):
        return f"target: got {reprlib.repr(target)}, allowed is {TEXT[1]}"
    rules = RULES | OWN.get(target, {})
    needed = {"env", *ALWAYS.get(target, ()), *(key for key in rules if key in row)}
    if not {"failed", "absent"} & set(row) or {"median_s", "raw_s", "rms"} & set(row):
        ceiling = target == "kernels" and row.get("op") == "ceilings"
        needed |= {*TIMED, "rate", "unit"} if ceiling else set(FIGURES.get(target, ()))
    if "flops" in row:
        needed |= {"moved", "again", "launches"}
    if "work" in row:
        rules |= {"dtype": FLOAT, "preset": PRESET}
    for key in sorted(needed):
        if key not in row or not rules[key][0](row[key]):
            return f"{key}: got {reprlib.repr(row[key]) if key in row else 'none'}, allowed is {rules[key][1]}"
    return _strange(row, "error" if target == "checks" else "")  # a check that is off beyond measure says so by it


def _strange(value: Any, open_: str, key: str = "", depth: int = 0) -> str:
    """What in a value, however deep, cannot be drawn or written, or ''; a float of the key `open_` may be anything."""
    if depth > DEEPEST:
        return f"{key}: got more than {DEEPEST} levels, allowed are fewer"
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        return f"{key!a}: got half a character, allowed is text"
    if _number(value) and not abs(value) <= MOST and not (key == open_ and isinstance(value, float)):
        return f"{key}: got {reprlib.repr(value)}, allowed is a number of at most {MOST:g}"
    inside = value.items() if isinstance(value, dict) else ((key, v) for v in value) if isinstance(value, list) else ()
    return next((why for k, v in inside if (why := _strange(k, "", k, depth) or _strange(v, open_, k, depth + 1))), "")


def described() -> list[tuple[str, str, str, str]]:
    """Name, type, unit and meaning of each key."""
    return [(f.name, str(f.type), f.metadata["unit"], f.metadata["meaning"]) for f in fields(RowSchema)]


if __name__ == "__main__":
    print("| key | type | unit | meaning |\n|---|---|---|---|")
    for name, kind, unit, meaning in described():
        print(f"| `{name}` | `{kind.replace('|', chr(92) + '|')}` | {unit} | {meaning} |")
