"""How many multiply-adds the method's linear maps take, done densely: what the floor of every benchmark is made of."""

from typing import List, NamedTuple

from modules.network import FeedbackSNN


class MapCosts(NamedTuple):
    """Multiply-adds of one product per sample: the input connection, each hidden one, the feedback and the readout."""

    input: int
    hidden: List[int]
    feedback: int
    readout: int


def map_costs(network: FeedbackSNN) -> MapCosts:
    shapes = network.layer_shapes

    def positions(shape) -> int:
        return shape[1] * shape[2] if len(shape) == 3 else 1

    # A filter is applied at each output position; a transposed one at each input position.
    feedback_at = shapes[-1] if network.feedback.map.kind == "transposed" else shapes[0]
    hidden = [connection.linear.weight.numel() * positions(shape) for connection, shape in zip(network.hidden, shapes[1:])]
    return MapCosts(network.input.linear.weight.numel() * positions(shapes[0]), hidden,
                    network.feedback.w.numel() * positions(feedback_at), network.readout.weight.numel())


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
