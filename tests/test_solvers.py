"""The solvers against NumPy's dense solve and SciPy's Broyden and GMRES, on linear maps x ↦ b + A x in float64."""

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg
import torch

from modules.across_processes import InnerProducts
from modules.graphed_solve import refined
from modules.implicit import SolveTally
from modules.solvers import METHODS, Anderson, Iteration, Solution, solve


def linear_problem(n=30, radius=0.7):
    """b and A of spectral radius `radius`."""
    A = np.random.default_rng(1).normal(size=(n, n))
    A *= radius / np.abs(np.linalg.eigvals(A)).max()
    return torch.randn(n, dtype=torch.float64), torch.from_numpy(A)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tol", [1e-3, 1e-8])
def test_solution_and_reported_residual(method, tol):
    b, A = linear_problem()
    evaluations = []
    solution = solve(lambda x: evaluations.append(1) or b + A @ x, b, method, tol, max_iterations=200)
    true_residual = (b + A @ solution.value - solution.value).norm() / b.norm()
    assert solution.converged and solution.residual <= tol
    assert abs(true_residual - solution.residual) < 1e-12
    assert solution.iterations == len(evaluations)
    exact = torch.linalg.solve(torch.eye(len(b), dtype=b.dtype) - A, b)
    condition = torch.linalg.matrix_norm(torch.linalg.inv(torch.eye(len(b), dtype=b.dtype) - A), 2)
    assert (solution.value - exact).norm() <= condition * tol * b.norm()


def test_beyond_a_spectral_radius_of_one_only_acceleration_converges():
    """The spectrum is as measured in networks that diverge: a few negative eigenvalues outside the unit circle, the rest inside."""
    b, basis = linear_problem()
    eigenvalues = torch.linspace(-0.4, 0.4, len(b), dtype=b.dtype)
    eigenvalues[:2] = torch.tensor([-1.56, -1.2])
    A = torch.linalg.solve(basis, basis * eigenvalues, left=False)
    for method, converges in (("anderson", True), ("broyden", True), ("fixed-point", False)):
        solution = solve(lambda x: b + A @ x, b, method, 1e-6, max_iterations=100)
        assert solution.converged == converges, method
    assert solution.residual > 1e-6, "what did not converge says so"
    assert (b + A @ solution.value - solution.value).norm() / b.norm() == pytest.approx(solution.residual), "the best x is returned"


def test_fixed_point_solves_the_undamped_equation():
    """The published damped iteration converged to (2I − A)⁻¹ b."""
    b, A = linear_problem()
    value = solve(lambda x: b + A @ x, b, "fixed-point", 1e-10, 300).value
    eye = torch.eye(len(b), dtype=b.dtype)
    torch.testing.assert_close(value, torch.linalg.solve(eye - A, b), atol=1e-7, rtol=1e-7)
    assert (value - torch.linalg.solve(2 * eye - A, b)).norm() > 0.1 * b.norm()


def test_broyden_makes_scipys_iterates():
    b, A = linear_problem(n=8)
    start = torch.zeros(8, dtype=torch.float64) + 0.1
    ours, theirs = [], []
    solve(lambda x: ours.append(x.numpy().copy()) or b + A @ x, start, "broyden", 1e-9, 12)

    def residual(x):
        return b.numpy() + A.numpy() @ x - x

    with pytest.raises(scipy.optimize.NoConvergence):
        scipy.optimize.broyden1(residual, start.numpy(), alpha=1.0, line_search=None, maxiter=8, f_tol=1e-14,
                                callback=lambda x, f: theirs.append(x.copy()))
    for mine, other in zip(ours[1:], theirs):
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-8)
    assert len(theirs) >= 7


def test_broyden_and_scipy_agree_on_a_nonlinear_system():
    W = 0.4 * torch.randn(6, 6, dtype=torch.float64)
    b = torch.randn(6, dtype=torch.float64)
    ours = solve(lambda x: torch.tanh(W @ x + b), b, "broyden", 1e-10, 60)
    theirs = scipy.optimize.broyden1(lambda x: np.tanh(W.numpy() @ x + b.numpy()) - x, b.numpy(), f_tol=1e-11)
    assert ours.converged
    np.testing.assert_allclose(ours.value.numpy(), theirs, atol=1e-8)


def test_anderson_with_all_its_memory_needs_no_more_products_than_gmres(monkeypatch):
    """Walker & Ni 2011: the same Krylov spaces; Anderson's value is one step behind, its residual one product ahead."""
    monkeypatch.setattr(Anderson, "memory", 40)
    b, A = linear_problem(radius=1.3)
    solution = solve(lambda x: b + A @ x, b, "anderson", 1e-6, 60)
    steps = []
    scipy.sparse.linalg.gmres(np.eye(len(b)) - A.numpy(), b.numpy(), x0=b.numpy(), rtol=1e-6, restart=60, maxiter=1,
                              callback=steps.append, callback_type="pr_norm")
    assert solution.converged and solution.iterations <= len(steps) + 2


@pytest.mark.parametrize("method", METHODS)
def test_proposing_before_the_residual_is_read_changes_nothing(method):
    b, A = linear_problem()
    for tol, iterations in ((1e-6, 60), (1e-12, 4)):
        usual, early = (solve(lambda x: b + A @ x, b, method, tol, iterations, ahead=ahead) for ahead in (False, True))
        assert torch.equal(usual.value, early.value) and usual[1:] == early[1:]


class RoundedAtFirst(Iteration):
    """x ↦ b + A x, with A rounded to tf32's eleven bits while `rough` is set."""

    rough = False

    def __init__(self, b, A):
        self.b, self.exact, self.rounded, self.products_by = b, A, A.half().double(), {True: 0, False: 0}
        assert 0 < (self.rounded - A).norm() < 2.0**-11 * A.norm()
        super().__init__(self.product, b, "anderson", InnerProducts())

    def product(self, x):
        self.products_by[self.rough] += 1
        return self.b + (self.rounded if self.rough else self.exact) @ x

    def go_on_from(self, x):
        self.x, self.proposer.count = x, 0


@pytest.mark.parametrize("tol, exact_products", [(1e-2, 1), (1e-3, 1), (1e-8, None)])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_solve_that_begins_with_rounded_products_has_the_residual_of_exact_ones(tol, exact_products, ahead):
    b, A = linear_problem()
    iteration = RoundedAtFirst(b, A)
    solution = refined(iteration, b, tol, 200, ahead)
    assert solution.converged and solution.residual <= tol
    assert (b + A @ solution.value - solution.value).norm() / b.norm() == pytest.approx(solution.residual, rel=1e-9)
    rough, exact = iteration.products_by[True], iteration.products_by[False]
    assert rough > 3 and solution.iterations == rough + exact
    assert exact == exact_products if exact_products else 3 < exact < 2 * solve(lambda x: b + A @ x, b, "anderson", tol, 200).iterations


def test_a_solve_that_begins_with_rounded_products_keeps_to_its_bound():
    b, A = linear_problem()
    for bound in (1, 2, 5):
        solution = refined(RoundedAtFirst(b, A), b, 1e-8, bound, ahead=True)
        assert not solution.converged and solution.iterations == bound
        assert (b + A @ solution.value - solution.value).norm() / b.norm() == pytest.approx(solution.residual, rel=1e-9)



@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_iterations_do_not_depend_on_the_scale_of_the_loss(method, scale):
    b, A = linear_problem()
    usual, scaled = (solve(lambda x: c * b + A @ x, c * b, method, 1e-6, 100) for c in (1.0, scale))
    assert scaled.converged and abs(scaled.iterations - usual.iterations) <= 1


@pytest.mark.parametrize("method", METHODS)
def test_zero_gradient_and_non_finite_values(method):
    zero = solve(lambda x: 0.5 * x, torch.zeros(3), method)
    assert zero.converged and zero.value.eq(0).all() and zero.residual == 0
    broken = solve(lambda x: x * float("nan"), torch.ones(3), method)
    assert not broken.converged and broken.value.isfinite().all() and broken.iterations == 1


def test_anderson_keeps_no_more_than_its_memory():
    b, A = linear_problem()
    proposer, x = Anderson(), b
    for _ in range(12):
        mapped = b + A @ x
        x = proposer.propose(x, mapped, mapped - x)
    assert len(proposer.mapped) == len(proposer.residuals) == Anderson.memory


def test_a_tally_keeps_the_worst_residual():
    tally = SolveTally()
    for residual in (0.1, 0.5, 0.2):
        tally.add(Solution(torch.zeros(1), residual, 3, residual < 0.3))
    assert tally == SolveTally(solves=3, iterations=9, not_converged=1, worst_residual=0.5)


def test_the_same_residual_twice_gives_finite_weights():
    torch.testing.assert_close(Anderson()._weights(torch.ones(2, 2, dtype=torch.float64)), torch.full((2,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_values_may_lie_in_another_order_than_x(method):
    start, weight = torch.randn(3, 4, 5, 6, dtype=torch.float64), 0.05 * torch.randn(4, 4, 3, 3, dtype=torch.float64)

    def solved(in_order):
        def map(x):
            return (start + torch.nn.functional.conv2d(x, weight, padding=1)).contiguous(memory_format=in_order)
        return solve(map, start, method, 1e-8, 200)
    usual, other = solved(torch.contiguous_format), solved(torch.channels_last)
    assert usual.converged and other.iterations == usual.iterations
    torch.testing.assert_close(other.value, usual.value)


@pytest.mark.parametrize("method", METHODS)
def test_in_inference_mode(method):
    b, A = linear_problem()
    usual = solve(lambda x: b + A @ x, b, method, 1e-6, 60)
    with torch.inference_mode():
        other = solve(lambda x: b + A @ x, b.clone(), method, 1e-6, 60)
    assert torch.equal(other.value, usual.value) and other[1:] == usual[1:]
