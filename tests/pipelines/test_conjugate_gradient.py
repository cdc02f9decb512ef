"""Preconditioned conjugate gradients against SciPy's direct solve (R3, R6), their preconditioner and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import CountingTiles, DenseTiles, Stop, direct, gaussian, relative, same, targets

from cluster.local import open_cluster
from cluster.profiles import Profile
from pipelines import products, tasks
from pipelines.errors import DataError, ExperimentError
from pipelines.operators import GramOperator
from pipelines.site import Site
from pipelines.solvers import conjugate_gradient, iterated
from pipelines.solvers.base import Solution, Status
from pipelines.solvers.conjugate_gradient import ConjugateGradient
from pipelines.solvers.iterated import PROBE_ERROR, PROBE_TOLERANCE, STATE_FILE
from pipelines.solvers.preconditioner import preconditioner_bytes

NO_PRECONDITIONER = 1
"""Bytes for a preconditioner of rank one."""


def solve(
    K: np.ndarray, ridges: list[float], Y: np.ndarray, solver: ConjugateGradient | None = None, side: int = 64
) -> tuple[Solution, ...]:
    solver = solver or ConjugateGradient()
    return solver.solve(solver.factor(GramOperator(DenseTiles(K, side), np.arange(len(K))), ridges), Y)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 90),
    side=st.integers(3, 40),
    t=st.integers(1, 4),
    ridges=st.lists(st.sampled_from([1.0, 1e-2, 1e-3, 1e-5]), min_size=1, max_size=3, unique=True),
    dtype=st.sampled_from(["float32", "float64"]),
    data=st.data(),
)
def test_equals_the_direct_solve(
    n: int, side: int, t: int, ridges: list[float], dtype: str, data: st.DataObject
) -> None:
    """R6: the same solution as R3, to the residual that was asked for, on any rows of a store."""
    full = gaussian(n, dtype=dtype)
    keep = data.draw(st.sets(st.integers(0, n - 1), min_size=1))
    rows = np.array(sorted(keep), np.int64)
    K, Y = full[np.ix_(rows, rows)], targets(len(rows), t)
    solver = ConjugateGradient()
    found = solver.solve(solver.factor(GramOperator(DenseTiles(full, side), rows), ridges), Y)
    assert [one.ridge for one in found] == ridges
    for one in found:
        assert one.shift == len(rows) * one.ridge
        assert one.status is Status.SOLVED
        remainder = K.astype(np.float64) @ one.alpha + one.shift * one.alpha - Y
        np.testing.assert_allclose(np.linalg.norm(remainder) / np.linalg.norm(Y), one.residual, atol=1e-12)
        assert one.residual <= 1e-6
        # |error| <= |residual| / shift, and |solution| >= |Y| / (largest eigenvalue + shift)
        worst = (np.linalg.norm(K, 2) + one.shift) / one.shift * 1e-6
        assert relative(one.alpha, direct(K, one.shift, Y)) <= worst


def test_the_tolerance_is_kept_to() -> None:
    """Protects the option: a tighter one is reached, a looser one counts as solved and costs less."""
    K, Y = gaussian(300), targets(300)
    loose, tight = (
        solve(K, [1e-3], Y, ConjugateGradient(tolerance=tolerance, rank_bytes=NO_PRECONDITIONER))[0]
        for tolerance in (1e-3, 1e-11)
    )
    assert loose.status is tight.status is Status.SOLVED
    assert tight.residual <= 1e-11 < 1e-6 < loose.residual <= 1e-3
    assert loose.iterations < tight.iterations
    assert relative(tight.alpha, direct(K, tight.shift, Y)) < 1e-8


def test_the_preconditioner_saves_iterations_and_holds_them_as_the_ridge_falls() -> None:
    """R6: fewer iterations than without, and no more of them at a smaller ridge while its rank exceeds the
    effective dimension."""
    n, ridges = 600, [1e-1, 1e-2, 1e-3]
    K, Y = gaussian(n), targets(n)
    values = np.linalg.eigvalsh(K)
    with_it = solve(K, ridges, Y)
    without = solve(K, ridges, Y, ConjugateGradient(rank_bytes=NO_PRECONDITIONER))
    made = ConjugateGradient().factor(GramOperator(DenseTiles(K, 64), np.arange(n)), ridges).preconditioner
    assert made.rank > (values / (values + n * ridges[-1])).sum()
    for better, worse in zip(with_it, without, strict=True):
        assert 2 * better.iterations < worse.iterations
    assert max(one.iterations for one in with_it) <= 12
    assert without[-1].iterations > 3 * without[0].iterations, "without it, a smaller ridge is harder"
    assert any("rank" in note and "effective dimension" in note for note in with_it[0].notes)


def test_the_effective_dimension_is_estimated() -> None:
    """R9: within a few percent, also where the preconditioner knows little of the spectrum."""
    n, ridges = 500, [1e-2, 1e-4, 1e-6]
    K = gaussian(n)
    values = np.linalg.eigvalsh(K).clip(0)
    for solver, tolerance in (
        (ConjugateGradient(), 0.02),
        (ConjugateGradient(rank_bytes=preconditioner_bytes(n, 40, "float32")), 0.06),
    ):
        for one in solve(K, ridges, targets(n), solver):
            exact = (values / (values + one.shift)).sum()
            assert one.effective_dimension == pytest.approx(exact, rel=tolerance)


@pytest.mark.slow
def test_what_the_effective_dimension_leaves_of_n_is_estimated_where_it_is_small() -> None:
    """R9: generalised cross-validation divides by (n - d)^2, so n - d must not be the noise of two large numbers."""
    n, ridges = 500, [1e-8, 1e-10]
    K = gaussian(n, scale=4.0)
    values = np.linalg.eigvalsh(K).clip(0)
    for seed in range(3):
        for one in solve(K, ridges, targets(n), ConjugateGradient(seed=seed)):
            exact = float((one.shift / (values + one.shift)).sum())
            assert exact < 1e-3 * n
            assert one.effective_dimension is not None
            assert n - one.effective_dimension == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize(("ridge", "spared"), [(1e-1, False), (1e-3, False), (1e-5, True), (1e-7, False)])
def test_probes_end_where_what_they_tell_is_known(
    ridge: float, spared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the effective dimension, and n less it, from probes that end too early; and passes that only further
    digits of them would ask for."""
    n = 500
    K = gaussian(n, scale=1.5)
    Y = np.linalg.eigh(K)[1][:, -3:]  # solved at once: the iterations are those of the probes
    solver = ConjugateGradient(tolerance=1e-4, rank_bytes=preconditioner_bytes(n, 60, "float32"))
    (found,) = solve(K, [ridge], Y, solver)
    monkeypatch.setattr(conjugate_gradient, "PROBE_ERROR", 0.0)
    (longer,) = solve(K, [ridge], Y, solver)
    monkeypatch.setattr(iterated, "PROBE_TOLERANCE", 0.0)
    (exact,) = solve(K, [ridge], Y, replace(solver, tolerance=1e-10))
    assert found.iterations < exact.iterations
    assert (found.iterations < longer.iterations) is spared
    assert found.effective_dimension is not None
    assert exact.effective_dimension is not None
    known = min(exact.effective_dimension, n - exact.effective_dimension)
    error = max(PROBE_ERROR * known, PROBE_TOLERANCE**2 * n)
    assert found.effective_dimension == pytest.approx(exact.effective_dimension, rel=0, abs=error)


def test_all_columns_and_ridges_share_one_product_an_iteration() -> None:
    """Protects the price: tiles are read once an iteration however many targets and ridges there are."""
    n = 200
    source = CountingTiles(gaussian(n), 64)
    solver = ConjugateGradient(rank_bytes=NO_PRECONDITIONER)
    state = solver.factor(GramOperator(source, np.arange(n)), [1e-1, 1e-2, 1e-3])
    source.reads.clear()
    found = solver.solve(state, targets(n, 5))
    longest = max(one.iterations for one in found)
    assert longest > min(one.iterations for one in found)
    assert max(source.reads.values()) == longest + 1, "one more measures the last residual"


def test_targets_of_zero_and_columns_of_zero_need_no_iteration() -> None:
    K, Y = gaussian(50), targets(50)
    Y[:, 1] = 0.0
    (one,) = solve(K, [1e-3], Y)
    assert not one.alpha[:, 1].any()
    assert relative(one.alpha, direct(K, one.shift, Y)) < 1e-3
    (nothing,) = solve(K, [1e-3], np.zeros((50, 2)))
    assert (nothing.residual, nothing.status) == (0.0, Status.SOLVED)
    assert not nothing.alpha.any()


def test_too_few_iterations_end_with_an_honest_status() -> None:
    """Protects who reads the report: the residual is the measured one, and the note says what to do."""
    K, Y = gaussian(400), targets(400)
    solver = ConjugateGradient(max_iterations=5, rank_bytes=NO_PRECONDITIONER)
    easy, hard = solve(K, [10.0, 1e-7], Y, solver)
    assert easy.status is Status.SOLVED
    assert hard.status is Status.NOT_CONVERGED
    assert hard.iterations == 5
    remainder = K @ hard.alpha + hard.shift * hard.alpha - Y
    assert hard.residual == pytest.approx(np.linalg.norm(remainder) / np.linalg.norm(Y), rel=1e-9)
    assert any("5 iterations were done; raise solve.max_iterations" in note for note in hard.notes)
    assert hard.effective_dimension is None


def test_an_ill_conditioned_matrix_ends_with_an_honest_status() -> None:
    """Protects small ridges on float32 matrices with one huge eigenvalue, as tangent kernels have: whatever the
    status says is what the residual in float64 is."""
    n = 300
    K = (1e4 + gaussian(n, scale=60.0)).astype(np.float32)
    K = np.maximum(K, K.T)
    Y = targets(n) - targets(n).mean(axis=0)
    for one in solve(K, [1e-3, 1e-6, 1e-9, 1e-13], Y, ConjugateGradient(max_iterations=300)):
        remainder = K.astype(np.float64) @ one.alpha + one.shift * one.alpha - Y
        residual = np.linalg.norm(remainder) / np.linalg.norm(Y)
        assert one.residual == pytest.approx(residual, rel=0.2, abs=1e-8)
        assert (one.status is Status.SOLVED) == (one.residual <= 1e-6)
        assert (one.status is Status.NOT_CONVERGED) == any("is above 1e-06" in note for note in one.notes)
    assert one.status is Status.NOT_CONVERGED


def test_a_matrix_that_is_not_positive_definite_is_found_out() -> None:
    """Protects from a solution of nothing: a direction of negative curvature ends that ridge, and no other."""
    K = gaussian(100)
    K[:, 3] = K[3] = 0.0
    K[3, 3] = -5.0
    good, bad = solve(K, [1.0, 1e-3], targets(100), ConjugateGradient(rank_bytes=NO_PRECONDITIONER))
    assert good.status is Status.SOLVED
    assert bad.status is Status.NOT_CONVERGED
    assert any("not positive definite" in note and "curvature" in note for note in bad.notes)


def test_bad_input_is_refused() -> None:
    K = gaussian(20)
    for ridge in (0.0, -1.0, np.nan):
        with pytest.raises(ExperimentError, match="greater than zero"):
            solve(K, [ridge], targets(20))
    Y = targets(20)
    Y[4, 1] = np.nan
    with pytest.raises(DataError, match="target of training sample 4 is not finite"):
        solve(K, [1e-2], Y)
    for wrong in ({"tolerance": 0.0}, {"max_iterations": 0}, {"jitter": -1.0}):
        with pytest.raises(ExperimentError, match=next(iter(wrong))):
            ConjugateGradient(**wrong)  # type: ignore[arg-type]


def test_jitter_and_absolute_ridges_are_those_of_the_direct_solvers() -> None:
    K, Y = gaussian(60), targets(60)
    (one,) = solve(K, [0.5], Y, ConjugateGradient(jitter=1e-2, absolute=True))
    assert one.shift == pytest.approx(0.5 + 1e-2 * K.diagonal().mean())
    assert one.notes[0].startswith("jitter")
    assert relative(one.alpha, direct(K, one.shift, Y)) < 1e-4


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from distributed import Client

    with Client(processes=False, n_workers=4, threads_per_worker=1, dashboard_address=None) as opened:
        yield opened


def at_site(
    folder: Path, workers: tasks.Workers, solver: ConjugateGradient, **given: Any
) -> tuple[Solution, ...]:
    """A solve of 120 samples at three ridges in ``folder``."""
    K = gaussian(120)
    Y = given.get("Y", targets(120))
    with Site(folder, lambda: workers, 2**30) as site:
        operator = GramOperator(DenseTiles(K, 16), np.arange(120), site)
        progress = {"progress": given["progress"]} if "progress" in given else {}
        return solver.solve(solver.factor(operator, [1e-1, 1e-3, 1e-4]), Y, **progress)


SLOW = ConjugateGradient(rank_bytes=preconditioner_bytes(120, 10, "float32"), checkpoint_seconds=0.0)
"""Many iterations, each of them kept."""


def test_the_same_bits_on_any_number_of_workers(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SQUARE", 48)
    here = at_site(tmp_path / "0", tasks.Workers(), ConjugateGradient())
    for count in (1, 2, 4):
        same(at_site(tmp_path / str(count), tasks.Workers(client, count), ConjugateGradient()), here)


@pytest.mark.slow
def test_processes_of_their_own_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects reproducibility where workers share nothing with the driver, as they do in a cluster in one process."""
    monkeypatch.setattr(products, "SQUARE", 48)
    here = at_site(tmp_path / "0", tasks.Workers(), ConjugateGradient())
    with open_cluster(Profile(workers=2)) as client:
        there = at_site(tmp_path / "2", tasks.Workers(client, 2), ConjugateGradient())
    same(there, here)


def interrupted(folder: Path, at: int, solver: ConjugateGradient = SLOW) -> None:
    def strike(done: int, total: int, message: str) -> None:
        if done >= at:
            raise Stop

    with pytest.raises(Stop):
        at_site(folder, tasks.Workers(), solver, progress=strike)


@pytest.mark.parametrize("at", [1, 4, 9, 16])
def test_goes_on_with_the_same_bits(tmp_path: Path, at: int) -> None:
    """Protects restarts, before and after ridges have ended: the iteration goes on, none is done twice."""
    whole = at_site(tmp_path / "whole", tasks.Workers(), SLOW)
    assert whole[-1].iterations > 16
    interrupted(tmp_path / "cut", at)
    seen: list[int] = []
    again = at_site(
        tmp_path / "cut", tasks.Workers(), SLOW, progress=lambda done, total, message: seen.append(done)
    )
    same(again, whole)
    assert seen[0] == at + 1
    repeated: list[int] = []
    same(
        at_site(tmp_path / "cut", tasks.Workers(), SLOW, progress=lambda done, *_: repeated.append(done)),
        whole,
    )
    assert repeated == [], "a solved path is read, not solved"


def test_a_damaged_checkpoint_is_left_out_with_a_note(tmp_path: Path) -> None:
    """Protects from wrong numbers: a flipped byte, a cut file."""
    whole = at_site(tmp_path / "whole", tasks.Workers(), SLOW)
    for number, spoil in enumerate(
        (
            lambda b: b[: len(b) // 2],
            lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :],
        )
    ):
        folder = tmp_path / str(number)
        interrupted(folder, 9)
        (state,) = folder.glob(f"*/{STATE_FILE}")
        state.write_bytes(spoil(state.read_bytes()))
        (made,) = folder.glob("preconditioner-*.npz")
        made.write_bytes(spoil(made.read_bytes()))
        for one, expected in zip(at_site(folder, tasks.Workers(), SLOW), whole, strict=True):
            assert one.status is Status.SOLVED
            np.testing.assert_allclose(one.alpha, expected.alpha, rtol=1e-3, atol=1e-5)
            assert any("a checkpoint was damaged" in note for note in one.notes)


@pytest.mark.parametrize("lost", ["solution.json", "alpha.npy"])
def test_a_lost_solution_is_measured_again(tmp_path: Path, lost: str) -> None:
    whole = at_site(tmp_path / "a", tasks.Workers(), SLOW)
    for path in (tmp_path / "a").glob(f"*/ridge-*/{lost}"):
        path.write_bytes(b"")
    for one, expected in zip(at_site(tmp_path / "a", tasks.Workers(), SLOW), whole, strict=True):
        np.testing.assert_array_equal(one.alpha, expected.alpha)
        assert one.status is Status.SOLVED
        assert one.iterations == expected.iterations


def test_checkpoints_of_other_inputs_are_not_taken(tmp_path: Path) -> None:
    """Protects from wrong numbers: other targets or another tolerance begin anew in the same folder."""
    folder = tmp_path / "a"
    interrupted(folder, 9)
    other = targets(120) + 1.0
    rarely = replace(SLOW, checkpoint_seconds=60.0)
    same(
        at_site(folder, tasks.Workers(), rarely, Y=other),
        at_site(tmp_path / "b", tasks.Workers(), rarely, Y=other),
    )
    tighter = replace(rarely, tolerance=1e-9)
    assert all(one.residual <= 1e-9 for one in at_site(folder, tasks.Workers(), tighter))


def test_progress_tells_of_residual_and_ridge(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    at_site(tmp_path, tasks.Workers(), SLOW, progress=lambda *given: told.append(given))
    assert told[0][:2] == (1, 1000)
    assert told[0][2].startswith("iterations, relative residual ")
    assert told[0][2].endswith(("ridge 0.1", "ridge 0.001", "ridge 0.0001"))


def test_a_start_with_other_memory_or_prices_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Protects restarts on a busy machine: the preconditioner that was kept is used, whatever would be chosen now."""
    whole = at_site(tmp_path / "whole", tasks.Workers(), SLOW)
    interrupted(tmp_path / "cut", 9)
    other = replace(SLOW, rank_bytes=2**30, pass_columns=50.0, floor=1.0)
    assert repr(other) == repr(SLOW), "an address is made of it"
    seen: list[int] = []
    again = at_site(tmp_path / "cut", tasks.Workers(), other, progress=lambda done, *_: seen.append(done))
    same(again, whole)
    assert seen[0] == 10


def test_an_iteration_is_not_continued_with_another_preconditioner(tmp_path: Path) -> None:
    """Protects conjugacy: where the kept preconditioner is lost and another one made, the iteration begins anew."""
    interrupted(tmp_path / "a", 9)
    (kept,) = (tmp_path / "a").glob("preconditioner-*.npz")
    kept.unlink()
    other = replace(SLOW, rank_bytes=2**30)
    seen: list[int] = []
    found = at_site(tmp_path / "a", tasks.Workers(), other, progress=lambda done, *_: seen.append(done))
    assert seen[0] == 1
    same(found, at_site(tmp_path / "b", tasks.Workers(), other))


def test_more_iterations_go_on_where_too_few_ended(tmp_path: Path) -> None:
    """Protects hours of work: raising solve.max_iterations continues, to the bits of a run that never stopped."""
    whole = at_site(tmp_path / "whole", tasks.Workers(), SLOW)
    few = replace(SLOW, max_iterations=7)
    assert repr(few) == repr(SLOW), "an address is made of it"
    ended = at_site(tmp_path / "few", tasks.Workers(), few)
    assert ended[-1].status is Status.NOT_CONVERGED
    seen: list[int] = []
    found = at_site(tmp_path / "few", tasks.Workers(), SLOW, progress=lambda done, *_: seen.append(done))
    assert seen[0] == 8
    for one, expected in zip(found, whole, strict=True):
        assert one.status is Status.SOLVED
        assert one.iterations == expected.iterations
        np.testing.assert_allclose(one.alpha, expected.alpha, rtol=1e-9, atol=1e-12)
    repeated: list[int] = []
    same(
        at_site(tmp_path / "few", tasks.Workers(), SLOW, progress=lambda done, *_: repeated.append(done)),
        found,
    )
    assert repeated == []


def test_all_targets_together_end_a_ridge() -> None:
    """Protects hours of iterations for the one class whose residual is the last: what is asked for, and reported, is
    the residual of all of them."""
    K = gaussian(300)
    easy, hard = np.linalg.eigh(K)[1][:, -8:], targets(300, 1)
    solver = ConjugateGradient(tolerance=1e-5, rank_bytes=NO_PRECONDITIONER)
    (alone,) = solve(K, [1e-4], hard / np.linalg.norm(hard), solver)
    (together,) = solve(K, [1e-4], np.hstack([easy, hard / np.linalg.norm(hard)]), solver)
    assert together.status is alone.status is Status.SOLVED
    assert together.residual <= 1e-5
    assert together.iterations < alone.iterations
