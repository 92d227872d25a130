"""The suites by name: what each runs, briefly and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .rows import Row
from .suite_export import bench_export
from .suite_kernels import bench_kernels
from .suite_process import bench_memory, bench_scaling, bench_startup
from .suite_sampling import bench_sampling
from .suite_solvers import bench_solvers
from .suite_training import bench_training
from .suite_volumes import bench_volumes


class Suite(NamedTuple):
    """What yields the rows, and the arguments of `--quick`: a minute or less on two cores."""

    run: Callable[..., Iterator[Row]]
    quick: dict[str, Any]


SUITES = {
    "kernels": Suite(bench_kernels, {"rounds": 6, "large": False, "compiled": False}),
    "sampling": Suite(
        bench_sampling, {"steps": [10], "batches": [1], "rounds": 6, "compiled": False, "dtypes": ["float32"]}
    ),
    "training": Suite(bench_training, {"steps": 1, "rounds": 6, "compiled": False}),
    "export": Suite(bench_export, {"steps": [10], "batches": [1], "rounds": 6, "compiled": False}),
    "memory": Suite(bench_memory, {"steps": 2, "batches": [1], "compiled": False}),
    "startup": Suite(bench_startup, {"steps": 10, "rounds": 1, "compiled": False}),
    "scaling": Suite(bench_scaling, {"steps": 10, "batch": 4, "seconds": 4.0, "compiled": False}),
    "volumes": Suite(
        bench_volumes, {"steps": [2], "rounds": 6, "compiled": False, "dtypes": ["float32"], "small": True}
    ),
    "solvers": Suite(bench_solvers, {"batch": 1, "steps": [4, 12], "rounds": 6, "judged": 2}),
}
