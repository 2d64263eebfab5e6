"""The command line: parses, calls, prints, exits. No logic of its own."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from edgeprune import __version__
from edgeprune.cli_boards import boards_app
from edgeprune.cli_ci import ci
from edgeprune.cli_devices import devices_app
from edgeprune.cli_distill import count_of
from edgeprune.cli_distill import distill as distill_command
from edgeprune.cli_look import AsJson, device_names, doctor, inspect, predict
from edgeprune.cli_measure import BoardName, Gate, Threads, bench, compare, evaluate
from edgeprune.cli_measure import tune as tune_command
from edgeprune.cli_prune import Calibration, Seed, prune
from edgeprune.cli_recover import duration, recover
from edgeprune.cli_ship import To, check_runtimes, report, ship, targets_of, verify
from edgeprune.cli_talk import chat, serve
from edgeprune.cli_vocabulary import vocabulary
from edgeprune.cores import available_cores, container_quota
from edgeprune.errors import EXTRAS, BadInput, EdgepruneError, StageFailed, missing_extra
from edgeprune.files import result_folder
from edgeprune.output import Stages, console, escape, print_json, print_proposal, print_table, problem

app = typer.Typer(
    name="edgeprune",
    help="Puts language models on small devices: structured pruning under a device's budget, proved by measurement.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


Model = Annotated[
    str,
    typer.Option("--model", "-m", help="Hub id, folder, .gguf file, or a demo: demo, gemma3-270m.", metavar="MODEL"),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.", show_default=False)]


def _tell_version(asked: bool) -> None:
    if asked:
        console.print(f"edgeprune {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    # No docstring: it would stand for the program's own help.
    pass


@app.command()
def fit(
    model: Model = "demo",
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            "-d",
            help="Profile name, path of a .toml, or host. Default: the board's own entry, else host.",
            autocompletion=device_names,
        ),
    ] = None,
    min_tps: Annotated[float | None, typer.Option("--min-tps", help="Decode, tokens/s, at least.")] = None,
    max_memory: Annotated[
        float | None,
        typer.Option("--max-memory", help="Memory, MiB, at most: the process's, or the GPU's where it has its own."),
    ] = None,
    max_file: Annotated[float | None, typer.Option("--max-file", help="Size of the model file, MiB, at most.")] = None,
    context: Annotated[
        int | None, typer.Option("--context", "-c", help="Tokens the cache must hold. Default: 2048.")
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option("--quant", "-q", help="Quantisations to try, by commas: Q4_0,Q8_0,int4 … Default: all usual."),
    ] = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="Only this runtime: llamacpp or onnxruntime.")
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(
            "--ratios", help="With --method amp: shares of all parameters to try removing, by commas: 0.1,0.2 …"
        ),
    ] = None,
    calibration: Calibration = None,
    distill: Annotated[
        str | None,
        typer.Option("--distill", help="Distil the text of --calibration to so many tokens first: 64k."),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="Text file to judge on. Default: text the model writes itself.")
    ] = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option("--corpus", help="Text the model will be used for: lets obs drop tokens that it hardly uses."),
    ] = None,
    out: Out = None,
    threads: Threads = None,
    method: Annotated[
        str, typer.Option("--method", help="obs: per-layer plans by measured damage, least squares; amp: the paper's.")
    ] = "obs",
    uniform: Annotated[
        bool, typer.Option("--uniform", help="The same widths in every layer, which stock transformers loads.")
    ] = False,
    recover: Annotated[
        str | None, typer.Option("--recover", help="Train the best pruned candidate so long before export: 20m, 2h.")
    ] = None,
    max_candidates: Annotated[
        int | None,
        typer.Option(
            "--max-candidates",
            min=1,
            help="Pruned candidates to make at most, beside the other runtime's best. Default: 2 (amp: 10).",
            show_default=False,
        ),
    ] = None,
    max_time: Annotated[
        str | None, typer.Option("--max-time", help="Measure no further candidate after this long: 90s, 15m, 2h.")
    ] = None,
    seed: Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Use trials that an earlier run finished.")
    ] = True,
    board: BoardName = None,
    tune: Annotated[
        bool, typer.Option("--tune/--no-tune", help="Where speed is measured, find threads and settings of what ships.")
    ] = True,
    gate: Gate = True,
    to: To = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find the version of a model that loses least within a device's budget; export, measure and bundle it."""
    from edgeprune.boards import device_of
    from edgeprune.devices import Budget, load_profile
    from edgeprune.errors import unknown
    from edgeprune.models import resolve
    from edgeprune.runtimes.bench import GATE_S

    named = device or device_of(board)
    profile = load_profile(named)
    budget = Budget.of(
        profile, min_tokens_per_s=min_tps, max_memory_mib=max_memory, max_file_mib=max_file, context=context
    )
    chosen: dict[str, Any] = {
        "calibration": calibration,
        "held_out": held_out,
        "distill": count_of(distill, "--distill") if distill else None,
        "corpus": tuple(corpus or ()),
        "limit": max_candidates,
        "method": method,
        "uniform": uniform,
        "recovery_s": duration(recover, "--recover") if recover else 0.0,
        "max_time_s": duration(max_time, "--max-time") if max_time else None,
        "resume": resume,
        "seed": seed,
        "targets": _targets(quant, runtime),
        "threads": threads or available_cores(),
        "gate_s": GATE_S if gate else None,
        "board": board,
        "tune": tune,
    }
    wanted = targets_of(to)
    check_runtimes(wanted, {target.runtime for target in chosen["targets"]})
    if ratios:
        chosen["ratios"] = _numbers(ratios, "--ratios")
    with Stages() as stages:
        resolve(model, say=stages.say)
    # Not before: importing torch takes seconds, and a slip in an option should not.
    from edgeprune.estimate import estimate
    from edgeprune.fitting import FIT_METHODS, FitOptions, prepare
    from edgeprune.fitting import fit as run_fit
    from edgeprune.report import measured_table

    if method not in FIT_METHODS:
        raise unknown("method", method, FIT_METHODS)
    with Stages() as stages:
        if dry_run:
            options = FitOptions(**chosen)
            _, proposal = prepare(model, profile, budget, options, progress=stages)
            print_proposal(proposal, estimate(proposal, options))
            if as_json:
                print_json([candidate.to_json() for candidate in proposal.candidates])
            return
        result = run_fit(
            model,
            named,
            budget,
            out=out,
            on_proposal=lambda proposal: print_proposal(proposal, estimate(proposal, FitOptions(**chosen))),
            progress=stages,
            **chosen,
        )
    if as_json:
        print_json(json.loads((result.out / "fit.json").read_text(encoding="utf-8")))
        list(_shipped(result.out, wanted, model, chosen["threads"]))
        return
    print_table("Measured candidates", *measured_table(result))
    console.print(f"\n[bold green]✓[/] {escape(result.verdict)}\n", soft_wrap=True)
    console.print(f"  report  {result.out / 'report.html'}", soft_wrap=True)
    console.print(f"  bundle  {result.best}", soft_wrap=True)
    for other in sorted(result.out.glob("best-*")):
        console.print(f"  also    {other}", soft_wrap=True)
    for folder in _shipped(result.out, wanted, model, chosen["threads"]):
        console.print(f"  shipped {folder}", soft_wrap=True)


def _shipped(run: Path, to: list[str], model: str, threads: int) -> Iterator[Path]:
    if not to:
        return
    from edgeprune.shipping import ship as write

    with Stages() as stages:
        for name in to:
            yield write(run, name, model=model, threads=threads, say=stages.say)


def _targets(quant: str | None, runtime: str | None) -> tuple[Any, ...]:
    from edgeprune.errors import unknown
    from edgeprune.targets import FORMATS, default_targets, target_for

    runtimes = [each.runtime for each in FORMATS.values()]
    if runtime is not None and runtime not in runtimes:
        raise unknown("runtime", runtime, runtimes)
    named = [target_for(name.strip()) for name in quant.split(",")] if quant else default_targets()
    kept = tuple(target for target in dict.fromkeys(named) if runtime is None or target.runtime == runtime)
    if not kept:
        raise BadInput(f"no quantisation of --quant runs on {runtime}", remedy="leave one of the two options out")
    return kept


def _numbers(text: str, where: str) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = (-1.0,)
    if not all(0 <= value < 1 for value in values):
        raise BadInput(f"{text!r}: every ratio must be a number in [0, 1)", where=where, remedy="for example 0.1,0.2")
    return values


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or demo.")],
    quant: Annotated[
        str, typer.Option("--quant", "-q", help="F16, Q8_0, Q4_0 … (GGUF); fp32, fp16, int8, int4-head8, int4 (ONNX).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help=".gguf file, or folder for ONNX.")],
    exporter: Annotated[
        str, typer.Option("--exporter", help="own, or optimum (fp32 ONNX, for other families).")
    ] = "own",
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            help="With imatrix: text that tells which columns of the weights count. Default: text the model writes.",
            show_default=False,
            metavar="FILE|DATASET",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            "-c",
            min=1,
            help="Of ONNX: positions that fit in its cache. Default: the model's, at most 8192.",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Export a model to a GGUF file or an ONNX folder that stock runtimes load."""
    import tempfile

    from edgeprune.errors import unknown
    from edgeprune.inspection import inspect as look
    from edgeprune.models import checkpoint_folder, resolve
    from edgeprune.targets import IMATRIX, target_for

    if exporter not in ("own", "optimum"):
        raise unknown("exporter", exporter, ["own", "optimum"])
    target = target_for(quant)
    if out.suffix != target.format.suffix:
        wanted = f"a file that ends in {target.format.suffix}" if target.format.suffix else "a folder without a suffix"
        raise BadInput(f"{quant} needs {wanted}", where=out, remedy="choose another --out")
    if context is not None and (target.format.positions is None or exporter == "optimum"):
        raise BadInput(f"{quant} is not made for a context", where="--context", remedy="leave it out")
    if not target.format.suffix:
        out = result_folder(out, "model.onnx")
    source = resolve(model)
    if exporter == "optimum":
        if target.quantisation != "fp32":
            raise BadInput("the optimum exporter writes fp32 ONNX only", where=quant, remedy="use --quant fp32")
        from edgeprune.export.optimum_exporter import export_optimum

        export_optimum(checkpoint_folder(source), out)
    else:
        with Stages() as stages, tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch:
            folder = checkpoint_folder(source, say=stages.say)
            from edgeprune.checkpoint import Checkpoint

            for note in target.format.fallbacks(Checkpoint(folder).shape, target.quantisation):
                problem(note, kind="note")
            if target.needs_imatrix:
                from edgeprune.imatrix import provide_imatrix

                told = partial(stages, "finding what each column of the weights is multiplied by")
                provide_imatrix(folder, Path(scratch) / IMATRIX, calibration=calibration, progress=told)
            elif calibration:
                raise BadInput(f"{quant} needs no text", where="--calibration", remedy="leave it out")
            stages(f"writing {target.quantisation}", 0, 0)
            threads = threads or available_cores()
            target.format.export(folder, out, target.quantisation, Path(scratch), threads=threads, context=context)
    console.print(f"written to {out} ({look(out).file_bytes / (1 << 20):.1f} MiB)", soft_wrap=True)


app.command(name="distill")(distill_command)
app.command()(prune)
app.command()(recover)
app.command()(vocabulary)
app.command()(bench)
app.command()(compare)
app.command(name="tune")(tune_command)
app.command()(ci)
app.command(name="eval")(evaluate)
app.command()(inspect)
app.command()(predict)
app.command()(doctor)
app.command()(ship)
app.command()(verify)
app.command()(report)
app.command()(chat)
app.command()(serve)
app.add_typer(devices_app, name="devices")
app.add_typer(boards_app, name="boards")


def _quiet_libraries() -> None:
    """Libraries' own progress bars and advice would garble ours; their errors come as exceptions anyway."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    # torchao, which transformers imports where it is installed, complains of libraries for other machines.
    for name in ("transformers", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def keep_interrupts() -> None:
    """Send a Ctrl-C again that came while a C library called back into Python, where ctypes drops what is raised."""
    before = sys.unraisablehook

    def look(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            main = threading.main_thread().ident
            assert main is not None
            threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            before(unraisable)

    sys.unraisablehook = look


def _mend_streams() -> None:
    """Give a closed standard stream a place to write to, and let one that lacks a character write "?" for it."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (until the end)
    sys.stderr = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _expand_homes(arguments: list[str]) -> list[str]:
    """Arguments with the home folder for the `~` of `--out=~/runs`, which no shell replaces there."""
    return [re.sub(r"^(--[a-z-]+=)(~/.*)", lambda m: m[1] + str(Path(m[2]).expanduser()), each) for each in arguments]


def main() -> None:
    """Run the command line and exit with the code that its outcome has."""
    _mend_streams()
    _quiet_libraries()
    if container_quota():  # unknown to OpenMP, which sees to the rest by itself
        os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    keep_interrupts()
    try:
        app(_expand_homes(sys.argv[1:]))
    except EdgepruneError as error:
        problem(str(error))
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            _tell_bug()
        problem(str(missing_extra(package, EXTRAS[package])))
        sys.exit(BadInput.exit_code)
    except BrokenPipeError:
        # Whoever read our output is gone; nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            problem(f"{error.filename}: a name longer than this system takes; give a shorter one")
            sys.exit(BadInput.exit_code)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _tell_bug()
        problem(f"the disk is full ({error.filename or error.strerror}); free some space and run the command again")
        sys.exit(BadInput.exit_code)
    except Exception:
        _tell_bug()


def _tell_bug() -> NoReturn:
    """End after an exception that nothing foresaw; not with 1, which says something of a measurement."""
    traceback.print_exc()
    problem("the lines above are a bug of edgeprune; please report them")
    sys.exit(StageFailed.exit_code)
