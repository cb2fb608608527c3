"""Damage files of a finished run at random places, run the command that reads them again, and see what it says.

    python -m benchmarks.faults.run --places 1150 --jobs 2

Every place is one of: *named* (exit 2, or 75 where that is not the usual end, or a note in the results: the file or its
folder is named), *healed* (made again, and all files equal the undamaged run's), *harmless* (all results equal the undamaged
run's; the file keeps its damage and is no result, or its values are the same JSON), *unnamed* (exit 2 without the file or
folder), *silent* (exit 0, and a result or kept file is wrong), *traceback*, *hang*.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import random
import re
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.calling import LIMIT, Outcome, command, settle
from benchmarks.faults.case import PLACES, Place, files_of, words_in
from benchmarks.faults.damage import FAULTS, Tree, damage
from benchmarks.faults.further import MAKERS, make_runs
from benchmarks.faults.further import PLACES as FURTHER
from benchmarks.faults.launched import PLACES as LAUNCHED
from benchmarks.faults.launched import with_programs
from benchmarks.report import RESULTS, table, write

ENDS = ("named", "healed", "harmless", "unnamed", "silent", "traceback", "hang")
BAD = ENDS[3:]
_PASSING = {
    *("started", "finished", "seconds", "seconds_by_model", "checksum", "peak_memory_bytes", "resumed_from", "reused"),
    *(
        "reused_datasets",
        "merge_seconds",
        "host",
        "outputs",
        "since",
        "pid",
        "crc32",
        "retrained",
        "unchanged",
        "before",
        "memory",
    ),
}
"""Keys of files that another attempt at the same result may write otherwise."""

_KINDS = 9
"""Kinds of one run that are damaged in one process."""
_NO_RESULT = (".lock", "progress.json", ".hashes.json", ".merit", "recipe.yaml", "report.html")
_CALLED = {
    "base/": ("input.base", "input.tokenizer"),
    "vlm/": ("input.vision_from",),
    "lm/": ("input.languagemodel", "input.tokenizer"),
    "align/": ("sourceofalign-data", "sourceofinstruct-data"),
}
"""How the messages call what lies outside the run folder, by its folder."""
_PASSING_WORDS = re.compile(r"\d[\d.,]* (s|min|h)\b|\b[0-9a-f]{16}\b")


@dataclass(frozen=True)
class Finding:
    """One place.

    Attributes:
        kind: Of the file.
        fault: What was done.
        file: Where.
        words: The command that read it.
        end: One of ``ENDS``.
        said: The end of its message.
    """

    kind: str
    fault: str
    file: str
    words: str
    end: str
    said: str


def main() -> None:
    """Parse, damage, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", help="Only kinds whose name holds this, or one of these, with commas.")
    parser.add_argument("--again", action="store_true", help="Put --kind's findings in place of the last whole run's.")
    parser.add_argument("--jobs", type=int, default=1, help="Processes; the places are the same.")
    parser.add_argument("--no-write", action="store_true", help="Print only.")
    given = parser.parse_args()
    settle()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="merit-faults-") as folder:
        findings = survey(Path(folder), given.places, given.seed, given.kind, given.jobs)
    seconds = time.monotonic() - started
    words = f"python -m benchmarks.faults.run --places {given.places} --seed {given.seed}"
    notes, again, added = "", set[str](), set[str]()
    if given.again:
        last = json.loads((RESULTS / "faults.json").read_text(encoding="utf-8"))
        made = {item.kind for item in findings}
        findings = [
            found for found in (Finding(**item) for item in last["findings"]) if found.kind not in made
        ] + findings
        words, seconds = f"{words}, then with --again", seconds + last["seconds"]
        added = made - {item["kind"] for item in last["findings"]} | set(last.get("added", ()))
        again = made - added | set(last.get("again", ()))
        notes = "".join(
            f" {title} on a later version: {'; '.join(sorted(kinds))}."
            for title, kinds in (("Run again", again), ("Added", added))
            if kinds
        )
    text = summary(findings)
    print(text)
    for item in findings:
        if item.end in BAD:
            print(f"\n{item.end}: {item.kind}, {item.fault} of {item.file}, {item.words}\n{item.said}")
    if not given.no_write:
        write(
            "faults",
            "Damage at random places of a run",
            words,
            f"{text}\n\n{len(findings)} places in {seconds:.0f} s.{notes} Columns: see benchmarks/faults/run.py.",
            {
                "places": len(findings),
                "seconds": round(seconds, 1),
                "again": sorted(again),
                "added": sorted(added),
                "findings": [asdict(item) for item in findings],
            },
        )


def survey(folder: Path, places: int, seed: int, kind: str = "", jobs: int = 1) -> list[Finding]:
    """Damage ``places`` places, as many of each kind, of runs that are made below ``folder``."""
    every = (*PLACES, *FURTHER, *LAUNCHED)
    counts = {place: len(range(number, places, len(every))) for number, place in enumerate(every)}
    chosen = [place for place in every if any(word in place.kind for word in kind.split(","))]
    groups = [[place for place in chosen if place.moment in moments] for moments in MAKERS.values()]
    parts = [group[start : start + _KINDS] for group in groups for start in range(0, len(group), _KINDS)]
    work = [(folder / str(number), {place: counts[place] for place in part}, seed) for number, part in enumerate(parts)]
    if jobs == 1:
        return [found for part in work for found in _part(*part)]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = [pool.submit(_part, *part) for part in work]
        return [found for part in done for found in part.result()]


def _part(folder: Path, counts: dict[Place, int], seed: int) -> list[Finding]:
    trees = {moment: Tree(top) for moment, top in make_runs(folder, {place.moment for place in counts}).items()}
    expected: dict[tuple[str, tuple[str, ...]], tuple[Outcome, dict[str, Any]]] = {}
    findings: list[Finding] = []
    for place, count in counts.items():
        rng, before = random.Random(f"{place.kind}/{seed}"), len(findings)
        while len(findings) - before < count:
            words = rng.choice(place.reads)
            tree = trees[place.moment]
            if (place.moment, words) not in expected:
                outcome = _call(tree.root, words)
                assert outcome.code in (0, 75), outcome
                expected[place.moment, words] = outcome, _results(tree)
                tree.restore()
            found = _one(tree, place, words, rng, *expected[place.moment, words])
            if found is not None:
                findings.append(found)
        print(f"{place.kind}: {count}", flush=True)
    shutil.rmtree(folder)
    return findings


def _call(top: Path, words: tuple[str, ...]) -> Outcome:
    with_programs(top)
    return command(*words_in(words, top))


def _one(
    tree: Tree, place: Place, words: tuple[str, ...], rng: random.Random, usual: Outcome, results: dict[str, Any]
) -> Finding | None:
    files = files_of(place, tree.root)
    path, fault = rng.choice(files), rng.choice(FAULTS)
    touched = damage(path, fault, rng, files)
    if touched is None:
        return None
    names = tree.with_links([file.relative_to(tree.root).as_posix() for file in touched])
    held = {name: _content(tree.root / name) for name in names}
    found = _call(tree.root, words)
    end, why = _end(tree, place, found, usual, results, held)
    tree.restore(names)
    said = ((found.err[-1500:] if end in BAD else "") + why).replace(str(tree.root), place.moment)
    return Finding(place.kind, fault, names[0], " ".join(words), end, said)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _end(
    tree: Tree, place: Place, found: Outcome, usual: Outcome, results: dict[str, Any], held: dict[str, bytes | None]
) -> tuple[str, str]:
    if found.code == -1:
        return "hang", f"longer than {LIMIT} CPU seconds"
    if found.code == 2 or found.code == 75 != usual.code:
        return ("named" if _names(tree.root, list(held), found.err) else "unnamed"), ""
    if found.code != usual.code:
        return "traceback", f"exit {found.code}"
    same = _PASSING_WORDS.sub("", found.out) == _PASSING_WORDS.sub("", usual.out)
    if not same and _names(tree.root, list(held), found.out + found.err):
        return "named", ""
    now = _results(tree)
    kept = {name for name in held if _keeps(tree, name, held[name], results)}
    wrong = sorted(name for name in {*results, *now} - kept if results.get(name) != now.get(name))
    if wrong or not same:
        return "silent", f"other than without damage: {', '.join(wrong) or 'what it printed'}"
    lasting = {name for name in kept if not _same_json(held[name], tree.files[name])}
    if lasting and not place.unread:
        return "silent", f"exit 0, and {', '.join(sorted(lasting))} keeps its damage"
    return ("harmless", "") if kept else ("healed", "")


def _keeps(tree: Tree, name: str, held: bytes | None, results: dict[str, Any]) -> bool:
    path = tree.root / name
    if _content(path) != held or held == tree.files[name]:
        return False
    if name.startswith("run/") and path.name not in _NO_RESULT:
        return name in results or path.exists()  # else the command has used it up
    return True


def _same_json(one: bytes | None, other: bytes) -> bool:
    """Whether damage left every value as it was: a space became a tab, or the last digit of a number says the same."""
    try:
        return one is not None and json.loads(one) == json.loads(other)
    except ValueError:
        return False


def _names(root: Path, names: list[str], said: str) -> bool:
    """Whether a message names a damaged file or a folder that it lies in; of a base or source, the recipe's name for it."""
    flat, shared = "".join(said.split()), (root, root / "run", root / "run" / "logs")
    for name in names:
        path = root / name
        folders = [parent for parent in path.parents if parent.is_relative_to(root) and parent not in shared]
        if any(str(item) in flat for item in (path, *folders)):
            return True
        if any(name.startswith(folder) and any(word in flat for word in words) for folder, words in _CALLED.items()):
            return True
        if name.startswith("mixture/") and f"sourceof{path.parent.name}" in flat:
            return True
        if path.parent == root / "run" and str(path.parent) in flat:
            return True
    return False


def _results(tree: Tree) -> dict[str, Any]:
    """Everything that the run says, by file; times and the like aside."""
    found: dict[str, Any] = {}
    for path in sorted((tree.root / "run").rglob("*")):
        name = path.relative_to(tree.root).as_posix()
        if not path.is_file() or path.name in _NO_RESULT:
            continue
        found[name] = _meaning(path)
    return found


def _meaning(path: Path) -> Any:
    data = path.read_bytes()
    try:
        if path.suffix == ".json":
            return _lasting(json.loads(data))
        if path.suffix == ".jsonl":
            return [_lasting(json.loads(line)) for line in data.splitlines()]
    except ValueError:
        pass
    return data


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in _PASSING}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def summary(findings: list[Finding]) -> str:
    """Two tables: by kind of file, and by fault."""
    parts = []
    for title, key in (("file", "kind"), ("fault", "fault")):
        counts: dict[str, collections.Counter[str]] = {}
        for item in findings:
            counts.setdefault(getattr(item, key), collections.Counter())[item.end] += 1
        total = collections.Counter(item.end for item in findings)
        rows = [
            [name, sum(row.values()), *(row[end] for end in ENDS)] for name, row in {**counts, "all": total}.items()
        ]
        parts.append(table([title, "places", *ENDS], rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
