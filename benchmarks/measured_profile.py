"""Does a profile that `devices measure` makes predict what `bench` then measures? One machine, one model, in one run.

    python benchmarks/measured_profile.py --out measured_profile.json [--model demo] [--quantisations Q4_0 Q8_0 ...]

The profile is made from models of random weights and kept nowhere; then each quantisation of the model is exported,
predicted by it and measured. A machine's speed drifts, so what lies between the two is part of the error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edgeprune.device_measure import measure_device
from edgeprune.errors import EdgepruneError, StageFailed
from edgeprune.files import write_json
from edgeprune.host import unmeasured_profile
from edgeprune.models import checkpoint_folder, resolve
from edgeprune.prediction import predict_file
from edgeprune.record import environment
from edgeprune.runtimes.bench import bench, cpu_info
from edgeprune.runtimes.tuning import thread_counts
from edgeprune.targets import target_for

AIM = 0.10  # of decoding, either way
KINDS = ("Q4_1", "Q4_0", "IQ4_NL", "Q4_K_M", "Q5_K_M", "Q8_0", "F16")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as the README shows them."""
    lines = ["| model as | predicted (90 % interval) | measured | error | aim |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {row['quantisation']} | {row['predicted']:.0f} ({row['low']:.0f}–{row['high']:.0f}) | "
        f"{row['measured']:.0f} | {100 * (row['predicted'] / row['measured'] - 1):+.0f} % | {100 * AIM:g} % |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure the profile, then the model; write the record, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--quantisations", nargs="+", default=list(KINDS))
    arguments = parser.parse_args()
    base = unmeasured_profile()
    source = checkpoint_folder(resolve(arguments.model))
    began = time.monotonic()
    profile = measure_device(base, counts=thread_counts(base.threads))
    seconds = time.monotonic() - began
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in arguments.quantisations:
            target = target_for(kind)
            path = target.format.export(
                source, Path(scratch) / f"{kind}.gguf", kind, Path(scratch), threads=profile.threads
            )
            found = predict_file(path, profile).cost.decode_tps
            result = bench(path, n_prompt=0, threads=profile.threads)
            if result.tg is None:
                raise StageFailed(f"{result.status}: {result.reason}", where=path)
            row = {"quantisation": kind, "predicted": found.value, "low": found.low, "high": found.high}
            rows.append(row | {"measured": result.tg.median_ts})
            path.unlink()
    record = {"schema_version": 1, "benchmark": "measured_profile", "model": arguments.model, "seconds": seconds}
    record |= {"cpu_info": cpu_info(), "environment": environment(), "rows": rows}
    write_json(arguments.out, record)
    print(f"the profile took {seconds:.0f} s\n\n{table(rows)}")


if __name__ == "__main__":
    try:
        main()
    except EdgepruneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
