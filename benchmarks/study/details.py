"""What a study's table does not say: searched weights, the sum of the learning rates, and seconds of training.

    python -m benchmarks.study.details RUN NAME

Reads the folder of a finished `merit study`, writes ``benchmarks/study/results/NAME_details.json``: by method and seed, the
coefficients c_k = λ w_k that a search chose; by source and seed, the learning rates of its branches' steps added up, as a
multiple of joint training's, and the seconds that its branches took (beside whatever else the machine did).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import machine

RESULTS = Path(__file__).parent / "results"


def rates(log: Path) -> float:
    """The learning rates of all steps of a branch, added up."""
    return sum(json.loads(line)["learning_rate"] for line in log.read_text(encoding="utf-8").splitlines())


def details(run: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The figures of a study's folder."""
    found: dict[str, dict[str, dict[str, Any]]] = {"searched": {}, "rates": {}, "seconds": {}}
    for seed in sorted((run / "study").glob("s[0-9]*")):
        for record in sorted(seed.glob("merges/*/merged/record.json")):
            search = json.loads(record.read_text(encoding="utf-8")).get("weight_search")
            if search:
                method = record.parts[-3]
                chosen = [round(value, 3) for value in search["chosen"]["coefficients"]]
                found["searched"].setdefault(method, {})[seed.name] = chosen
        joint = rates(seed / "joint" / "branches" / "0" / "log.jsonl")
        for source in sorted({path.parents[2] for path in seed.glob("*/branches/*/record.json")}):
            branches = sorted((source / "branches").glob("*/record.json"))
            total = sum(rates(path.parent / "log.jsonl") for path in branches)
            seconds = sum(json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in branches)
            found["rates"].setdefault(source.name, {})[seed.name] = round(total / joint, 3)
            found["seconds"].setdefault(source.name, {})[seed.name] = round(seconds, 1)
    return found


def main(run: str, name: str) -> None:
    """Write the file."""
    facts = {"command": f"python -m benchmarks.study.details RUN {name}", "machine": machine(), **details(Path(run))}
    (RESULTS / f"{name}_details.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
