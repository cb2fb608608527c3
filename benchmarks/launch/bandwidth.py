"""Bytes that each way moves for the same budget, and a simulation of 7B on scattered spot machines.

    python -m benchmarks.launch.bandwidth [--price DOLLARS]

The table is arithmetic (merit.launch.traffic). The simulation's inputs are printed with it. Compute is the paper's (Choi &
Kim, arXiv 2606.01717: joint training of Qwen2.5-7B with its vision encoder on 1.6M examples, 43 h 18 min on 8 A100); nothing
of it was measured here. Preemptions are exponential, independent and seeded; a preempted node loses what it did since the
last checkpoint that was uploaded whole, waits for a machine, fetches base and checkpoint over its link, and goes on.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import asdict, dataclass

from merit.launch.traffic import Budget, Traffic, branches, data_parallel, diloco

PAPER_GPU_HOURS = 8 * (43 + 18 / 60)
"""Joint training of the paper's 7B mixture on 8 A100 (its figure, not ours)."""
SEVEN = Budget(parameters=8_292_166_656, trained=7_615_616_512, steps=12_500, nodes=4, rows=4_000_000_000)
"""7B with its encoder and projector (published sizes); 1.6M examples in batches of 128; rows as token ids, images aside."""


@dataclass(frozen=True)
class Place:
    """Scattered machines, all alike.

    Attributes:
        megabits: Of each node's link, each way.
        per_hour: Preemptions of a node per hour.
        gpus: A100 of each node.
        wait_minutes: From a preemption to the next machine, libraries installed.
        checkpoint_minutes: Between checkpoints.
    """

    megabits: float
    per_hour: float
    gpus: int = 8
    wait_minutes: float = 10.0
    checkpoint_minutes: float = 15.0


def ways(budget: Budget) -> list[Traffic]:
    return [
        branches(budget),
        branches(budget, rounds=4),
        diloco(budget, 500),
        diloco(budget, 50),
        data_parallel(budget),
    ]


def branch_hours(budget: Budget, place: Place, rng: random.Random) -> tuple[float, float, int]:
    """Wall hours of one branch, hours that a machine was held, and preemptions."""
    work = PAPER_GPU_HOURS / budget.nodes / place.gpus
    base = budget.parameters * budget.stored * 8 / (place.megabits * 1e6) / 3600
    state = 12 * budget.trained * 8 / (place.megabits * 1e6) / 3600  # float32 weights and two moments
    interval = max(place.checkpoint_minutes / 60, state)  # not more often than one can be uploaded
    whole = interval + 12 * budget.trained / 2e9 / 3600  # written at 2 GB/s; uploaded while training goes on
    wall = held = base
    done, saved, lost, first = 0.0, 0.0, 0, True
    while done < work:
        left = rng.expovariate(place.per_hour) if place.per_hour else float("inf")
        setup = 0.0 if first else base + (state if saved else 0.0)
        first = False
        if left <= setup:
            wall, held, lost = wall + left + place.wait_minutes / 60, held + left, lost + 1
            continue
        wall, held, left, done = wall + setup, held + setup, left - setup, saved
        if done + left * interval / whole >= work:
            wall, held = wall + (work - done) * whole / interval, held + (work - done) * whole / interval
            done = work
        else:
            wall, held, lost = wall + left + place.wait_minutes / 60, held + left, lost + 1
            done = saved = min(work, done + int(max(0.0, left - state) // whole) * interval)
    up = budget.trained * budget.stored * 8 / (place.megabits * 1e6) / 3600
    return wall + up, held + up, lost


def joint_hours(budget: Budget, place: Place, traffic: Traffic) -> float:
    """Wall hours of joint training over the same nodes and links, without a single preemption: the best it could do."""
    work = PAPER_GPU_HOURS / budget.nodes / place.gpus
    return work + traffic.hours(place.megabits)


def simulate(budget: Budget, place: Place, seeds: int) -> dict[str, float]:
    walls, helds, losts = [], [], []
    for seed in range(seeds):
        rng = random.Random(seed)
        found = [branch_hours(budget, place, rng) for _ in range(budget.nodes)]
        walls.append(max(wall for wall, _, _ in found))
        helds.append(sum(held for _, held, _ in found))
        losts.append(sum(lost for _, _, lost in found))
    return {
        "wall_hours": statistics.mean(walls),
        "wall_hours_90": sorted(walls)[int(0.9 * seeds)],
        "node_hours": statistics.mean(helds),
        "preemptions": statistics.mean(losts),
    }


def main() -> None:
    """Print and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--price", type=float, default=1.0, help="Dollars per hour of one GPU, held, busy or not.")
    given = parser.parse_args()
    from benchmarks.report import table, write

    rows = [
        [way.way, f"{way.sent / 1e9:,.1f}", f"{way.received / 1e9:,.1f}", f"{way.total(SEVEN.nodes) / 1e12:,.2f}",
         f"{way.meetings:,}", f"{way.hours(100):,.1f}", f"{way.hours(1000):,.2f}"]
        for way in ways(SEVEN)
    ]  # fmt: skip
    first = table(
        ["way", "sent per node, GB", "received per node, GB", "all nodes, TB", "meetings", "hours at 100 Mbit/s",
         "hours at 1 Gbit/s"], rows,
    )  # fmt: skip
    cases = [Place(megabits, rate) for megabits in (100.0, 1000.0) for rate in (0.0, 0.05, 0.2, 0.5)]
    results = [simulate(SEVEN, place, given.seeds) for place in cases]
    lines = []
    for place, found in zip(cases, results, strict=True):
        joint = joint_hours(SEVEN, place, data_parallel(SEVEN))
        hourly = place.gpus * given.price
        lines.append([
            f"{place.megabits:g}", f"{place.per_hour:g}", f"{found['wall_hours']:.1f}", f"{found['wall_hours_90']:.1f}",
            f"{found['node_hours']:.1f}", f"{found['preemptions']:.1f}", f"{found['node_hours'] * hourly:,.0f}",
            f"{joint:,.0f}", f"{joint * SEVEN.nodes * hourly:,.0f}",
        ])  # fmt: skip
    second = table(
        ["Mbit/s", "preemptions per node and hour", "wall hours, mean", "wall hours, 9 of 10 runs", "node-hours",
         "preemptions", "cost, $", "joint, data-parallel, never preempted: wall hours", "its cost, $"], lines,
    )  # fmt: skip
    text = (
        f"7B, {SEVEN.nodes} nodes, {SEVEN.steps:,} joint steps, weights and gradients of 2 bytes. Arithmetic.\n\n"
        f"{first}\n\nSimulated, {given.seeds} seeds: {SEVEN.nodes} nodes of 8 A100, {PAPER_GPU_HOURS:.0f} A100-hours of "
        "computing in all (the paper's figure for joint training), a checkpoint every 15 minutes or as often as one can be "
        "uploaded, 10 minutes from a preemption to the next machine. Cost: hours of all nodes × GPUs of a node × "
        f"{given.price:g} $ per GPU-hour, which is an input (`--price`) and nobody's offer.\n\n{second}"
    )
    print(text)
    write(
        "bandwidth",
        "What each way of training on scattered nodes moves",
        f"python -m benchmarks.launch.bandwidth --seeds {given.seeds} --price {given.price:g}",
        text,
        {
            "price_per_gpu_hour": given.price,
            "traffic": [asdict(way) for way in ways(SEVEN)],
            "cases": [asdict(place) | found for place, found in zip(cases, results, strict=True)],
        },
    )


if __name__ == "__main__":
    main()
