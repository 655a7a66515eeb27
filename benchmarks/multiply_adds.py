"""How many multiply-adds the method's linear maps take, done densely: what the floor of every benchmark is made of."""

from typing import List, NamedTuple

from modules.network import FeedbackSNN
from utils.instruments.operations import dense_macs


class MapCosts(NamedTuple):
    """Multiply-adds of one product per sample: the input connection, each hidden one, the feedback and the readout."""

    input: int
    hidden: List[int]
    feedback: int
    readout: int


def map_costs(network: FeedbackSNN) -> MapCosts:
    hidden = [dense_macs(connection.map, connection.linear.weight, shape)
              for connection, shape in zip(network.hidden, network.layer_shapes)]
    return MapCosts(dense_macs(network.input.map, network.input.linear.weight, network.input_shape), hidden,
                    dense_macs(network.feedback.map, network.feedback.w, network.layer_shapes[-1]), network.readout.weight.numel())


def evaluation(network: FeedbackSNN) -> float:
    """Per sample: the input current (once for a static input), the feedback from the second step on, the hidden connections."""
    costs, steps = map_costs(network), network.time_steps
    inputs = costs.input * (steps if network.events else 1)
    return inputs + (steps - 1) * costs.feedback + steps * sum(costs.hidden) + costs.readout


def training_step(network: FeedbackSNN, products: float) -> float:
    """Per sample: the simulation; f once, and once more at f(a) with hidden layers; `products` with Jᵀ; the back-propagation of v."""
    costs = map_costs(network)
    lap = costs.feedback + sum(costs.hidden)
    evaluations = 2 if network.hidden else 1
    # Weights' gradients of every map, and what passes a hidden connection backwards.
    backward = costs.input + lap + sum(costs.hidden) + 2 * costs.readout
    return evaluation(network) + evaluations * lap + products * lap + backward
