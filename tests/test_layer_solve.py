"""The C kernel that solves a single layer's samples one by one, against the equation itself and the solve by PyTorch."""

import pytest
import torch
from torch import nn

from modules import native
from modules.implicit import BackwardSolver
from modules.jacobian import Link, TransposedJacobian
from modules.linear_map import LinearMap
from modules.solvers import METHODS, Anderson, FixedPoint
from tests.marks import needs_compiler

pytestmark = needs_compiler

FEEDBACKS = [(nn.Linear(9, 9, bias=False), (9,), 4), (nn.Linear(45, 45, bias=False), (45,), 33),
             (nn.Linear(400, 400, bias=False), (400,), 40), (nn.Conv2d(24, 24, 3, padding=1, bias=False), (24, 1, 1), 40),
             (nn.Conv2d(24, 24, 1, bias=False), (24, 1, 1), 40), (nn.Conv2d(3, 3, 5, padding=2, bias=False), (3, 7, 6), 5),
             (nn.Conv2d(40, 40, 3, padding=1, bias=False), (40, 6, 6), 3)]


def product_of(map, weight, gain):
    return TransposedJacobian([Link(map, weight, gain.shape[1:], gain)])


@pytest.mark.parametrize("feedback,shape,batch", FEEDBACKS)
@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-5, 1e-6])
@pytest.mark.parametrize("threads", [1, 2])
def test_layer_solve_reaches_the_tolerance_and_says_so(feedback, shape, batch, tol, threads):
    torch.set_num_threads(threads)
    weight = torch.randn_like(feedback.weight)
    weight *= 1.5 / torch.linalg.svdvals(weight.flatten(1))[0]
    gain = 0.5 * (torch.arange(batch * weight.new_empty(shape).numel()) % 3 == 0).float().view(batch, *shape)
    gradient = torch.randn(batch, *shape) * torch.logspace(-6, 0, batch).view(-1, *[1] * len(shape))
    solver, product = BackwardSolver(tol=tol, max_iterations=100), product_of(LinearMap.of(feedback), weight, gain)
    assert product.solve(gradient, tol, 100) is not None
    v = solver(product, gradient)
    exact = product_of(LinearMap.of(feedback), weight.double(), gain.double())
    residual = (gradient.double() + exact(v.double()) - v.double()).norm() / gradient.double().norm()
    assert residual <= tol * 1.01 and abs(residual - solver.tally.worst_residual) < 1e-6
    assert solver.tally.not_converged == 0
    plain = BackwardSolver(tol=1e-9, max_iterations=300)(exact, gradient.double())
    assert (v - plain).norm() <= 20 * tol * gradient.norm()


@pytest.mark.parametrize("change", ["memory", "method"])
def test_another_method_in_the_place_of_andersons_is_not_the_kernels(change, monkeypatch):
    gradient, gain = torch.randn(4, 30), 0.5 * (torch.rand(4, 30) < 0.4).float()
    product = product_of(LinearMap("dense"), torch.randn(30, 30) / 8, gain)
    by_kernel = BackwardSolver()(product, gradient)
    if change == "memory":
        monkeypatch.setattr(Anderson, "memory", 1)
    else:
        monkeypatch.setitem(METHODS, "anderson", FixedPoint)
    monkeypatch.setattr(native, "solve_layer", lambda *arguments: pytest.fail("the kernel was called"))
    v = BackwardSolver()(product, gradient)
    assert not torch.equal(v, by_kernel) and (v - by_kernel).norm() <= 1e-2 * by_kernel.norm()


def test_the_products_of_a_layer_solve_are_counted_sample_by_sample():
    """One of two samples has no gain, and is solved by its first product."""
    weight, gradient, gain = torch.randn(30, 30) / 8, torch.randn(2, 30), 0.5 * (torch.arange(60) % 2).view(2, 30)
    gain[1] = gradient[1] = 0
    both, alone = (product_of(LinearMap("dense"), weight, gain[:count]).solve(gradient[:count], 1e-5, 100) for count in (2, 1))
    assert alone.iterations > 3 and both.iterations == (alone.iterations + 1) / 2


def test_layer_solve_that_does_not_converge_is_counted():
    weight, gradient = 6 * torch.randn(30, 30), torch.randn(4, 30)
    gain = torch.zeros(4, 30)
    gain[:, :10] = 1
    product, solver = product_of(LinearMap("dense"), weight, gain), BackwardSolver(tol=1e-6, max_iterations=3)
    v = solver(product, gradient)
    residual = (gradient + product(v) - v).norm() / gradient.norm()
    assert solver.tally.not_converged == 1 and solver.tally.iterations == 3
    assert solver.tally.worst_residual == pytest.approx(residual.item(), rel=1e-4)
    broken = BackwardSolver()
    assert broken(product_of(LinearMap("dense"), weight * float("nan"), gain), gradient).isfinite().all()
    assert broken.tally.not_converged == 1
    zero = BackwardSolver()
    assert zero(product, torch.zeros(4, 30)).eq(0).all() and zero.tally.not_converged == 0
