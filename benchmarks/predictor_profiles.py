"""The fitted constants, written into the profiles of devices with published rows; the rest stays as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import published_devices
import tomlkit
from predictor_fit import PREFILL_PRIORS, Fit, Row, fit
from predictor_rows import KERNELS
from published_devices import Place
from tomlkit.items import Table

from edgeprune.devices import parse_profile
from edgeprune.export.gguf_mixtures import QUANTISATIONS
from edgeprune.files import write_text

HOW = "benchmarks/predictor.py"
MOST_SOURCE = 600  # characters
PREFILL = ("Q4_0", "Q4_K_M", "Q8_0", "Q6_K", "F16")


def write_profiles(
    folder: Path, decode: Sequence[Row], prefill: Sequence[Row], record: dict[str, Any]
) -> Iterator[Path]:
    """Rewrite a folder's profiles: bandwidth, cost of a layer, kernels; prompt processing where there is no figure.

    Args:
        record: what `predictor.py` measured: the half widths of the intervals.

    Raises:
        BadInput: what would be written is no valid profile; nothing of it is.
    """
    speed, prompt = fit(decode), fit(prefill, PREFILL_PRIORS)
    for name, place, rows in _devices(decode):
        path = folder / f"{name}.toml"
        profile = tomlkit.parse(path.read_text(encoding="utf-8"))
        width = record["decode"]["half_widths"]["known"]
        _decode(profile, place, rows, speed, width)
        _prefill(profile, place, [row for row in prefill if row.device == place.key], prompt, record)
        text = tomlkit.dumps(profile)
        parse_profile(text, where=path)
        write_text(path, text)
        yield path


def _devices(rows: Sequence[Row]) -> Iterator[tuple[str, Place, list[Row]]]:
    for key in sorted({row.device for row in rows}):
        mine = [row for row in rows if row.device == key]
        place = published_devices.find(mine[0].facts["device_id"], mine[0].facts["backend"])
        if place.profile:
            yield place.profile, place, mine


def _decode(profile: Any, place: Place, rows: Sequence[Row], found: Fit, width: float) -> None:
    table = profile["decode"].setdefault(place.backend, tomlkit.table())
    share = found.value(f"kind:{place.kind}") + found.value(f"device:{place.key}")
    table["gbs"] = _figure(place.nominal_gbs * np.exp(share), width, "published", _source(rows, width))
    nominal = profile["memory"].get("nominal_gbs")
    if nominal is not None:  # no device reads faster than its memory
        table["gbs"]["high"] = _rounded(max(table["gbs"]["value"], min(table["gbs"]["high"], 0.99 * nominal["value"])))
    pooled = f"fit over published rows of devices like this one, {HOW}; interval as that of gbs"
    table["layer_ms"] = _figure(1e3 * np.exp(found.value(place.layer)), width, "derived", pooled)
    table.pop("fixed_ms", None)
    kernels = tomlkit.table()
    for quantisation, sort in KERNELS.items():
        effect = found.value(f"kernel:{place.sort}-{sort}")
        if quantisation in QUANTISATIONS and abs(effect) > 0.03:  # below that it is noise
            figure = tomlkit.inline_table()
            figure.update({"value": _rounded(np.exp(effect)), "kind": "derived", "source": f"pooled fit, {HOW}"})
            kernels[quantisation] = figure
    if kernels:
        kernels.add(tomlkit.nl())
        table["kernel"] = kernels


def _prefill(profile: Any, place: Place, rows: Sequence[Row], found: Fit, record: dict[str, Any]) -> None:
    if not rows:
        return
    width = record["prefill"]["half_widths"]["known"]
    there = profile.setdefault("prefill", tomlkit.table(True)).setdefault(place.backend, tomlkit.table())
    for quantisation in PREFILL:
        if quantisation in there:  # read off a page for this very kernel, which is better
            continue
        kernel = f"kernel:{place.sort}-{KERNELS[quantisation]}" if quantisation in KERNELS else None
        rate = found.value(f"kind:{place.kind}") + found.value(f"device:{place.key}")
        rate += found.value(kernel) if kernel else 0.0
        there[quantisation] = _figure(np.exp(rate), width, "derived", _source(rows, width))


def _figure(value: float, width: float, kind: str, source: str) -> Table:
    table = tomlkit.table()
    for name, number in (("value", value), ("low", value * np.exp(-width)), ("high", value * np.exp(width))):
        table[name] = _rounded(number)
    table["kind"] = kind
    table["source"] = source
    table.add(tomlkit.nl())
    return table


def _rounded(number: float) -> float:
    return float(f"{number:.3g}")


def _source(rows: Sequence[Row], width: float) -> str:
    pages = [page.removeprefix("https://") for page, _ in Counter(row.page for row in rows).most_common()]
    start = (
        f"pooled fit, {HOW}: {len(rows)} rows of {len(pages)} pages; the interval, a factor of {np.exp(width):.2f}, "
        "holds 90 % of rows of known devices whose page was kept apart: "
    )
    kept = list(pages)
    while len(start) + len("; ".join(kept)) > MOST_SOURCE:
        kept.pop()
    more = f" and {len(pages) - len(kept)} more" if len(kept) < len(pages) else ""
    return start + "; ".join(kept) + more
