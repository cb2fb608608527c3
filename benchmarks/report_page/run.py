"""The HTML report of runs of 30, 200 and 1,000 datasets: time to write it, its size, time to open it.

    python -m benchmarks.report_page.run [--datasets 30 200 1000]

The runs are typed results of random figures (tests/report/page_cases.py), four groups, 500 logged steps per branch; and once
30 datasets with 24 sample answers whose rows have a picture each (640 x 480, smoothed noise: it hardly compresses). Opening
is measured in the system's Chromium, from navigation to the first painted frame, the median of five: by the clock, which
other work on the machine prolongs, and as processor time of all of the browser's processes. Left out where playwright or
Chromium is missing. The floor is an empty page in the same browser.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from benchmarks.report import table, write

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from PIL import Image, ImageFilter
from tests.builders import make_vision_base

from merit.hf.base import open_base
from merit.recipe.load import parse_recipe
from merit.report.page.data import RunData
from merit.report.page.document import page
from mixture.mixture_cases import prepare_mixture
from report.page_cases import make_run

ROUNDS = 5


def used() -> float:
    """Processor time so far (milliseconds) of the processes that this one started."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return 1000 * total


def opened(file: Path) -> tuple[float, float] | None:
    """Milliseconds until the page is loaded and painted: by the clock, and of processor time."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if chromium is None:
        return None
    times, busy = [], []
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(ROUNDS):
            tab = browser.new_page()
            before = used()
            tab.goto(file.as_uri())
            times.append(
                tab.evaluate("() => new Promise((done) => requestAnimationFrame(() => done(performance.now())))")
            )
            busy.append(used() - before)
            tab.close()
        browser.close()
    return statistics.median(times), statistics.median(busy)


def with_pictures(folder: Path, data: RunData) -> RunData:
    """The same run with answers to 24 rows that have a picture."""
    rng, answers = np.random.default_rng(0), []
    for name in [f"d{i:02d}" for i in range(12)]:
        rows = []
        for row in range(2):
            (folder / "data" / name).mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(rng.integers(0, 256, (480, 640, 3), np.uint8))
            noise.filter(ImageFilter.GaussianBlur(2)).save(folder / "data" / name / f"{row}.png")
            rows.append({"image": f"{row}.png", "prompt": "<image>\nWhich?", "completion": "a"})
            answers.append({"part": "mixture", "dataset": name, "row": row, "match": True, "prompt": "Which?"})
        text = "\n".join(map(json.dumps, rows))
        for part in ("train", "test"):
            (folder / "data" / name / f"{part}.jsonl").write_text(text, encoding="utf-8")
    settings = {"name": "t", "model": {"base": "none"}, "mixture": {"folder": str(folder / "data")}}
    base = open_base(make_vision_base("llava", folder / "base"))
    counts = prepare_mixture(parse_recipe(settings, folder=folder), base, folder / "mixture")
    (folder / "evaluation" / "models").mkdir(parents=True)
    for model in ("base", "joint", "merged"):
        lines = "\n".join(json.dumps(answer | {"answer": model, "reference": "a"}) for answer in answers)
        (folder / "evaluation" / "models" / f"{model}.answers.jsonl").write_text(lines, encoding="utf-8")
    return replace(data, counts=(*data.counts, *counts))


def measure(folder: Path, count: int, *, pictures: bool = False) -> dict[str, Any]:
    data = make_run(folder, [f"dataset-{i:04d}" for i in range(count)], steps=500)
    if pictures:
        data = with_pictures(folder, data)
    began = time.process_time()
    text = page(data)
    seconds = time.process_time() - began
    file = folder / f"{count}.html"
    file.write_text(text, encoding="utf-8")
    return {
        "datasets": count,
        "pictures": text.count("data:image/png"),
        "cpu_seconds": seconds,
        "bytes": len(text.encode()),
        "opens_ms": opened(file),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, nargs="+", default=[30, 200, 1000])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        empty = folder / "empty.html"
        empty.write_text("<!doctype html><title>empty</title><p>empty", encoding="utf-8")
        floor = opened(empty)
        rows = [measure(folder, count) for count in arguments.datasets]
        rows.append(measure(folder, 30, pictures=True))
    shown = [
        [
            f"{row['datasets']:,}" + (f", {row['pictures']} pictures" if row["pictures"] else ""),
            f"{row['cpu_seconds']:.1f}",
            f"{row['bytes'] / 1e6:.2f}",
            *_ms(row["opens_ms"]),
        ]
        for row in rows
    ]
    shown.append(["an empty page", "", "", *_ms(floor)])
    header = ["datasets", "written in, CPU s", "size, MB", "opens in, ms", "opens in, CPU ms"]
    text = table(header, shown)
    command = f"python -m benchmarks.report_page.run --datasets {' '.join(map(str, arguments.datasets))}"
    write("report_page", "The HTML report", command, text, {"rows": rows, "empty_page_ms": floor})


def _ms(values: tuple[float, float] | None) -> list[str]:
    return ["–", "–"] if values is None else [f"{value:,.0f}" for value in values]


if __name__ == "__main__":
    main()
