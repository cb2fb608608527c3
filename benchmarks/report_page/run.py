"""The HTML report of runs of 30, 200 and 1,000 datasets: time to write it, its size, time to open it.

    python -m benchmarks.report_page.run [--datasets 30 200 1000]

The runs are typed results of random figures (tests/report/page_cases.py), four groups, 500 logged steps per branch. Opening
is measured in the system's Chromium, from navigation to the first painted frame, the median of five: by the clock, which
other work on the machine prolongs, and as processor time of all of the browser's processes. Left out where playwright or
Chromium is missing. The floor is an empty page in the same browser.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from benchmarks.report import table, write

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from merit.report.page.document import page
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


def measure(folder: Path, count: int) -> dict[str, Any]:
    data = make_run(folder, [f"dataset-{i:04d}" for i in range(count)], steps=500)
    began = time.process_time()
    text = page(data)
    seconds = time.process_time() - began
    file = folder / f"{count}.html"
    file.write_text(text, encoding="utf-8")
    return {"datasets": count, "cpu_seconds": seconds, "bytes": len(text.encode()), "opens_ms": opened(file)}


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
    shown = [
        [f"{row['datasets']:,}", f"{row['cpu_seconds']:.1f}", f"{row['bytes'] / 1e6:.2f}", *_ms(row["opens_ms"])]
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
