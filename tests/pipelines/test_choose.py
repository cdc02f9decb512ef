"""The choice of a solver: by what each would take, what fits, and what was asked; the reason is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipelines.errors import ExperimentError
from pipelines.experiment import Solve
from pipelines.solvers import Choice, Cholesky, Eigen, Estimate, Means, Problem, build, choose, solve_bytes
from pipelines.solvers.choose import PRECONDITIONING
from pipelines.solvers.conjugate_gradient import ConjugateGradient, checkpoint_bytes
from pipelines.solvers.costs import estimates, largest_rank
from pipelines.solvers.mixed import MixedCholesky
from pipelines.solvers.nystrom import Nystrom
from pipelines.solvers.preconditioner import preconditioner_bytes
from pipelines.solvers.tiled_cholesky import TiledCholesky
from pipelines.spectrum import Spectrum
from pipelines.speed import Speed

GIB = 2**30
SPEED = Speed(entries=2e7, operations=1e11, worker=5e10, worker_single=1e11, read=1e9)
PLENTY = Means(workers=2, driver_bytes=10**15, worker_bytes=10**13, disk_free=10**16, speed=SPEED)
LAPTOP = Means(workers=2, driver_bytes=20 * GIB, worker_bytes=8 * GIB, disk_free=100 * GIB, speed=SPEED)


def problem(n: int, **changes: Any) -> Problem:
    """A classification problem of ten classes at one ridge, no tile of whose matrix is stored."""
    entries = n * (n + 1) // 2
    described = Problem(n, 10, 1, missing_entries=entries, missing_bytes=4 * entries)
    return replace(described, **changes)


def test_small_problems_are_solved_in_memory() -> None:
    """Protects the quick path: whatever the workers, nothing is worth sharing out of a small matrix."""
    for n in (10, 1000, 10_000):
        choice = choose("auto", problem(n), LAPTOP)
        assert (choice.method, choice.recomputed, choice.problem) == ("cholesky", False, "")


def test_a_long_path_with_leave_one_out_is_decomposed_once() -> None:
    """Protects the balance of EIGEN_COST: 24 factors against 18; memory, or float32, turns it."""
    many = problem(1000, ridges=12, loo=True)
    assert choose("auto", problem(1000, ridges=12), PLENTY).method == "cholesky"
    choice = choose("auto", many, PLENTY)
    assert choice.method == "eigen"
    assert "path of 12 with leave-one-out costs 24" in choice.reason
    tight = replace(PLENTY, driver_bytes=solve_bytes("eigen", 1000, "float64") - 1)
    choice = choose("auto", many, tight)
    assert choice.method == "cholesky"
    assert "eigen would be quicker but needs" in choice.reason
    assert choose("auto", replace(many, dtype="float32"), PLENTY).method == "cholesky"


def test_what_memory_cannot_hold_is_factored_out_of_core() -> None:
    """Protects n = 75,000 with 20 GiB: 22 GB of triangle in memory are too many, on disk they are not."""
    choice = choose("auto", problem(75_000), LAPTOP)
    assert choice.method == "tiled-cholesky"
    assert "cholesky would be quicker but needs" in choice.reason
    assert choose("auto", problem(75_000), replace(LAPTOP, driver_bytes=64 * GIB)).method == "cholesky"
    assert choose("auto", problem(60_000), LAPTOP).method == "cholesky"


def test_memory_is_not_filled_to_the_brim_of_its_own_accord() -> None:
    """Protects the machine's other processes: what just fits is taken in memory when it is asked for."""
    needed = solve_bytes("cholesky", 30_000, "float64")
    just = replace(LAPTOP, driver_bytes=needed + 2**20)
    assert choose("auto", problem(30_000), just).method == "tiled-cholesky"
    assert choose("cholesky", problem(30_000), just).method == "cholesky"
    nothing_else = replace(just, disk_free=problem(30_000).missing_bytes + 1)
    assert choose("auto", problem(30_000, recomputable=False), nothing_else).method == "cholesky"


def test_leave_one_out_is_estimated_only_where_an_exact_one_does_not_fit() -> None:
    """Protects the score that ridges are chosen by: a quicker estimate does not take the place of the exact one."""
    many = replace(PLENTY, workers=1000)
    asked = problem(60_000, loo=True)
    ways = {one.method: one.seconds for one in estimates(asked, many) if not one.obstacle}
    assert ways["tiled-cholesky"] < min(ways["cholesky"], ways["eigen"])
    choice = choose("auto", asked, many)
    assert choice.method in ("cholesky", "eigen")
    assert choice.reason.endswith("; leave-one-out is exact")
    needed = solve_bytes("cholesky", asked.n, "float64")
    assert choose("auto", asked, replace(many, driver_bytes=int(needed / 0.95))).method == "cholesky"
    choice = choose("auto", asked, replace(many, driver_bytes=needed - 1))
    assert choice.method == "tiled-cholesky"
    assert choice.reason.endswith("; leave-one-out is estimated")
    assert "leave-one-out is" not in choose("auto", problem(60_000), many).reason


def test_without_room_for_a_matrix_its_tiles_are_recomputed() -> None:
    """Protects n = 100,000 vectors on two cores: neither 20 GB of tiles nor 40 GB of factor fit the disk."""
    full = replace(LAPTOP, disk_free=12 * GIB)
    choice = choose("auto", problem(100_000), full)
    assert (choice.method, choice.recomputed) == ("conjugate-gradient", True)
    assert "of disk" in choice.reason
    assert choice.estimate.matrix_seconds == 0
    assert choice.estimate.passes > 40


@pytest.mark.parametrize(("entries", "recomputed"), [(1e3, False), (1e10, True)])
def test_tiles_are_stored_or_recomputed_by_what_costs_less(entries: float, recomputed: bool) -> None:
    """Protects the cost model's direction: slow kernels are stored, arithmetic that beats the disk is not."""
    means = replace(LAPTOP, speed=replace(SPEED, entries=entries))
    choice = choose("conjugate-gradient", problem(50_000), means)
    assert choice.recomputed is recomputed
    assert "storing the tiles" in choice.reason
    assert "computing the tiles at every pass" in choice.reason
    for tiles in ("stored", "recomputed"):
        assert choose("conjugate-gradient", problem(50_000, tiles=tiles), means).estimate.tiles == tiles


@pytest.mark.parametrize("method", ["conjugate-gradient", "nystrom"])
def test_tiles_are_stored_where_a_worker_cannot_compute_them_as_it_multiplies(method: str) -> None:
    """Protects small workers from a way that is quicker and does not fit: the other one does."""
    means = replace(LAPTOP, speed=replace(SPEED, entries=1e10), worker_bytes=GIB)
    one = problem(50_000, centres=1000 if method == "nystrom" else 0)
    assert choose(method, one, means).recomputed
    choice = choose(method, replace(one, tile_bytes=GIB), means)
    assert (choice.recomputed, choice.problem) == (False, "")
    assert "cannot be: needs" in choice.reason
    asked = choose(method, replace(one, tile_bytes=GIB, tiles="recomputed"), means)
    assert "of memory in a worker" in asked.problem


def test_conjugate_gradients_must_promise_much_to_be_taken() -> None:
    """Protects from a method whose iterations are a guess: three times quicker than the next, or not at all."""
    taken = set()
    for n in (20_000, 100_000, 500_000, 2_000_000):
        stored = problem(n, missing_entries=0, missing_bytes=0)
        ways = [one for one in estimates(stored, PLENTY) if not one.obstacle]
        guess = min(one.seconds for one in ways if one.method == "conjugate-gradient")
        sure = min(one.seconds for one in ways if one.method != "conjugate-gradient")
        method = choose("auto", stored, PLENTY).method
        assert (method == "conjugate-gradient") == (3 * guess < sure)
        taken.add(method == "conjugate-gradient")
    assert taken == {False, True}


def test_nystrom_is_never_chosen_silently() -> None:
    """Protects the model: where nothing exact fits, it is named, and not taken."""
    tiny = Means(1, 2**20, 2**20, 2**20, SPEED)
    choice = choose("auto", problem(10**6), tiny)
    assert choice.problem
    assert 'solve.method = "nystrom" (another model' in choice.problem


def test_what_was_asked_for_but_does_not_fit_is_refused_with_what_would() -> None:
    """Protects from a solve that dies hours later: the message names methods and precisions that pass."""
    need = solve_bytes("cholesky", 1000, "float64")
    choice = choose("cholesky", problem(1000), replace(LAPTOP, driver_bytes=need - 1))
    assert "1000 samples by cholesky in float64: it needs" in choice.problem
    assert (
        'solve.method = "cholesky" with solve.dtype = "float32"'
        in choose("cholesky", problem(1000), Means(1, need - 1, 1, 10**15, SPEED)).problem
    )
    assert (
        'solve.method = "cholesky"'
        in choose("eigen", problem(1000), replace(LAPTOP, driver_bytes=need)).problem
    )
    assert "fewer training samples" in choose("auto", problem(1000), Means(1, 1000, 1000, 0, SPEED)).problem
    worker = choose("tiled-cholesky", problem(10_000), replace(LAPTOP, worker_bytes=2**20)).problem
    assert "of memory in a worker" in worker


def test_what_is_advised_is_not_refused() -> None:
    """Protects from going in circles: the spectrum, on which rests what a sketch takes in a worker, is not guessed at
    where another method was asked for."""
    spectrum = Spectrum(np.arange(1, 1001.0) ** -1.3, 1.3, 1e-3, -1.0)
    for worker in (200 * 2**20, 300 * 2**20, 400 * 2**20):
        means = replace(LAPTOP, worker_bytes=worker)
        advice = choose("tiled-cholesky", problem(40_000), means).problem
        asked = choose("conjugate-gradient", problem(40_000, spectrum=spectrum, shifts=(1e-2,)), means)
        assert "of memory in a worker" in advice
        assert asked.problem
        assert "conjugate-gradient" not in advice


def test_a_full_disk_alone_is_left_to_the_plan_to_say() -> None:
    """Protects one message from being said twice: the plan adds what else the disk must hold."""
    choice = choose("tiled-cholesky", problem(50_000), replace(LAPTOP, disk_free=0))
    assert (choice.method, choice.problem) == ("tiled-cholesky", "")


def test_conjugate_gradients_keep_no_more_sums_on_disk_than_there_are_squares() -> None:
    """Protects small matrices on a full disk: of one square there is one file, whatever the workers."""

    def disk(n: int, means: Means) -> int:
        described = problem(n, missing_bytes=0)
        return choose("conjugate-gradient", described, means).estimate.disk_bytes

    n, columns = 6000, 2048  # a sketch takes no more columns at a time
    kept = checkpoint_bytes(n, 10, 1, preconditioner_bytes(n, n // 2, "float32"))
    assert disk(n, LAPTOP) <= kept + 2 * n * columns * 8
    assert disk(n, LAPTOP) == disk(n, replace(LAPTOP, workers=64))
    assert disk(100_000, replace(LAPTOP, workers=4)) > disk(100_000, LAPTOP)


def test_more_centres_than_samples_are_refused() -> None:
    with pytest.raises(ExperimentError, match=r"solve\.centres = 11 are more than the 10 training samples"):
        choose("nystrom", problem(10, centres=11), LAPTOP)
    assert choose("nystrom", problem(10, centres=10), LAPTOP).method == "nystrom"


def test_more_workers_take_less_time_and_refits_more() -> None:
    """Protects the direction of every estimate."""
    for n in (20_000, 200_000):
        base = list(estimates(problem(n), PLENTY))
        more = list(estimates(problem(n), replace(PLENTY, workers=16)))
        again = list(estimates(problem(n, refit=True), PLENTY))
        for one, wide, twice in zip(base, more, again, strict=True):
            assert wide.total_seconds < one.total_seconds
            assert twice.seconds > one.seconds
            assert min(one.driver_bytes, one.disk_bytes + 1) > 0


def test_the_rank_of_a_preconditioner_gives_way_to_memory() -> None:
    """Protects the driver: what making it takes is at most half of the memory that is free."""
    ranks = [
        largest_rank(problem(100_000), replace(PLENTY, driver_bytes=share * GIB)) for share in (1, 4, 16, 64)
    ]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == 4
    for share, rank in zip((1, 4, 16, 64), ranks, strict=True):
        assert preconditioner_bytes(100_000, rank, "float32") <= share * GIB // 2


@pytest.mark.parametrize("tiles", ["stored", "recomputed", "auto"])
@pytest.mark.parametrize("ridge", [1e-3, 1e-5, 1e-7])
def test_the_preconditioner_rests_on_nothing_that_is_timed(tiles: str, ridge: float) -> None:
    """Protects "same file, same bits" from a busy machine, another disk, and other workers: its rank follows from what
    the solver is given here."""
    spectrum = Spectrum(np.arange(1, 1001.0) ** -1.3, 1.3, 1e-3, -1.0)
    n = 50_000
    described = problem(n, shifts=(n * ridge,), spectrum=spectrum, tiles=tiles, entry_operations=3e4)

    def given(means: Means) -> list[Any]:
        estimate = choose("conjugate-gradient", described, means).estimate
        return [getattr(estimate, key) for key in PRECONDITIONING]

    first = given(LAPTOP)
    for busy in (0.01, 0.3, 30.0):
        slower = Speed(*(busy * rate for rate in (SPEED.entries, SPEED.operations)), SPEED.worker, 1e9, 1e8)
        assert given(replace(LAPTOP, speed=slower)) == first
        assert given(replace(LAPTOP, speed=replace(SPEED, worker=busy * SPEED.worker), workers=9)) == first


def test_a_rank_is_bound_by_memory_only_where_more_would_be_taken() -> None:
    """Protects the advice to give the driver more memory, which must be of use."""
    spectrum = Spectrum(np.arange(1, 1001.0) ** -1.3, 1.3, 1e-3, -1.0)
    known = problem(50_000, shifts=(5e-2,), spectrum=spectrum)
    for described, gib, bound in (
        (known, 2**20, False),
        (known, 1, True),
        (problem(50_000), 1, True),
        (problem(1000), 2**20, False),
    ):
        means = replace(PLENTY, driver_bytes=gib * GIB)
        ways = [one for one in estimates(described, means) if one.method == "conjugate-gradient"]
        assert [one.memory_bound for one in ways] == [bound, bound]


def test_hard_problems_are_thought_to_take_more_iterations() -> None:
    """Protects "auto": from the spectrum of a sample, small ridges and slow decay cost passes, up to the limit."""
    falling = Spectrum(np.arange(1, 1001.0) ** -1.5, 1.5, 1e-3, -1.0)
    slower = replace(falling, values=np.arange(1, 1001.0) ** -1.1, decay=1.1)

    def passes(spectrum: Spectrum, ridge: float, limit: int = 10**6) -> int:
        described = problem(50_000, shifts=(50_000 * ridge,), spectrum=spectrum, max_iterations=limit)
        return choose("conjugate-gradient", described, LAPTOP).estimate.passes

    assert passes(falling, 1e-3) < passes(falling, 1e-5) < passes(slower, 1e-5)
    assert passes(slower, 1e-9, limit=50) < passes(slower, 1e-9)


def chosen(method: str) -> Choice:
    return Choice(Estimate(method, "stored", 0.0, 0.0, 0, 0, 0, rank_bytes=2**20), "asked for")


@pytest.mark.parametrize(
    ("options", "method", "expected"),
    [
        ({"dtype": "float32"}, "cholesky", Cholesky("float32", 1e-8, True, True)),
        ({"dtype": "mixed"}, "cholesky", MixedCholesky("mixed", 1e-8, True, True)),
        ({}, "eigen", Eigen("float64", 1e-8, True, True)),
        ({"dtype": "mixed"}, "tiled-cholesky", TiledCholesky("mixed", 1e-8, True, True)),
        (
            {"tolerance": 1e-4, "max_iterations": 7},
            "conjugate-gradient",
            ConjugateGradient(1e-4, 7, seed=3, jitter=1e-8, absolute=True, rank_bytes=2**20),
        ),
        (
            {"method": "nystrom", "centres": 5},
            "nystrom",
            Nystrom(centres=5, seed=3, jitter=1e-8, absolute=True),
        ),
    ],
)
def test_options_reach_the_solver(options: dict[str, Any], method: str, expected: Any) -> None:
    """Protects every key of ``[solve]`` from being accepted and forgotten."""
    solve = Solve(ridges=(1e-3,), jitter=1e-8, absolute=True, **options)
    assert build(solve, chosen(method), seed=3, loo=True) == expected
