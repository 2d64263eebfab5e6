"""The report: what it says is what the record says, at two widths in a real browser, and of several runs at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Pages
from typer.testing import CliRunner

from edgeprune.cli import app
from edgeprune.errors import BadInput
from edgeprune.report_chart import Point, log_ticks, nice_ticks, pareto
from edgeprune.report_page import bars, chosen_of, number, view
from edgeprune.samples import QUESTIONS


def test_ticks_are_round_and_few() -> None:
    assert nice_ticks(163) == [0, 50, 100, 150]
    assert nice_ticks(0.7) == pytest.approx([0, 0.2, 0.4, 0.6])
    assert log_ticks(0.003, 0.6) == pytest.approx([0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    assert log_ticks(0.19, 0.49) == pytest.approx([0.2, 0.3, 0.4])
    assert log_ticks(1e-5, 10.0) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10])


def test_numbers_read_as_a_person_writes_them() -> None:
    assert [number(v) for v in (None, 0, 134515008, 0.4462, 152.09, 0.00004)] == [
        "–",
        "0",
        "134,515,008",
        "0.446",
        "152",
        "4.0e-05",
    ]


def test_points_stand_where_their_figures_say() -> None:
    def point(speed: float, nats: float) -> Point:
        return Point("a", "llamacpp", (speed, speed, speed), "predicted", (nats, nats, nats), True, False)

    chart = pareto([point(50, 0.01), point(100, 0.1), point(90, 0.2), point(150, 0.0)], 120.0)
    x, y = [each["x"] for each in chart["points"]], [each["y"] for each in chart["points"]]
    assert x[0] < x[2] < x[1] < chart["wanted"] < x[3] <= chart["right"]
    assert chart["top"] <= y[2] < y[1] < y[0] < y[3] <= chart["bottom"]
    assert len(chart["front"].split()) == 1, "the fastest is also the nearest to dense: no other is worth having"


def test_memory_is_told_of_what_the_budget_is_judged_by(run: Path) -> None:
    record = json.loads((run / "fit.json").read_text())
    chosen = chosen_of(record)
    chosen["speed"] = {"tg128": {"peak_mib": 900.0, "peak_gpu_mib": 300.0, "median_ts": 1, "low_ts": 1, "high_ts": 1}}
    record["device"]["memory"]["dedicated"] = True
    chosen["predicted"]["backend"] = "cuda"
    assert {each["label"]: each["value"] for each in bars(chosen, record)}["memory"] == 300.0
    chosen["predicted"]["backend"] = "cpu"
    assert {each["label"]: each["value"] for each in bars(chosen, record)}["memory"] == 900.0


def test_the_page_shows_what_the_record_says(run: Path) -> None:
    shown = view(run)
    record = json.loads((run / "fit.json").read_text())
    assert len(shown["rows"]) == sum(1 for each in record["candidates"] if each.get("quality"))
    assert sum(row["chosen"] for row in shown["rows"]) == 1
    kept = [sum(layer["heads"]) for layer in shown["layers"]]
    widths = shown["chosen"]["plan"]["heads"]
    assert kept == (widths if isinstance(widths, list) else [widths] * len(kept))
    assert [sample["question"] for sample in record["samples"]] == list(QUESTIONS)
    text = (run / "report.html").read_text()
    assert record["samples"][0]["question"] in text and record["commands"]["again"].replace("'", "&#39;") in text
    assert "http://" not in text and "https://" not in text, "the page stands alone"


def test_the_page_the_markdown_and_the_model_card_carry_the_same_figures(run: Path) -> None:
    shown = view(run)
    html, markdown, card = ((run / name).read_text() for name in ("report.html", "report.md", "best/MODEL_CARD.md"))
    bars = {each["label"]: each for each in shown["bars"]}
    assert list(bars) == ["decode", "memory", "file", "first token after 512"]
    for each in bars.values():
        assert number(each["value"]) in html and number(each["value"]) in markdown
    assert (
        f"| memory, MiB | {bars['memory']['value']:.1f} |" in card
        and f"| file, MiB | {bars['file']['value']:.1f}" in card
    )
    assert f"| first token after 512, s | {bars['first token after 512']['value']:.2f} |" in card
    quality = shown["chosen"]["quality"]
    for mean, digits in ((quality["kl_nats"]["mean"], 4), (quality["bits_per_byte"], 3)):
        assert f"{mean:.{digits}f}" in markdown and f"{mean:.4f}" in card
    for file in shown["files"].values():
        assert file["sha256"] in html and file["sha256"] in markdown


@pytest.mark.parametrize("width, scheme", [(1100, "light"), (390, "dark")])
def test_in_a_browser(run: Path, pages: Pages, width: int, scheme: str) -> None:
    page = pages.open((run / "report.html").as_uri(), width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("tr.chosen").count() == 1
    point = page.locator(".point").first
    point.focus()
    assert page.inner_text(".told") == point.get_attribute("aria-label")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert not pages.problems


def test_runs_side_by_side(run: Path, uniform: Path, tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    done = CliRunner().invoke(app, ["report", str(run), str(uniform), "--compare", "--out", str(page)])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "2 runs compared" in text and text.count("<section") == 2
    alone = CliRunner().invoke(app, ["report", str(run), str(uniform)])
    assert isinstance(alone.exception, BadInput) and "--compare" in str(alone.exception)
    nowhere = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(nowhere.exception, BadInput)
