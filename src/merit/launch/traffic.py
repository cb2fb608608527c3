"""What each way of training on several nodes moves, in bytes: the figures behind the word "decentralized". Pure.

Source: ring all-reduce moves 2 (n - 1) / n of a buffer out of every node (Patarasuk & Yuan, J. Parallel Distrib. Comput. 69,
2009, §3); DiLoCo exchanges one such pseudo-gradient every H inner steps (Douillard et al., arXiv 2311.08105).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """What is trained, whichever way.

    Attributes:
        parameters: Weights of the model.
        trained: Of these, trained.
        steps: Optimizer steps of joint training on all rows.
        nodes: Machines; one branch each.
        stored: Bytes of a stored weight (2: bfloat16).
        gradient: Bytes of a gradient's entry as it travels (2: bfloat16, 4: float32).
        rows: Bytes of the encoded rows of all branches.
    """

    parameters: int
    trained: int
    steps: int
    nodes: int
    stored: int = 2
    gradient: int = 2
    rows: int = 0


@dataclass(frozen=True)
class Traffic:
    """What one way moves.

    Attributes:
        way: Its name.
        sent: Bytes that a node sends, from the first step to the merged model.
        received: Bytes that it receives.
        meetings: How often all nodes wait for each other.
    """

    way: str
    sent: float
    received: float
    meetings: int

    def total(self, nodes: int) -> float:
        """Bytes that all nodes send and receive."""
        return nodes * (self.sent + self.received)

    def hours(self, megabits: float) -> float:
        """Time of a node's transfers at ``megabits`` per second each way, both ways at once."""
        return max(self.sent, self.received) * 8 / (megabits * 1e6) / 3600


def branches(budget: Budget, rounds: int = 1) -> Traffic:
    """MERIT: a node fetches the base and its rows, and sends its trained weights once, or once a round.

    Args:
        budget: What is trained.
        rounds: How often the branches are averaged. Between rounds a node fetches the average.
    """
    trained = budget.trained * budget.stored
    received = budget.parameters * budget.stored + budget.rows / budget.nodes + (rounds - 1) * trained
    return Traffic(
        "branches, merged once" if rounds == 1 else f"branches, {rounds} rounds", rounds * trained, received, rounds
    )


def data_parallel(budget: Budget) -> Traffic:
    """Joint training with the batch dealt out to the nodes: an all-reduce of the gradients at every step."""
    return _reduced(budget, budget.steps, "data-parallel, every step")


def diloco(budget: Budget, inner: int = 500) -> Traffic:
    """Joint training in DiLoCo's form: an all-reduce of the change in weights every ``inner`` steps of every node."""
    return _reduced(budget, math.ceil(budget.steps / inner), f"DiLoCo, every {inner} steps")


def _reduced(budget: Budget, times: int, way: str) -> Traffic:
    moved = times * ring(budget.trained * budget.gradient, budget.nodes)
    return Traffic(way, moved, moved + budget.parameters * budget.stored + budget.rows / budget.nodes, times)


def ring(size: float, nodes: int) -> float:
    """Bytes that a node sends, and as many that it receives, in a ring all-reduce of ``size`` bytes."""
    return 2 * (nodes - 1) / nodes * size
