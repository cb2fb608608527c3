"""Bytes that each way moves, against a ring all-reduce that is carried out and counted."""

from __future__ import annotations

import numpy as np
import pytest

from merit.launch.traffic import Budget, branches, data_parallel, diloco, ring


@pytest.mark.parametrize("nodes", [2, 3, 4, 8])
def test_ring_all_reduce_moves_what_one_that_is_carried_out_moves(nodes: int) -> None:
    rng = np.random.default_rng(0)
    size = 24
    held = [np.array_split(values, nodes) for values in rng.normal(size=(nodes, size))]
    wanted = np.sum([np.concatenate(parts) for parts in held], axis=0)
    sent = 0
    for phase in (0, 1):  # scatter-reduce, then all-gather
        for step in range(nodes - 1):
            moved = [(node, (node + 1 - phase * 0 - step + phase) % nodes) for node in range(nodes)]
            packets = [(node, part, held[node][part].copy()) for node, part in moved]
            sent += packets[0][2].size
            for node, part, values in packets:
                target = held[(node + 1) % nodes]
                target[part] = target[part] + values if phase == 0 else values
    assert all(np.allclose(np.concatenate(parts), wanted) for parts in held)
    if size % nodes == 0:
        assert sent == pytest.approx(ring(size, nodes))


def test_a_run_that_merges_once_moves_base_rows_and_result() -> None:
    budget = Budget(parameters=1000, trained=800, steps=600, nodes=4, rows=400)
    once = branches(budget)
    assert (once.sent, once.received, once.meetings) == (1600, 2000 + 100, 1)
    assert once.total(4) == 4 * 3700
    five = branches(budget, rounds=5)
    assert (five.sent, five.received, five.meetings) == (5 * 1600, 2100 + 4 * 1600, 5)
    joint = data_parallel(budget)
    assert joint.sent == pytest.approx(600 * 2 * 0.75 * 1600)
    assert diloco(budget, 500).sent == pytest.approx(joint.sent / 300)
    assert diloco(budget, 500).meetings == 2


def test_time_of_a_transfer() -> None:
    budget = Budget(parameters=10**9, trained=10**9, steps=1, nodes=2)
    assert branches(budget).hours(8000) == pytest.approx(2 / 3600)


def test_a_preempted_branch_takes_longer_but_always_ends() -> None:
    import random

    from benchmarks.launch.bandwidth import SEVEN, Place, branch_hours, simulate

    calm = simulate(SEVEN, Place(1000.0, 0.0), 2)
    rough = simulate(SEVEN, Place(1000.0, 0.5), 20)
    assert calm["preemptions"] == 0
    assert rough["preemptions"] > 0
    assert rough["wall_hours"] > calm["wall_hours"] > 346.4 / 32
    wall, held, _ = branch_hours(SEVEN, Place(1000.0, 0.2), random.Random(0))
    assert held <= wall
