"""A suite's results in the forms that others read: github-action-benchmark, Bencher, JUnit, Markdown."""

from __future__ import annotations

import json
import xml.etree.ElementTree as Xml
from collections.abc import Callable
from pathlib import Path

from edgeprune.ci import Report
from edgeprune.files import write_text


def github_action_benchmark(report: Report) -> str:
    """JSON of the tool `customBiggerIsBetter` (github.com/benchmark-action/github-action-benchmark)."""
    found = []
    for result in report.results:
        value, low, high = result.median
        found.append(
            {
                "name": f"{result.name} {result.test}",
                "unit": "tokens/s",
                "value": value,
                "range": f"{low:.4g} to {high:.4g}",
                "extra": result.verdict,
            }
        )
    return json.dumps(found, indent=2) + "\n"


def bencher(report: Report) -> str:
    """Bencher Metric Format (bencher.dev, "json" adapter): a measure `throughput` of each benchmark."""
    found = {}
    for result in report.results:
        value, low, high = result.median
        measure = {"value": value, "lower_value": low, "upper_value": high}
        found[f"{result.name} {result.test}"] = {"throughput": measure}
    return json.dumps(found, indent=2) + "\n"


def junit(report: Report) -> str:
    """JUnit XML: a case a test; a regression is a failure, a test without baseline is skipped, an entry that could not
    be measured is an error."""
    cases = len(report.results) + len(report.failures)
    skipped = sum(result.state == "new" for result in report.results)
    counts = {"tests": str(cases), "failures": str(len(report.regressions)), "skipped": str(skipped)}
    counts["errors"] = str(len(report.failures))
    root = Xml.Element("testsuites", counts)
    suite = Xml.SubElement(root, "testsuite", {"name": "edgeprune ci", "timestamp": report.measured_at, **counts})
    for result in report.results:
        case = Xml.SubElement(suite, "testcase", {"classname": result.name, "name": result.test, "time": "0"})
        if result.state == "regression":
            Xml.SubElement(case, "failure", {"message": result.verdict, "type": "regression"})
        elif result.state == "new":
            Xml.SubElement(case, "skipped", {"message": result.verdict})
        Xml.SubElement(case, "system-out").text = f"{result.median[0]:.2f} tokens/s"
    for name, reason in report.failures.items():
        case = Xml.SubElement(suite, "testcase", {"classname": name, "name": "measurement", "time": "0"})
        Xml.SubElement(case, "error", {"message": reason, "type": "not measured"})
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(report: Report) -> str:
    """A table for a job's summary."""
    marks = {
        "ok": "✓",
        "undecided": "? undecided",
        "regression": "✗ regression",
        "improvement": "✓ faster",
        "new": "no baseline",
    }
    lines = [
        "| benchmark | test | tokens/s [95 %] | of the baseline's [95 %] | tolerance | |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for result in report.results:
        value, low, high = result.median
        c = result.comparison
        ratio = "–" if c is None else f"{100 * c.ratio:.1f} % [{100 * c.low:.1f}, {100 * c.high:.1f}]"
        name = _cell(result.name)
        lines.append(
            f"| {name} | {result.test} | {value:.2f} [{low:.2f}, {high:.2f}] | {ratio} "
            f"| {100 * result.tolerance:g} % | {marks[result.state]} |"
        )
    for name, reason in report.failures.items():
        lines.append(f"| {_cell(name)} | | not measured: {_cell(reason)} | | | ✗ |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def record(report: Report) -> str:
    """Our own record."""
    return json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n"


FORMS: dict[str, Callable[[Report], str]] = {
    "results.json": record,
    "github-action-benchmark.json": github_action_benchmark,
    "bencher.json": bencher,
    "junit.xml": junit,
    "summary.md": markdown,
}


def write_all(report: Report, folder: Path) -> list[Path]:
    """Write every form into `folder`, which is made if need be; the paths.

    Raises:
        BadInput: the folder cannot be written.
    """
    for name, form in FORMS.items():
        write_text(folder / name, form(report))
    return [folder / name for name in FORMS]
