"""The implicit gradient against a dense float64 solve, and against finite differences of re-solved equilibria."""

import copy
import weakref

import pytest
import torch

from modules.implicit import BackwardSolver, attach_gradient, autograd_vjp
from modules.neuron import make_neuron
from modules.solvers import METHODS
from modules.zoo import alexnet_f
from tests import naive
from tests.networks import KINDS, explicit_masks, small_network


def naive_gradients(network, x, masks):
    """∂loss/∂θ of the sum of squared logits through a dense solve, by parameter name, and the solved v."""
    _, rate = naive.simulate(network, x, masks)
    rate.requires_grad_()
    loss = network.readout(rate.flatten(1)).square().sum()
    readout = torch.autograd.grad(loss, [rate, *network.readout.parameters()])
    weight, _, _ = naive.feedback_weight(network)
    v = naive.solve_dense(network, rate.detach(), x, weight, masks, readout[0])
    mapped = naive.equilibrium_map(network, rate.detach(), x, weight, masks)
    names = [name for name, _ in network.named_parameters() if not name.startswith("readout")]
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(mapped, [parameters[name] for name in names], v)
    return dict(zip(names, gradients)) | {"readout.weight": readout[1], "readout.bias": readout[2]}, v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tol", [1e-3, 1e-9])
def test_equals_a_dense_solve_to_the_tolerance(kind, method, tol):
    network, x = small_network(kind, dropout=0.3, method=method, tol=tol, max_iterations=200)
    if method == "fixed-point":
        with torch.no_grad():
            network.feedback.g.fill_(0.25)  # The plain iteration converges only where the spectral radius is below 1.
    masks = explicit_masks(network)
    expected, v = naive_gradients(copy.deepcopy(network), x, masks)
    solved = []
    solver = network.solver
    network.solver = lambda vjp, gradient: solved.append(solver(vjp, gradient)) or solved[-1]
    network(x).square().sum().backward()
    assert solver.tally.solves == 1 and solver.tally.not_converged == 0 and solver.tally.worst_residual <= tol
    # ‖(I − Jᵀ)⁻¹‖ is a few units at most in these networks.
    assert (solved[0] - v).norm() <= 5 * tol * v.norm() + 1e-12
    assert (v - v.mean()).norm() > 0
    scale = max(gradient.norm() for gradient in expected.values())
    for name, parameter in network.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 10 * tol * scale + 1e-10 * scale, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("jacobian_bn", ["train", "eval"])
def test_products_equal_autograds(kind, jacobian_bn):
    """v ↦ Jᵀ v, link by link, against the graph of f, whose hidden batch norms are switched for jacobian_bn "eval"."""
    network, x = small_network(kind, dropout=0.3)
    network.jacobian_bn = jacobian_bn
    masks = network.draw_masks(x)
    with torch.no_grad():
        current, weight = network.input(network._mean_input(x), masks.input), network.feedback.normalised_weight()
        point = torch.rand(len(current), *network.layer_shapes[-1], dtype=x.dtype)
    jacobian = network.transposed_jacobian(point, current, weight, masks)
    network.hidden.train(jacobian_bn == "train")
    reference = autograd_vjp(lambda a: network.equilibrium_map(a, current, weight, masks), point)
    v = torch.randn_like(point)
    assert reference(v).norm() > 0.01 * v.norm()
    torch.testing.assert_close(jacobian(v), reference(v), atol=1e-12, rtol=1e-12)


def test_frozen_batch_norms_stand_in_the_jacobian_as_in_f():
    network, x = small_network("multi-layer")
    network.hidden.eval()
    with torch.no_grad():
        current, weight = network.input(x), network.feedback.normalised_weight()
        point = torch.rand(len(current), *network.layer_shapes[-1], dtype=x.dtype)
    reference, v = autograd_vjp(lambda a: network.equilibrium_map(a, current, weight), point), torch.randn_like(point)
    torch.testing.assert_close(network.transposed_jacobian(point, current, weight)(v), reference(v), atol=1e-12, rtol=1e-12)


def test_jacobian_bn_is_train_or_eval():
    with pytest.raises(ValueError, match="jacobian_bn"):
        alexnet_f((3, 4, 4, 3, 3), size=8, neuron=make_neuron(1, 1), time_steps=2, jacobian_bn="both")


@pytest.mark.parametrize("kind", KINDS)
def test_no_solve_at_all_would_be_noticed(kind):
    """The dense solve differs from v = g by far more than the tolerances above."""
    network, x = small_network(kind, dropout=0.3)
    masks = explicit_masks(network)
    _, rate = naive.simulate(copy.deepcopy(network), x, masks)
    weight, _, _ = naive.feedback_weight(network)
    gradient = torch.randn_like(rate)
    v = naive.solve_dense(network, rate, x, weight, masks, gradient)
    assert (v - gradient).norm() > 0.02 * gradient.norm()


def test_batch_norm_couples_the_samples_of_a_multi_layer_network():
    network, x = small_network("multi-layer")
    masks = explicit_masks(network)
    _, rate = naive.simulate(copy.deepcopy(network), x, masks)
    weight, _, _ = naive.feedback_weight(network)
    gradient = torch.zeros_like(rate)
    gradient[0] = torch.randn_like(rate[0])
    v = naive.solve_dense(network, rate, x, weight, masks, gradient)
    assert v[1:].norm() > 1e-3 * v[0].norm()


@pytest.mark.parametrize("method", METHODS)
def test_toy_equilibrium_against_finite_differences(method):
    """a = tanh(W a + U x): the gradient of a loss in W and U equals differences of equilibria solved anew."""
    W, U = (0.3 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x, target = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)

    def equilibrium():
        a = torch.zeros(2, 4, dtype=torch.float64)
        for _ in range(500):
            a = torch.tanh(a @ W.t() + x @ U.t())
        return a.detach()

    def loss_of(a):
        return (a - target).square().sum()

    a = equilibrium()
    vjp = autograd_vjp(lambda z: torch.tanh(z @ W.detach().t() + x @ U.detach().t()), a)
    mapped = torch.tanh(a @ W.t() + x @ U.t())
    loss_of(attach_gradient(a, mapped, vjp, BackwardSolver(method, tol=1e-12, max_iterations=500))).backward()
    for parameter in (W, U):
        for index in range(parameter.numel()):
            with torch.no_grad():
                entry = parameter.view(-1)[index]
                value, h = entry.item(), 1e-5
                entry.fill_(value + h)
                above = loss_of(equilibrium())
                entry.fill_(value - h)
                below = loss_of(equilibrium())
                entry.fill_(value)
            assert abs((above - below) / (2 * h) - parameter.grad.view(-1)[index]) < 1e-7


def test_non_convergence_is_counted():
    network, x = small_network("dense", tol=1e-12, max_iterations=2)
    network(x).square().sum().backward()
    tally = network.solver.reset_tally()
    assert (tally.solves, tally.not_converged, tally.iterations) == (1, 1, 2) and tally.worst_residual > 1e-12
    assert network.solver.tally.solves == 0


@pytest.mark.parametrize("settings", [dict(method="newton"), dict(tol=0.0), dict(max_iterations=0)])
def test_impossible_solver_settings_are_refused(settings):
    with pytest.raises(ValueError):
        BackwardSolver(**settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # With the C kernels and without.
@pytest.mark.parametrize("retained", [True, False])
def test_the_jacobian_is_freed_after_the_solve_unless_the_graph_is_retained(dtype, retained):
    network, x = small_network("multi-layer")
    network, solver, links = network.to(dtype), network.solver, []

    def recording(vjp, gradient):
        links.extend(weakref.ref(link.norm.y if link.gain is None else link.gain) for link in vjp.links)
        return solver(vjp, gradient)

    network.solver = recording
    loss = network(x.to(dtype)).square().sum()
    loss.backward(retain_graph=retained)
    assert [link() is not None for link in links] == [retained] * len(network.layer_shapes) and loss.grad_fn is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_the_gradient_is_refused(kind, dtype):
    """The solve has none: autograd would take v for a constant."""
    network, x = small_network(kind)
    network, x = network.to(dtype), x.to(dtype)
    gradient, *_ = torch.autograd.grad(network(x).square().sum(), [network.input.linear.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
