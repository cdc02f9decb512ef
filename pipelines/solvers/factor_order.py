"""In which order the tiles of a Cholesky factor are made, and by which worker.

Left-looking: tile (i, j) is K's tile less the products L_ik L_jk^T for k < j, divided by L_jj. It can be finished
when row i has its tiles before j, and row j its tiles up to j. So each row's tiles are made from left to right,
and how far each row has come says what is ready.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .. import tasks
from ..tiles import Tile

AHEAD = 2
"""Tasks that a worker has at a time: one to work on, one to go on with."""

BEGUN = 2
"""Tiles that a worker holds that are begun and not finished; more gain nothing on up to eight workers."""

STRETCH = 4
"""Products by which a task at most brings a begun tile forward: it must not keep a worker from what is urgent."""


@dataclass(frozen=True)
class Step:
    """A task: subtract the first ``products`` products from a tile, or all of them and finish it."""

    tile: Tile
    products: int
    finish: bool

    @property
    def cost(self) -> float:
        """In products of two tiles."""
        i, j = self.tile
        return self.products + 1.0 if i != j else self.products / 2 + 1.0


class FactorOrder:
    """A source of tasks: the tiles that are missing, those on the longest way to the end first.

    Where none can be finished, one is begun whose first products can be subtracted already: without that the way
    from one diagonal tile to the next would keep all but one worker waiting.

    count: tile rows. present: tiles that are there. workers: how many there are.
    """

    def __init__(self, count: int, present: Collection[Tile], workers: int) -> None:
        self._count = count
        self._present = set(present)
        self._complete = [0] * count
        for i in range(count):
            self._advance(i)
        self._load = [0.0] * workers
        self._flying: dict[Step, int] = {}
        self._begun: dict[Tile, tuple[int, int]] = {}

    @property
    def made(self) -> int:
        return len(self._present)

    @property
    def total(self) -> int:
        return self._count * (self._count + 1) // 2

    def owner(self, step: Step) -> int:
        """The worker that a task handed out is for."""
        return self._flying[step]

    def next(self) -> Step | tasks.Wait | None:
        if len(self._present) == self.total:
            return None
        waiting = [self._flying_of(worker) for worker in range(len(self._load))]
        if min(waiting) >= AHEAD:
            return tasks.WAIT
        busy = {step.tile for step in self._flying}
        ready = [(i, self._complete[i]) for i in range(self._count) if self._ready(i)]
        for tile in sorted((tile for tile in ready if tile not in busy), key=_urgency):
            worker = self._worker_for(tile, waiting)
            return self._hand_out(Step(tile, tile[1], True), worker)
        return self._begin(waiting, busy)

    def done(self, step: Step) -> None:
        worker = self._flying.pop(step)
        self._load[worker] -= step.cost
        if step.finish:
            self._begun.pop(step.tile, None)
            self._present.add(step.tile)
            self._advance(step.tile[0])

    def _advance(self, i: int) -> None:
        while (i, self._complete[i]) in self._present:
            self._complete[i] += 1

    def _ready(self, i: int) -> bool:
        j = self._complete[i]
        return j == i or (j < i and self._complete[j] > j)

    def _flying_of(self, worker: int) -> int:
        return sum(1 for other in self._flying.values() if other == worker)

    def _worker_for(self, tile: Tile, waiting: list[int]) -> int:
        """Who has begun the tile, else who has its row in its cache, unless another is much less loaded."""
        if tile in self._begun:
            return self._begun[tile][1]
        free = [worker for worker in range(len(waiting)) if waiting[worker] < AHEAD]
        usual = tile[0] % len(waiting)
        least = min(free, key=lambda worker: self._load[worker])
        cost = Step(tile, tile[1], True).cost
        return usual if usual in free and self._load[usual] <= self._load[least] + cost / 2 else least

    def _begin(self, waiting: list[int], busy: set[Tile]) -> Step | tasks.Wait:
        idle = min(range(len(waiting)), key=lambda worker: (waiting[worker], self._load[worker]))
        if waiting[idle]:
            return tasks.WAIT
        held = sum(1 for _, worker in self._begun.values() if worker == idle)
        nexts = {(i, j) for i, j in enumerate(self._complete) if j <= i}
        diagonals = {(i, i) for i in range(self._count)}
        for tile in sorted((nexts | diagonals) - busy - self._present, key=_urgency):
            i, j = tile
            products, worker = self._begun.get(tile, (0, idle))
            possible = min(self._complete[i], self._complete[j], j, products + STRETCH)
            if worker == idle and possible > products and (tile in self._begun or held < BEGUN):
                self._begun[tile] = possible, idle
                return self._hand_out(Step(tile, possible, False), idle)
        return tasks.WAIT

    def _hand_out(self, step: Step, worker: int) -> Step:
        self._flying[step] = worker
        self._load[worker] += step.cost
        return step


def _urgency(tile: Tile) -> tuple[int, int]:
    """The smaller the longer the way from a tile to the end of the factor, counted in products.

    It leads along row i to the diagonal, i^2 - j^2, and from there down the diagonal, 3/2 (N^2 - i^2).
    """
    i, j = tile
    return i * i + 2 * j * j, i
