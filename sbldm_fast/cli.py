"""The command line: the roof, which imports the upper floors inside the commands."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import reprlib
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

from .cli_bench import Json, bench, place, report, say
from .errors import MissingExtra, UserError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)

Steps = Annotated[int, typer.Option()]
Scheduler = StrEnum("Scheduler", ["ddim", "ddpm", "dpm", "unipc"])
Format = StrEnum("Format", ["png", "npy", "nifti"])
Split = StrEnum("Split", ["subject", "slice"])
Amp = StrEnum("Amp", ["auto", "off", "fp16", "bf16"])
Prediction = StrEnum("Prediction", ["epsilon", "sample", "v_prediction"])
Dtype = StrEnum("Dtype", ["float32", "float16", "bfloat16"])
Target = StrEnum("Target", ["ort", "tensorrt"])
Precision = StrEnum("Precision", ["fp32", "fp16", "int8"])


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


@app.command()
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


@app.command()
def prepare(
    sources: Annotated[
        list[str], typer.Argument(help="NIfTI files, folders of NIfTI, DICOM or PNG/JPG, mni152, synthetic[:COUNT].")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", callback=place, help="Folder to write; one that prepare wrote is replaced.")
    ],
    split: Annotated[
        Split, typer.Option(help="subject keeps a subject in one split; slice leaks, as paper 001 does.")
    ] = Split.subject,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of the synthetic brains.")] = 42,
    volume: Annotated[int | None, typer.Option(min=0, help="Which volume of 4-D files.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Keep every n-th slice.")] = 1,
    subject: Annotated[
        str | None, typer.Option(help="Regular expression: its group is the subject in a file's name.")
    ] = None,
    covariates: Annotated[Path | None, typer.Option(help="CSV file, its first column the subject.")] = None,
    strict: Annotated[bool, typer.Option(help="Stop at the first unusable file.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read at a time (default: one per core).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn scans into training slices. Example: sbldm-fast prepare scans/ synthetic:20 -o data"""
    from sbldm_fast.data import prepare as run

    if split == "slice":
        print("warning: --split slice puts slices of one subject into train and test", file=sys.stderr)
    manifest = run(
        sources,
        out,
        split=split.value,
        seed=seed,
        volume=volume,
        every=every,
        subject=subject,
        covariates=covariates,
        strict=strict,
        workers=workers or os.cpu_count() or 1,
        progress=not as_json,
    )
    done = {
        "out": str(out),
        "slices": len(manifest["slices"]),
        "subjects": manifest["subjects"],
        "split": manifest["split"]["slices"],
        "skipped": manifest["skipped"],
        "without_covariates": manifest["without_covariates"],
    }
    for one in manifest["skipped"]:
        print(f"skipped {one['source']}: {one['reason']}", file=sys.stderr)
    for one in manifest["without_covariates"]:
        print(f"without covariates {one}: {covariates} has no row for it; its slices are kept", file=sys.stderr)
    if as_json:
        print(json.dumps(done))
        return
    table: dict[tuple[str, str, str], list[Any]] = {}
    for row in manifest["slices"]:
        line = table.setdefault((row["source"].split("/")[0], row["modality"], row["split"]), [set(), set(), 0])
        line[0].add(row["subject"])
        line[1].add((row["subject"], row["source"]))
        line[2] += 1
    print(f"{'source':24} {'modality':9} {'split':6} {'subjects':>8} {'scans':>6} {'slices':>7}")
    for (source, modality, part), (people, scans, count) in sorted(table.items()):
        print(f"{source[:24]:24} {modality:9} {part:6} {len(people):8} {len(scans):6} {count:7}")
    summary = (
        f"{_many(len(manifest['slices']), 'slice')} of {_many(manifest['subjects'], 'subject')},"
        f" {len(manifest['skipped'])} skipped"
    )
    lacking = f", {len(manifest['without_covariates'])} without covariates" if covariates else ""
    print(f"{summary}{lacking}; look at {out / 'contact_sheet.png'}")


def _many(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


@app.command()
def train(
    out: Annotated[
        Path, typer.Argument(callback=place, help="Run folder: log, checkpoints and, at the end, pipeline/.")
    ],
    data: Annotated[Path, typer.Option(help="A folder that prepare wrote.")],
    preset: Annotated[str, typer.Option(help="paper, template or demo.")] = "demo",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder, if there is one.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the UNet.")] = 100_000,
    vae_steps: Annotated[int | None, typer.Option(min=1, help="Steps of the VAE (default: as --steps).")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch of the UNet.")] = 16,
    vae_batch: Annotated[int, typer.Option(min=1, help="Batch of the VAE.")] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate of the UNet.")] = 2e-4,
    vae_lr: Annotated[float, typer.Option(help="Learning rate of the VAE.")] = 1e-4,
    warmup: Annotated[int, typer.Option(min=0, help="Warmup steps of both, a tenth of all at most.")] = 1000,
    ema_decay: Annotated[float, typer.Option(min=0, max=0.99999)] = 0.9999,
    views: Annotated[int, typer.Option(min=1, help="Augmented copies of each slice among the latents.")] = 4,
    l1: Annotated[bool, typer.Option("--l1", help="L1 instead of MSE for the VAE.")] = False,
    prediction_type: Annotated[Prediction | None, typer.Option(help="Default: that of the preset.")] = None,
    min_snr: Annotated[float | None, typer.Option(help="Gamma of min-SNR weighting, 5 in its paper.")] = None,
    frequency: Annotated[
        tuple[float, float, float], typer.Option(help="Weight of low and high frequencies, cutoff.")
    ] = (1, 1, 0.25),
    spectral: Annotated[float, typer.Option(help="Lambda of 001 equation 4, 0.1 there; it rescales the loss.")] = 0.0,
    cutmix: Annotated[float, typer.Option(help="Probability of latent CutMix, 0.25 in 001.")] = 0.0,
    amp: Annotated[Amp, typer.Option(help="auto: bf16 where native, else fp16 on CUDA.")] = Amp.auto,
    compiled: Annotated[bool, typer.Option("--compile", help="Train through torch.compile.")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints and validations.")] = 1000,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints to keep of each stage, beside the best.")] = 3,
    seed: Annotated[int, typer.Option(min=0, max=2**40 - 1, help="Of weights, order and noise.")] = 0,
    as_json: Json = False,
) -> None:
    """Train the VAE, then the UNet. Example: sbldm-fast train run --data data --preset demo --steps 200 --vae-steps 100

    On several devices: torchrun --nproc-per-node=2 -m sbldm_fast train run --data data
    """
    import torch

    from sbldm_fast import preset as find
    from sbldm_fast.training import Objective, Stopped, TrainConfig, torchrun, train_pipeline
    from sbldm_fast.training.checkpoint import read_log

    def stage(steps: int, batch: int, lr: float, ema: float) -> TrainConfig:
        return TrainConfig(
            steps,
            batch,
            lr,
            warmup=min(warmup, steps // 10),
            ema_decay=ema,
            seed=seed,
            amp=amp.value,
            compile=compiled,
            save_every=save_every,
            keep=keep,
        )

    p = find(preset)
    if prediction_type is not None:
        p = p._replace(scheduler=replace(p.scheduler, prediction_type=prediction_type.value))
    start = time.monotonic()
    with torchrun() as device:
        try:
            result = train_pipeline(
                p,
                data,
                out,
                vae=stage(vae_steps or steps, vae_batch, vae_lr, 0.0),
                unet=stage(steps, batch, lr, ema_decay),
                objective=Objective(*frequency, spectral, cutmix, min_snr),
                recon="l1" if l1 else "mse",
                views=views,
                resume=resume,
                device=device,
                progress=not as_json,
            )
        except Stopped as stopped:
            print(f"sbldm-fast: {stopped}; the same command with --resume continues", file=sys.stderr)
            raise typer.Exit(130) from None
        if torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
    result |= {"pipeline": str(out / "pipeline"), "seconds": round(time.monotonic() - start, 1)}
    # a run that was continued took longer than this part of it
    result["training_seconds"] = round(sum({row["stage"]: row["seconds"] for row in read_log(out)}.values()), 1)
    text = (
        f"trained on {result['slices']} slices of {_many(result['subjects'], 'subject')} in {result['seconds']} s, "
        f"{result['training_seconds']} s of training in all: {result['pipeline']}"
    )
    print(json.dumps(result) if as_json else text)


@app.command()
def sample(
    pipeline: Annotated[str, typer.Argument(help="A pipeline folder, or demo for the bundled weights.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", callback=place, help="Folder for the images; run again, it is completed.")
    ],
    n: Annotated[int, typer.Option("-n", min=1, max=2**31 - 1, help="How many images.")] = 16,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Solver steps, 1 to 1000.")] = 50,
    scheduler: Annotated[Scheduler, typer.Option(help="dpm and unipc need diffusers.")] = Scheduler.ddim,
    mode: Annotated[
        str, typer.Option(help="auto, eager, compile, step-graph, loop-graph, a torch.compile mode, or graph+mode.")
    ] = "auto",
    eta: Annotated[float, typer.Option(help="0: DDIM, 1: the noise of DDPM.")] = 0.0,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time, at most.")] = 16,
    dtype: Annotated[Dtype | None, typer.Option(help="Arithmetic of the UNet (default: float32).")] = None,
    form: Annotated[Format, typer.Option("--format", help="A PNG each, one array, or one NIfTI stack.")] = Format.png,
    as_json: Json = False,
) -> None:
    """Make images, the missing ones. Example: sbldm-fast sample demo -n 16 --seed 0 -o images

    On several devices: torchrun --nproc-per-node=2 -m sbldm_fast sample demo -n 64 -o images
    """
    import torch

    from sbldm_fast.images import NOTICE
    from sbldm_fast.sampling.job import sample_to_folder

    start = time.monotonic()
    try:
        done = sample_to_folder(
            pipeline,
            out,
            n,
            seed=seed,
            steps=steps,
            scheduler=scheduler.value,
            mode=mode,
            eta=eta,
            dtype=None if dtype is None else getattr(torch, dtype.value),
            batch_size=batch,
            form=form.value,
            progress=not as_json,
        )
    except KeyboardInterrupt:
        print(
            f"sbldm-fast: interrupted; what is finished stays in {out}, the same command makes the rest",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    if done["rank"]:
        return
    seconds = time.monotonic() - start
    rate = done["made"] / seconds
    done |= {"seconds": round(seconds, 2), "images_per_s": round(rate, 3), "notice": NOTICE}
    print(f"mode {done['mode']}: {done['reason']}", file=sys.stderr)
    text = (
        f"{_many(done['made'], 'image')} in {seconds:.1f} s ({rate:.2f}/s), {done['kept']} were there: {out}; {NOTICE}"
    )
    print(json.dumps(done) if as_json else text)


@app.command()
def evaluate(
    pipeline: Annotated[str, typer.Argument(help="A pipeline folder, or demo for the bundled weights.")],
    data: Annotated[Path, typer.Option(help="The folder that prepare wrote and train read.")],
    out: Annotated[Path, typer.Option("-o", "--out", callback=place, help="Folder to write.")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many samples.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    steps: Steps = 50,
    as_json: Json = False,
) -> None:
    """Look whether samples are copies of training slices. Example: sbldm-fast evaluate demo --data data -o
    evaluation"""
    from sbldm_fast import Pipeline
    from sbldm_fast.evaluation.memorisation import memorisation

    report = memorisation(
        Pipeline.from_pretrained(pipeline), data, out, n=n, seed=seed, steps=steps, progress=not as_json
    )
    if as_json:
        print(json.dumps(report))
        return
    print(f"{'distance to the nearest training slice':42} {'min':>7} {'p10':>7} {'median':>7} {'p90':>7}")
    for by in ("pixels", "latents"):
        for who in ("samples", "unseen"):
            q = report[by][who]
            print(f"{by + ': ' + who:42} {q['min']:7.3f} {q['p10']:7.3f} {q['median']:7.3f} {q['p90']:7.3f}")
    near = {by: report[by]["samples_nearer_than_unseen_p1"] for by in ("pixels", "latents")}
    said = "none looks like a copy" if not any(near.values()) else "look at these for copies"
    print(
        f"{near['pixels']} by pixels and {near['latents']} by latents of {report['samples']} samples lie nearer to one"
        f" of {report['training_slices']} training slices than 99 of 100 unseen slices do: {said}; see"
        f" {out / 'neighbours.png'}"
    )


@app.command()
def export(
    pipeline: Annotated[
        str | None, typer.Argument(help="A pipeline folder, demo, or a folder that holds a diffusers UNet2DModel.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", callback=place, help="Folder to write.")] = None,
    target: Annotated[Target, typer.Option(help="ort: opset 18; tensorrt: opset 21.")] = Target.ort,
    dtype: Annotated[
        Precision, typer.Option(help="Norms and softmax stay in fp32; int8: wide convolutions, on a CPU.")
    ] = Precision.fp32,
    batch: Annotated[
        str, typer.Option(help="Of step, and for tensorrt of all graphs: a number or dynamic.")
    ] = "dynamic",
    scheduler: Annotated[Scheduler | None, typer.Option(help="Default: ddim, or that of a diffusers folder.")] = None,
    steps: Annotated[int, typer.Option(help="Solver steps, 1 to 1000.")] = 50,
    eta: Annotated[float, typer.Option(help="0: DDIM, 1: the noise of DDPM.")] = 0.0,
    license: Annotated[
        str | None, typer.Option(help="Of the weights, for the manifest (default: as in model_index.json).")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a folder that holds something else.")] = False,
    checked: Annotated[
        Path | None, typer.Option("--check", help="Verify this exported folder instead; with PIPELINE, against it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write ONNX graphs and prove them. Example: sbldm-fast export demo -o onnx && sbldm-fast export --check onnx"""
    from sbldm_fast import Pipeline
    from sbldm_fast.export import check
    from sbldm_fast.export import export as run
    from sbldm_fast.export.exporter import MAX_BATCH
    from sbldm_fast.export.foreign import load

    if checked is not None:
        report = check(checked, None if pipeline is None else Pipeline.from_pretrained(pipeline))
        _print_check(checked, report, as_json)
        return
    if pipeline is None or out is None:
        raise typer.BadParameter(
            "got none, allowed is PIPELINE -o OUT, or --check FOLDER", param_hint="PIPELINE, --out"
        )
    if batch != "dynamic" and not (re.fullmatch("[0-9]{1,9}", batch) and 1 <= int(batch) <= MAX_BATCH):
        raise typer.BadParameter(
            f"got {reprlib.repr(batch)}, allowed is 1 to {MAX_BATCH}, or dynamic", param_hint="--batch"
        )
    source, own = load(pipeline)
    if scheduler is not None and "scheduler" in own:
        raise typer.BadParameter(
            f"got {scheduler}, allowed with a diffusers folder is none: it has its own", param_hint="--scheduler"
        )
    own = (
        {"scheduler": "ddim" if scheduler is None else scheduler.value}
        | own
        | ({} if license is None else {"license": license})
    )
    manifest = run(
        source,
        out,
        target=target.value,
        dtype=dtype.value,
        batch=batch if batch == "dynamic" else int(batch),
        steps=steps,
        eta=eta,
        force=force,
        progress=not as_json,
        **own,
    )
    if as_json:
        print(json.dumps(manifest))
        return
    for name, graph in manifest["graphs"].items():
        norms = f", {graph['fused_norms']} of {graph['norms']} norms fuse" if "norms" in graph else ""
        print(
            f"{out / name}.onnx: opset {manifest['opset']}, {graph['bytes'] / 1e6:.1f} MB, "
            f"error {graph['parity']['error']:.1e} (allowed {graph['parity']['allowed']:.1e}){norms}"
        )


def _print_check(folder: Path, report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
    else:
        for name, found in report["graphs"].items():
            print(f"{folder / name}.onnx: " + ", ".join(f"{k} {_brief(v)}" for k, v in found.items()))
        for line in report["remarks"]:
            print(f"remark: {line}")
        print(_verdict(folder, report))
    for line in report["failures"]:
        print(f"FAILED {line}", file=sys.stderr)
    if report["failures"]:
        raise typer.Exit(1)


def _verdict(folder: Path, report: dict[str, Any]) -> str:
    if report["failures"]:
        return f"FAILED: {folder}, {_many(len(report['failures']), 'fault')}"
    lines = [f"PASSED: {folder}"]
    if alone := report["not_compared"]:
        how = f"sbldm-fast export PIPELINE --check {folder}" if "vae_encoder" in report["graphs"] else ""
        why = f"to compare them: {how}" if how else "only their export could: the model is not here"
        lines.insert(0, f"not compared with PyTorch: {', '.join(alone)}; {why}")
    return "\n".join(lines)


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return f"built in {value['seconds']} s" if value.get("built") else "not built"
    return f"{value:.1e}" if isinstance(value, float) else str(value)


app.command()(bench)
app.command()(report)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", callback=place, help="Folder to write.")] = Path("demo"),
) -> None:
    """See it all work: doctor, 16 images, latency against diffusers, ONNX. Example: sbldm-fast demo -o demo"""
    import torch

    from sbldm_fast import Pipeline
    from sbldm_fast.benchmarks.harness import failures
    from sbldm_fast.benchmarks.providers import FLOAT, Diffusers, Ours, Reference, providers
    from sbldm_fast.benchmarks.rows import append
    from sbldm_fast.benchmarks.suite_sampling import bench_sampling as measure
    from sbldm_fast.benchmarks.table import sampling_table
    from sbldm_fast.doctor import doctor as examine
    from sbldm_fast.export import export as run
    from sbldm_fast.files import whole_file
    from sbldm_fast.images import save_grid, to_uint8

    start = time.monotonic()
    print("1/4 doctor")
    found = examine()
    print_doctor(found)
    print("2/4 sixteen images from the bundled weights, 50 DDIM steps")
    pipe = Pipeline.from_pretrained("demo").to("cuda" if torch.cuda.is_available() else "cpu")
    images = pipe.sample(16, seed=0, steps=50, progress=True)
    save_grid(to_uint8(images), out / "samples.png")
    print("3/4 latency of the paper-size UNet against diffusers")
    who = [p for p in providers(images.device, [FLOAT]) if p == Reference() or type(p) in (Ours, Diffusers)]
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
{out}/samples.png    16 images; success: they look like axial brain slices (synthetic, not for diagnosis)
{out}/latency.md     success: every provider has a speed-up, so every one agreed with its reference{warning}
{out}/latency.jsonl  the same, row by row, with the raw timings
{out}/onnx/          five graphs, manifest.json, example.npz; ONNX Runtime differs from PyTorch by {worst:.1e}
demo {"finished" if ok else "FAILED"} in {time.monotonic() - start:.0f} s""")
    if not ok:
        raise typer.Exit(1)


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
