"""Commands about devices: `devices list`, `devices show`, `devices measure`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from edgeprune.cli_look import AsJson, device_names
from edgeprune.cli_measure import BoardName, Gate, counts_of
from edgeprune.errors import BadInput
from edgeprune.output import Stages, console, print_json, print_table, problem

devices_app = typer.Typer(help="Device profiles.", no_args_is_help=True)


@devices_app.command("list")
def devices_list(as_json: AsJson = False) -> None:
    """List the device profiles."""
    from edgeprune.devices import list_profiles

    profiles = list_profiles(lambda error: problem(str(error), kind="warning"))
    if as_json:
        print_json([profile.model_dump(mode="json") for profile in profiles])
        return
    rows = [
        [
            profile.name,
            profile.description,
            f"{profile.memory.total_gib.value:g}",
            " · ".join(f"{backend} {decode.gbs.value:g}" for backend, decode in profile.decode.items()),
            ", ".join(profile.names[1:]),
        ]
        for profile in profiles
    ]
    print_table("Devices", ("name", "device", "memory GiB", "effective decode GB/s", "also known as"), rows)


@devices_app.command("show")
def devices_show(
    name: Annotated[str, typer.Argument(help="Profile name, path of a .toml, or host.", autocompletion=device_names)],
    as_json: AsJson = False,
) -> None:
    """Show a device profile: every number with its interval, kind and source."""
    from edgeprune.devices import load_profile
    from edgeprune.output import figures_of

    profile = load_profile(name)
    if as_json:
        print_json(profile.model_dump(mode="json"))
        return
    print_table(
        f"{profile.name}: {profile.description}", ("figure", "value", "interval", "kind", "source"), figures_of(profile)
    )
    if profile.notes:
        console.print(profile.notes.strip(), markup=False)


@devices_app.command("measure")
def devices_measure(
    name: Annotated[
        str | None,
        typer.Option("--name", help="Keep it as a profile of this name. Default: as that of this machine, host."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", "-d", help="Profile to take memory and budget from. Default: the board's own entry, else host."
        ),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option("--threads", "-t", help="Numbers of threads to try, by commas. Default: up to all cores."),
    ] = None,
    board: BoardName = None,
    gate: Gate = True,
    as_json: AsJson = False,
) -> None:
    """Make a machine's profile from short runs of the runtime on models of random weights; under 3 minutes.

    Where llama.cpp finds a GPU, the processor is measured first and then the GPU, which the profile then starts from.
    """
    from edgeprune.boards import device_of, place
    from edgeprune.device_measure import ROUNDS_S, measure_device, save_profile
    from edgeprune.devices import load_profile
    from edgeprune.files import config_dir, writable
    from edgeprune.host import measured_path, unmeasured_profile
    from edgeprune.host_gpu import backend_of, find_gpu, with_gpu, with_memory_of
    from edgeprune.output import figures_of
    from edgeprune.runtimes.bench import GATE_S, bench
    from edgeprune.runtimes.tuning import thread_counts

    path = config_dir() / "profiles" / f"{name}.toml" if name else measured_path()
    writable(path)
    there = place(board)
    if board is not None:
        device = device or device_of(board)
        if name is None:
            raise BadInput("a board's profile needs a name", remedy="add --name NAME")
    base = unmeasured_profile() if device is None else load_profile(device)
    if name is not None:
        base = base.renamed(name)
    gpu = find_gpu(there.execute)
    backend = None if gpu is None else backend_of(gpu)
    with Stages(resumes=False) as stages:
        measure = partial(
            measure_device,
            measure=partial(bench, execute=there.execute),
            seconds=ROUNDS_S / (2 if backend else 1),
            gate_s=GATE_S if gate else None,
            progress=stages,
        )
        profile = measure(with_gpu(base, None), counts=counts_of(threads) or thread_counts(there.threads))
        if gpu is not None and backend is not None:
            profile = measure(with_memory_of(profile, gpu), counts=[profile.threads], backend=backend)
    save_profile(profile, path)
    if as_json:
        print_json(profile.model_dump(mode="json"))
        return
    measured = [row for row in figures_of(profile) if "measured" in row]
    print_table(f"{profile.name}: {profile.description}", ("figure", "value", "interval", "kind", "source"), measured)
    console.print(f"written to {path}; use it with --device {profile.name}", soft_wrap=True)
