"""Spectral normalisation, the adjoint of the feedback, and the initial weights."""

import pytest
import torch
from torch import nn

from modules.connection import Connection
from modules.dropout import dropout_mask
from modules.feedback import Feedback
from modules.neuron import make_neuron
from modules.zoo import f64c5_mnist

FEEDBACKS = {
    "dense": (lambda: nn.Linear(6, 6, bias=False), (6,), (6,)),
    "convolutional": (lambda: nn.Conv2d(3, 3, 5, padding=2, bias=False), (3, 7, 7), (3, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3, 2, 1, 1, bias=False), (4, 4, 4), (3, 8, 8)),
}


@pytest.mark.parametrize("kind", FEEDBACKS)
def test_sigma_converges_to_the_largest_singular_value(kind):
    feedback = Feedback(FEEDBACKS[kind][0]()).double()
    assert feedback.g.item() == pytest.approx(torch.linalg.svdvals(feedback.w.flatten(1))[0].item(), rel=0.1)
    with torch.no_grad():
        feedback.g.fill_(0.8)
    for _ in range(3000):
        weight = feedback.normalised_weight()
    assert torch.linalg.svdvals(weight.flatten(1))[0].item() == pytest.approx(0.8, rel=1e-6)
    with torch.no_grad():
        feedback.g.fill_(-7.0)
    torch.testing.assert_close(feedback.normalised_weight(), -weight / 0.8)


@pytest.mark.parametrize("kind", FEEDBACKS)
@pytest.mark.parametrize("g", [0.6, 3.0])
def test_gradient_flows_through_sigma_with_u_and_v_constant(kind, g):
    feedback = Feedback(FEEDBACKS[kind][0]()).double()
    with torch.no_grad():
        feedback.g.fill_(g)
    weight = feedback.normalised_weight()
    probe = torch.randn_like(weight)
    (weight * probe).sum().backward()
    w, gain = feedback.w.detach().requires_grad_(), feedback.g.detach().requires_grad_()
    sigma = feedback.u @ w.flatten(1) @ feedback.v
    naive = gain.clamp(-1, 1) * w / sigma
    (naive * probe).sum().backward()
    torch.testing.assert_close(weight, naive)
    torch.testing.assert_close(feedback.w.grad, w.grad)
    torch.testing.assert_close(feedback.g.grad, gain.grad)
    assert g < 1 or feedback.g.grad == 0


@pytest.mark.parametrize("kind", FEEDBACKS)
def test_adjoint(kind):
    build, last, first = FEEDBACKS[kind]
    feedback = Feedback(build()).double()
    weight = feedback.normalised_weight().detach()
    s, v = torch.randn(2, *last, dtype=torch.float64), torch.randn(2, *first, dtype=torch.float64)
    assert feedback.map.output_shape(last, weight) == first
    assert (feedback.map(s, weight) * v).sum().item() == pytest.approx((s * feedback.map.adjoint(v, weight, last)).sum().item(), rel=1e-10)


def test_initial_filters_have_unit_norm_per_output_channel():
    convolution = Connection(nn.Conv2d(3, 5, 3))
    torch.testing.assert_close(convolution.linear.weight.flatten(1).norm(dim=1), torch.ones(5))
    assert convolution.linear.bias.eq(0).all()
    transposed = Feedback(FEEDBACKS["transposed"][0]())
    torch.testing.assert_close(transposed.w.transpose(0, 1).flatten(1).norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_mask_is_bernoulli_over_its_keep_probability(p):
    mask = dropout_mask((500, 1001), p, torch.empty(0), torch.tensor(1))
    assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-4)
    assert mask.mean().item() == pytest.approx(1, abs=4 * (p / (1 - p) / mask.numel()) ** 0.5)
    neighbours = torch.corrcoef(torch.stack([mask.flatten()[:-1], mask.flatten()[1:]]))[0, 1]
    assert abs(neighbours) < 0.01, "units are dropped independently"


def test_a_bias_in_the_feedback_is_refused():
    with pytest.raises(ValueError, match="bias"):
        Feedback(nn.Linear(3, 3))


def dense_operator(feedback, weight, shape):
    """The matrix of the map s ↦ B s on inputs of this shape."""
    units = torch.eye(torch.Size(shape).numel(), dtype=weight.dtype).view(-1, *shape)
    return feedback.map(units, weight).flatten(1).t()


@pytest.mark.parametrize("kind", FEEDBACKS)
def test_operator_norm_is_that_of_a_dense_svd(kind):
    build, last, first = FEEDBACKS[kind]
    feedback = Feedback(build()).double()
    feedback.bound_operator(last)
    assert feedback.u.shape == first and feedback.v.shape == last
    exact = torch.linalg.svdvals(dense_operator(feedback, feedback.w.detach(), last))[0].item()
    assert feedback.g.item() == pytest.approx(exact, rel=0.02)
    with torch.no_grad():
        feedback.g.fill_(0.8)
    for _ in range(1000):
        weight = feedback.normalised_weight()
    operator = dense_operator(feedback, weight.detach(), last)
    assert torch.linalg.svdvals(operator)[0].item() == pytest.approx(0.8, rel=1e-4)
    matrix = torch.linalg.svdvals(weight.detach().flatten(1))[0].item()
    assert matrix == pytest.approx(0.8, rel=1e-5) if kind == "dense" else matrix < 0.75, "the two norms are different things"


@pytest.mark.parametrize("kind", FEEDBACKS)
def test_gradient_flows_through_the_operators_sigma(kind):
    """With u and v constant, against finite differences of g w / ⟨u, w ∗ v⟩."""
    build, last, _ = FEEDBACKS[kind]
    feedback = Feedback(build()).double()
    feedback.bound_operator(last)
    with torch.no_grad():
        feedback.g.fill_(0.6)
    weight = feedback.normalised_weight()
    probe = torch.randn_like(weight)
    (weight * probe).sum().backward()

    def naive(w):
        return (0.6 * w / (feedback.u * feedback.map(feedback.v[None], w)[0]).sum() * probe).sum().item()

    w, step = feedback.w.detach(), 1e-6
    for index in range(0, w.numel(), 7):
        change = torch.zeros_like(w)
        change.view(-1)[index] = step
        assert feedback.w.grad.view(-1)[index].item() == pytest.approx((naive(w + change) - naive(w - change)) / (2 * step), abs=1e-7)


def test_operator_norm_in_a_network_leaves_the_matrix_norms_checkpoints_as_they_are():
    settings = dict(size=8, neuron=make_neuron(2.0, 1.0), time_steps=2)
    published, bounded = f64c5_mnist(3, **settings).eval(), f64c5_mnist(3, **settings, feedback_norm="operator").eval()
    assert published.state_dict().keys() == bounded.state_dict().keys()
    assert published.feedback.u.shape == (3,) and bounded.feedback.u.shape == (3, 4, 4)
    assert torch.equal(bounded.feedback.normalised_weight(), bounded.feedback.normalised_weight()), "evaluation stores nothing"
    again = f64c5_mnist(3, **settings, feedback_norm="operator").eval()
    again.load_state_dict(bounded.state_dict())
    assert torch.equal(again.feedback.normalised_weight(), bounded.feedback.normalised_weight())
    with pytest.raises(ValueError, match="feedback_norm"):
        f64c5_mnist(3, **settings, feedback_norm="none")


@pytest.mark.parametrize("kind", FEEDBACKS)
@pytest.mark.parametrize("operator", [True, False])
def test_a_gain_above_one_is_one(kind, operator):
    build, last, _ = FEEDBACKS[kind]
    feedback, weights = Feedback(build()).eval(), []
    if operator:
        feedback.bound_operator(last)
    for g in (1.0, 1.5, -1.0, -7.0):
        with torch.no_grad():
            feedback.g.fill_(g)
        weights.append(feedback.normalised_weight())
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[3]) and weights[0].abs().max() > 0
