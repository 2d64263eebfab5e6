"""Commands that only look: `inspect`, `predict`, `doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.output import print_checks, print_inspection, print_json, print_prediction

MOST_SEED = (1 << 32) - 1  # that every generator takes
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def model_file(name: str) -> Path:
    """What a command that looks at files is given: a path, or a demo's name, which stands for its file."""
    from edgeprune.fetch import DEMO_MODELS, demo_model

    return demo_model(name) if name in DEMO_MODELS else Path(name)


def device_names(incomplete: str) -> list[str]:
    """Names of devices that begin so, for a shell that completes them."""
    from edgeprune.devices import list_profiles

    profiles = list_profiles(lambda _: None)  # of a broken file is told where it is used
    return [name for profile in profiles for name in profile.names if name.startswith(incomplete)]


def inspect(
    path: Annotated[
        Path,
        typer.Argument(help=".gguf file, ONNX folder, checkpoint folder, or demo.", parser=model_file, metavar="FILE"),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what is in a model file: family, widths of each layer, bytes by part, quantisation."""
    from edgeprune.inspection import inspect as look

    found = look(path)
    if as_json:
        print_json(asdict(found))
    else:
        print_inspection(found)


def predict(
    path: Annotated[
        Path | None,
        typer.Argument(
            help=".gguf file, checkpoint folder with --quant, or demo.",
            show_default=False,
            parser=model_file,
            metavar="FILE",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", "-d", help="Profile name, path of a .toml, or host.", autocompletion=device_names),
    ] = "host",
    params: Annotated[
        float | None, typer.Option("--params", help="Without a file: parameters of the model, such as 1.24e9.")
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="Without a file: its decoder layers.")] = None,
    size_mib: Annotated[float | None, typer.Option("--size-mib", help="Without a file: size of the weights.")] = None,
    quant: Annotated[str | None, typer.Option("--quant", "-q", help="Quantisation: Q4_0, Q4_K_M, int4 …")] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Default: the profile's.")] = None,
    context: Annotated[int, typer.Option("--context", "-c", min=16, help="Tokens the cache must hold.")] = 2048,
    prompt: Annotated[int, typer.Option("--prompt", "-p", min=1, help="Tokens before the first one.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Predict speed, time to first token and memory of a model on a device, each with an interval."""
    from edgeprune.devices import load_profile
    from edgeprune.errors import BadInput
    from edgeprune.prediction import predict_file, predict_size

    profile = load_profile(device)
    if path is not None:
        if params is not None or layers is not None or size_mib is not None:
            raise BadInput("--params, --layers and --size-mib stand for a file", remedy="leave them out, or the file")
        found = predict_file(path, profile, quantisation=quant, threads=threads, context=context, prompt=prompt)
    elif params is None or layers is None or quant is None:
        raise BadInput("nothing to predict for", remedy="name a file, or give --params, --layers and --quant")
    else:
        found = predict_size(
            params, layers, quant, profile, size_mib=size_mib, threads=threads, context=context, prompt=prompt
        )
    if as_json:
        print_json(found.to_json())
    else:
        print_prediction(found)


def doctor(as_json: AsJson = False) -> None:
    """Show what is installed, which runtimes work, and what this machine is."""
    from edgeprune.doctor import diagnose

    checks = diagnose()
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        print_checks(checks)
    if any(check.ok is False for check in checks):
        raise typer.Exit(4)
