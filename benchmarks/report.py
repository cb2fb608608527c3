"""What every benchmark writes: the machine, the versions, the date, and a Markdown table next to the JSON it came from."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores and memory of this machine, and the load it is under; no host name, no path."""
    from merit.run.record import versions

    model = "unknown"
    for line in (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    ):
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "versions": versions(),
    }


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers are right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def write(name: str, title: str, command: str, body: str, facts: Mapping[str, Any]) -> Path:
    """Write ``results/<name>.md`` and ``.json``; returns the Markdown file."""
    found = machine()
    where = f"{found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB; load {found['load_average'][0]}"
    libraries = ", ".join(f"{key} {value}" for key, value in found["versions"].items())
    text = f"# {title}\n\n`{command}`\n\n{found['date']}; {where}; {libraries}.\n\n{body.strip()}\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"command": command, "machine": found, **facts}, indent=2) + "\n", encoding="utf-8"
    )
    file = RESULTS / f"{name}.md"
    file.write_text(text, encoding="utf-8")
    return file
