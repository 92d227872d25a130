"""The command line. A command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import sys
import threading
import time
import warnings
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_ask import Asking, ask
from .cli_bench import bench, report
from .cli_evaluate import ablate, evaluate
from .cli_export import export
from .cli_options import Eta, Json, OutFolder, PipelineFolder, Seed, Solver, Steps, count, place, say
from .cli_train import distill, prepare, train, train_volume
from .cli_volume import Positions, Volume, check_options, sample_volumes
from .errors import MissingExtra, UserError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)

Format = StrEnum("Format", ["png", "npy", "nifti", "dicom"])
Dtype = StrEnum("Dtype", ["float32", "float16", "bfloat16"])


def _version(asked: bool) -> None:
    if asked:
        print(f"sbldm_fast {importlib.metadata.version('sbldm_fast')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make training slices of brain MRI, train latent diffusion on them, sample, export to ONNX, and measure all of
    it."""


def doctor(as_json: Json = False) -> None:
    """Say what this machine can do and check each op. Example: sbldm-fast doctor --json"""
    from sbldm_fast.doctor import doctor as examine

    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_doctor(report)
    if not report["ok"]:
        raise typer.Exit(1)


def print_doctor(report: dict[str, Any]) -> None:
    """The report as lines to read."""
    print("versions     " + ", ".join(f"{k} {v}" for k, v in report["packages"].items()))
    print(
        f"machine      {report['gpu'] or report['cpu']}, {report['cores']} cores, {report['threads']} threads,"
        f" {report['cpu_capability']}"
    )
    if report["no_gpu"]:
        print(f"no GPU       {report['no_gpu']}")
    print(f"bf16         {'native' if report['native_bf16'] else 'not native'}")
    print(f"backend      {report['backend']['name']}: {report['backend']['reason']}")
    for op, check in report["parity"].items():
        print(f"{op:16} error {check['error']:.1e} {'ok' if check['ok'] else 'WRONG'}")
    for auto in report["auto"]:
        print(f"mode auto    {auto['images']} images of {auto['steps']} steps: {auto['mode']} ({auto['reason']})")


# The options of sample and population that bear the names of arguments of Pipeline.sample; a pipeline's covariates are
# options beside them.
Guidance = Annotated[float | None, typer.Option(help="How strongly the condition is followed: 1 as trained, 2 more.")]
Interval = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Guide between these timesteps alone, which go from 0, no noise, up."),
]
Extrapolate = Annotated[bool, typer.Option("--extrapolate", help="Take values outside the trained range.")]
Images = Annotated[
    Path,
    typer.Option("-o", "--out", callback=place, help="Folder for images, run again it is completed; a volume's file."),
]
Mode = Annotated[
    str, typer.Option(help="auto, eager, compile, step-graph, loop-graph, a torch.compile mode, or graph+mode.")
]
Count = Annotated[
    int | None,
    typer.Option(
        "-n",
        min=1,
        max=2**31 - 1,
        help="How many (default: the table's rows; without one 16, 1 volume, and 100 in a population).",
    ),
]
Table = Annotated[Path | None, typer.Option(help="CSV or TSV file: a column a covariate, a row an image.")]
Processed = Annotated[
    int, typer.Option(min=1, help="Images at a time, at most; of a volume slices, else all at a time.")
]
ASKING: dict[str, Any] = {"cls": Asking, "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}}


def sample(
    context: typer.Context,
    pipeline: PipelineFolder,
    out: Images,
    n: Count = None,
    seed: Seed = 0,
    steps: Steps = None,
    scheduler: Solver = None,
    mode: Mode = "auto",
    eta: Eta = 0.0,
    batch_size: Processed = 16,
    dtype: Annotated[Dtype | None, typer.Option(help="Arithmetic of the UNet (default: float32).")] = None,
    format: Annotated[
        Format | None, typer.Option(help="png each, one npy array, or one nifti stack; of a volume nifti or dicom.")
    ] = None,
    volume: Volume = False,
    positions: Positions = None,
    table: Table = None,
    guidance: Guidance = None,
    guidance_interval: Interval = None,
    extrapolate: Extrapolate = False,
    student: Annotated[
        bool,
        typer.Option("--student", help="By its student of few calls; of a folder, by the pipeline in its student/."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make images, the missing ones. Example: sbldm-fast sample demo --modality T2 --age 70 -n 8 -o images

    What a pipeline can be asked for, as --modality here, `sbldm-fast sample PIPELINE --help` lists.

    A whole brain: sbldm-fast sample demo --volume --age 70 -o brain.nii.gz

    On several devices: torchrun --nproc-per-node=2 -m sbldm_fast sample demo -n 64 -o images
    """
    import torch

    from sbldm_fast.sampling.job import Settings
    from sbldm_fast.sampling.pipeline import BUNDLED

    if student:
        pipeline = "demo-student" if pipeline == "demo" else str(Path(pipeline) / "student")
        if pipeline not in BUNDLED and not Path(pipeline).is_dir():
            raise UserError(f"student: got none in {pipeline}, allowed is demo, or a folder with student/")
    given = check_options(context, volume, format and format.value)
    asked, n = ask(pipeline, context.args, table, n, 1 if volume else 16, extrapolate=extrapolate)
    precision = None if dtype is None else getattr(torch, dtype.value)
    form = "png" if volume or format is None else format.value
    settings = Settings(seed, steps, scheduler and scheduler.value, mode, eta, precision, batch_size, form, asked)
    settings = replace(settings, guidance_scale=guidance, guidance_interval=guidance_interval, extrapolate=extrapolate)
    if volume:
        _check_guidance(settings, True)
        form, window = "dicom" if format == Format.dicom else "nifti", batch_size if "batch_size" in given else None
        sample_volumes(pipeline, out, n, settings, form, positions, window, as_json)
    else:
        _run(pipeline, out, n, settings, as_json)


def population(
    context: typer.Context,
    pipeline: PipelineFolder,
    out: Annotated[Path, typer.Option("-o", "--out", callback=place, help="Folder for the cohort, as BIDS has it.")],
    n: Count = None,
    seed: Seed = 0,
    steps: Steps = None,
    scheduler: Solver = None,
    batch_size: Processed = 16,
    table: Table = None,
    guidance: Guidance = None,
    extrapolate: Extrapolate = False,
    as_json: Json = False,
) -> None:
    """Make a cohort of known covariates, a subject a slice. Example: sbldm-fast population demo -n 100 -o cohort

    Covariates come from a table, or are drawn evenly over what the pipeline was trained on; those named as options are
    the same for all. Run again, it is completed; torchrun splits it.
    """
    from sbldm_fast.sampling.job import Settings

    asked, n = ask(pipeline, context.args, table, n, 100, drawn=None if table else seed, extrapolate=extrapolate)
    settings = Settings(seed, steps, scheduler and scheduler.value, batch_size=batch_size, format="bids", asked=asked)
    _run(pipeline, out, n, replace(settings, guidance_scale=guidance, extrapolate=extrapolate), as_json)


def _check_guidance(settings: Any, asked: bool) -> None:
    if settings.guidance_scale is not None and not asked:
        raise typer.BadParameter(
            "got a value, allowed where the pipeline is asked for something", param_hint="--guidance"
        )
    if settings.guidance_interval is not None and settings.guidance_scale is None:
        raise typer.BadParameter("got a value, allowed with --guidance", param_hint="--guidance-interval")


def _run(pipeline: str, out: Path, n: int, settings: Any, as_json: bool) -> None:
    """Make the missing images of a job, and say what came of it."""
    from sbldm_fast.images import NOTICE
    from sbldm_fast.sampling.job import sample_to_folder

    _check_guidance(settings, bool(settings.asked))
    start = time.monotonic()
    try:
        done = sample_to_folder(pipeline, out, n, settings, progress=not as_json)
    except KeyboardInterrupt:
        say(f"sbldm-fast: interrupted; what is finished stays in {out}, the same command makes the rest")
        raise typer.Exit(130) from None
    if done["rank"]:
        return
    seconds = time.monotonic() - start
    rate = done["made"] / seconds
    done |= {"seconds": round(seconds, 2), "images_per_s": round(rate, 3), "notice": NOTICE}
    say(f"mode {done['mode']}: {done['reason']}")
    text = (
        f"{count(done['made'], 'image')} in {seconds:.1f} s ({rate:.2f}/s), {done['kept']} were there: {out}; {NOTICE}"
    )
    print(json.dumps(done) if as_json else text)


def demo(
    out: OutFolder = Path("demo"),
) -> None:
    """Run doctor, ask teacher and student for 54 images, measure latency, export to ONNX. Example: sbldm-fast demo"""
    from sbldm_fast import Pipeline
    from sbldm_fast.benchmarks.harness import failures
    from sbldm_fast.benchmarks.providers import FLOAT, Diffusers, Ours, Reference, providers
    from sbldm_fast.benchmarks.rows import append
    from sbldm_fast.benchmarks.suite_sampling import bench_sampling as measure
    from sbldm_fast.benchmarks.table import sampling_table
    from sbldm_fast.doctor import doctor as examine
    from sbldm_fast.export import export as run
    from sbldm_fast.files import whole_file
    from sbldm_fast.machine import default_device

    start = time.monotonic()
    print("1/4 doctor")
    found = examine()
    print_doctor(found)
    print("2/4 54 images that the bundled weights are asked for, and of the same seeds by their student of few calls")
    pipe, student = (Pipeline.from_pretrained(name).to(default_device()) for name in ("demo", "demo-student"))
    told = [_ask_for_54(one, out / name) for one, name in ((pipe, "samples.png"), (student, "student.png"))]
    print("; ".join(told))
    print("3/4 latency of the paper-size UNet against diffusers")
    who = [p for p in providers(default_device(), [FLOAT]) if p == Reference() or type(p) in (Ours, Diffusers)]
    rows = list(measure(steps=(50,), batches=(1,), rounds=3, who=who, energy=False, say=say))
    append(out / "latency.jsonl", rows)
    table = sampling_table(rows).markdown()
    with whole_file(out / "latency.md") as aside:
        aside.write_text(table + "\n")
    print(table)
    print("4/4 ONNX export")
    manifest = run(pipe, out / "onnx", progress=True)
    worst = max(g["parity"]["error"] for g in manifest["graphs"].values())
    wrong = failures(rows)
    ok = found["ok"] and not wrong
    warning = f"; FAILED: {', '.join(wrong)}" if wrong else ""
    print(f"""
{out}/samples.png    54 images, rows T1, T2, FLAIR at 30, 55 and 80 years, columns -40 to 50 mm; success: axial brain
                     slices in these contrasts, from the base to the top (synthetic, not for diagnosis)
{out}/student.png    the same by the student; success: the same brains in each place, in less time
{out}/latency.md     success: every provider has a speed-up, so every one agreed with its reference{warning}
{out}/latency.jsonl  the same, row by row, with the raw timings
{out}/onnx/          five graphs, manifest.json, example.npz; ONNX Runtime differs from PyTorch by {worst:.1e}
demo {"finished" if ok else "FAILED"} in {time.monotonic() - start:.0f} s""")
    if not ok:
        raise typer.Exit(1)


def _ask_for_54(pipe: Any, path: Path) -> str:
    """Write what a pipeline makes of age, modality and position; its calls, and the milliseconds of an image."""
    from itertools import product

    from sbldm_fast.images import NOTICE, save_grid, to_uint8

    asked = product((30, 55, 80), ("T1", "T2", "FLAIR"), (-40, -20, 0, 14, 30, 50))
    cond = dict(zip(("age", "modality", "position"), zip(*asked, strict=True), strict=True))
    seconds = []
    for _ in range(3):  # the first also makes what is made once
        start = time.perf_counter()
        images = pipe.sample(54, seed=0, cond=cond, batch_size=18)
        seconds.append(time.perf_counter() - start)
    each = 1e3 * min(seconds) / len(images)
    what = f"{pipe.default_steps()} calls, {each:.1f} ms an image"
    save_grid(to_uint8(images), path, f"{NOTICE}; {what}", columns=6)
    return f"{path.name}: {what}"


# in the order of --help
for command in (
    doctor,
    prepare,
    train,
    train_volume,
    distill,
    sample,
    population,
    evaluate,
    ablate,
    export,
    bench,
    report,
    demo,
):
    app.command(**(ASKING if command in (sample, population) else {}))(command)


def main() -> None:
    """Run the command line: 0 ok, 1 failed with one sentence, 2 bad usage, 130 interrupted."""
    from sbldm_fast.files import printable

    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as for a daemon
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  # as long as the process
        elif hasattr(stream, "reconfigure"):  # a name that the terminal cannot show is no reason to end
            stream.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():
        # as an exception, so that what is half written is cleared; training has its own handler while it runs
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"warning: {printable(str(message))}", file=sys.stderr)
            app()
    except OSError as error:
        said = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    except (UserError, MissingExtra) as error:
        said = str(error)
    except KeyboardInterrupt:  # before a command could say it
        print("sbldm-fast: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception:
        print(
            "sbldm-fast: this is a bug; please report it with the lines below and what doctor --json says",
            file=sys.stderr,
        )
        raise
    else:
        return
    sys.exit(f"sbldm-fast: {printable(said)}")


if __name__ == "__main__":
    main()
