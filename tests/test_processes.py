"""Jobs of several processes compute what one process does."""

import gc
import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F

import fmnist_mlp
from modules.dropout import draw_seeds, dropout_mask
from modules.implicit import BackwardSolver
from modules.neuron import make_neuron
from modules.synchronised_norm import synchronise_batch_norms
from modules.zoo import alexnet_f, f64c5_mnist, f64c5_nmnist, f400
from tests.ports import free_port
from tests.small_data import write_small_data
from utils.checkpoint import LATEST, PREVIOUS, load_checkpoint
from utils.data.batches import Batches, Samples
from utils.errors import UserError
from utils.experiment import main
from utils.processes import average_gradients, check_batches, draw_independently, joined, share_network
from utils.optimizer import make_optimizer
from utils.training import evaluate, train_one_epoch

ARGS = Namespace(optimizer="SGD", lr=0.05, momentum=0.9, weight_decay=5e-4)
TIME_STEPS = 6
# Batches of 6, 6 and 5: shares of 3 and 3, the last of 2 and 3.
COUNT, SIZE = 17, 6


def small(kind, dtype=torch.float64, jacobian_bn="train", method="anderson"):
    """A lively network with 4 classes and samples for it, the same at every call."""
    torch.manual_seed(7)
    settings = dict(classes=4, neuron=make_neuron(0.8, 0.9), time_steps=TIME_STEPS, jacobian_bn=jacobian_bn,
                    solver=BackwardSolver(method, tol=1e-12 if dtype == torch.float64 else 1e-6, max_iterations=300))
    network, shape = {
        "F400": lambda: (f400(12, inputs=9, **settings), (9,)),
        "F64C5": lambda: (f64c5_mnist(4, size=8, **settings), (1, 8, 8)),
        "F64C5 on events": lambda: (f64c5_nmnist(4, size=8, **settings), (2, 8, 8)),
        "AlexNet-F": lambda: (alexnet_f((4, 5, 6, 6, 4), size=16, **settings), (3, 16, 16)),
    }[kind]()
    with torch.no_grad():
        for connection in (network.input, *network.hidden):
            connection.norm.weight.uniform_(0.4, 0.8)
            connection.norm.bias.uniform_(0.1, 0.6)
        network.feedback.g.fill_(0.6)
    inputs = torch.randn(COUNT, *shape)
    prepare = (lambda x: (x[None] > torch.linspace(0, 1, TIME_STEPS).view(-1, 1, *[1] * len(shape))).to(dtype)) \
        if network.events else (lambda x: x)
    return network.to(dtype), Samples(inputs.to(dtype), torch.arange(COUNT) % 4, prepare)


def trained(network, samples):
    """What an epoch of training leaves: its averages, every iteration's gradients, the tensors; and the test's averages."""
    batches, optimizer = Batches(samples, SIZE, shuffled=True), make_optimizer(network, ARGS)
    gradients = []
    training = train_one_epoch(network, batches, optimizer, lambda iteration: 0.05,
                               after_iteration=lambda: gradients.append(gradients_of(network)))
    testing = evaluate(network, Batches(samples, 4, shuffled=False))  # the last batch has one sample
    return {"averages": [training, testing], "gradients": gradients, "tensors": network.state_dict(), "tally": network.solver.tally}


def gradients_of(network):
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


CASES = {
    "F400": dict(kind="F400"), "F64C5": dict(kind="F64C5"), "F64C5 on events": dict(kind="F64C5 on events"),
    "AlexNet-F": dict(kind="AlexNet-F"), "AlexNet-F by Broyden": dict(kind="AlexNet-F", method="broyden"),
    "AlexNet-F, J in evaluation": dict(kind="AlexNet-F", jacobian_bn="eval"),
    **{f"{kind} in float32": dict(kind=kind, dtype=torch.float32) for kind in ("F400", "F64C5", "AlexNet-F")},
}
APART = ("F400", "AlexNet-F")


def in_process(rank, ports, folder):
    """What each of two processes of a job does; what it found goes to a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[0]))
    torch.set_num_threads(1)
    found = {}
    with joined(torch.device("cpu"), ""):
        for name, case in CASES.items():
            network, samples = small(**case)
            synchronise_batch_norms(network)
            torch.manual_seed(rank)  # The order is the first process's all the same.
            found[name] = trained(network, samples)
        for kind in APART:
            network, samples = small(kind)
            x, labels = next(iter(Batches(samples, SIZE, shuffled=False)))
            F.cross_entropy(network(x), labels).backward()
            average_gradients(network)
            found[kind, "apart"] = gradients_of(network)
        found["buffers"] = buffers_at_each_pass()
        found["seen"] = seen_samples(rank)
        torch.manual_seed(3)
        draw_independently(3)
        found["mask"] = dropout_mask((1, 50), 0.5, torch.zeros(0), *draw_seeds(1))
        found["shared"] = shared_network(rank)
        found["threads within"] = gloo_threads()
        cycle = [dist.group.WORLD]  # Nothing but the garbage collector ends it.
        cycle.append(cycle)
        gc.freeze()
        del cycle
    flags = ["--path", str(folder), "--train-batch", "20", "--epochs", "2", "--checkpoint-every", "2", "--device", "cpu"]
    os.environ["MASTER_PORT"] = str(ports[1])
    main(fmnist_mlp.RECIPE, [*flags, "--manualSeed", "1", "-c", str(folder / "whole")])
    os.environ["MASTER_PORT"] = str(ports[2])
    main(fmnist_mlp.RECIPE, [*flags, "--resume", str(folder / "whole" / PREVIOUS), "-c", str(folder / "resumed")])
    os.environ["MASTER_PORT"] = str(ports[3])
    with pytest.raises(UserError), joined(torch.device("cpu"), ""):
        check_batches(Namespace(train_batch=3, sync_bn=False))
    found["threads after"] = gloo_threads(awaited=0)
    found["folder"] = folder
    torch.save(found, folder / f"{rank}.pt")


def seen_samples(seed):
    """The numbers of the samples that this process gets, batch by batch: in an epoch of training, then in the test."""
    network, seen = f400(3, inputs=1, classes=2, neuron=make_neuron(0.8, 0.9), time_steps=2), []
    numbers = torch.arange(COUNT).float()[:, None]
    samples = Samples(numbers, torch.zeros(COUNT, dtype=torch.int64), lambda x: (seen.append(x[:, 0].int().tolist()), x)[1])
    torch.manual_seed(seed)
    train_one_epoch(network, Batches(samples, SIZE, shuffled=True), make_optimizer(network, ARGS), lambda iteration: 0.0)
    evaluate(network, Batches(samples, 4, shuffled=False))
    return seen


def buffers_at_each_pass():
    """All buffers' values in a row, as each of an epoch's three passes starts and as the test does, with separate batch norms."""
    (network, samples), seen = small("AlexNet-F"), []
    network.register_forward_pre_hook(lambda *_: seen.append(torch.cat([tensor.flatten() for tensor in network.buffers()])))
    trained(network, samples)
    return seen[:4]


def shared_network(rank):
    """The tensors of a network that was another in each process, and the gradients where one parameter alone had one, 1 or 2."""
    torch.manual_seed(rank)
    network = f400(5, inputs=2, classes=2, neuron=make_neuron(0.8, 0.9), time_steps=2)
    share_network(network)
    network.feedback.g.grad = torch.full((), rank + 1.0)
    average_gradients(network)
    return {"tensors": network.state_dict(), "gradients": [parameter.grad for parameter in network.parameters()]}


def gloo_threads(awaited=None):
    """How many threads of gloo process groups this process has; a number that is `awaited` has a few seconds to come true."""
    deadline = time.monotonic() + 5
    while True:
        names = [name_of(thread) for thread in Path("/proc/self/task").iterdir()] if sys.platform == "linux" else []
        count = names.count("pt_gloo_runloop")
        if awaited in (None, count) or time.monotonic() > deadline:
            return count
        time.sleep(0.01)


def name_of(thread):
    try:
        return (thread / "comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):  # It has ended meanwhile.
        return ""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of the two processes found."""
    folder = write_small_data(tmp_path_factory.mktemp("two"))
    torch.multiprocessing.spawn(in_process, ([free_port() for _ in range(4)], folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def scale(key, size, dtype):
    """The size that the error of a parameter's gradient is measured against."""
    if key.endswith("linear.bias"):  # Before a batch norm a bias has no gradient but rounding errors.
        return max(size.values())
    if key == "feedback.g" and dtype == torch.float32:  # A sum over the weight, of terms that may cancel but for a thousandth.
        return size["feedback.w"]
    return size[key]


@pytest.mark.parametrize("name", CASES)
def test_with_synchronised_batch_norms_two_processes_compute_what_one_does(two, name):
    network, samples = small(**CASES[name])
    torch.manual_seed(0)
    one = trained(network, samples)
    assert one["tally"].not_converged == 0 and one["tally"].mean_iterations > 5 and len(one["gradients"]) == 3
    for process in two:
        found = process[name]
        for averages, expected in zip(found["averages"], one["averages"]):
            assert averages.loss == pytest.approx(expected.loss, rel=1e-5) and averages[1:] == pytest.approx(expected[1:], rel=1e-12)
        for gradients, expected in zip(found["gradients"], one["gradients"]):
            size = {key: gradient.norm() for key, gradient in expected.items()}
            for key, gradient in expected.items():
                assert (gradients[key] - gradient).norm() <= 1e-5 * scale(key, size, gradient.dtype), key
        for key, tensor in one["tensors"].items():
            torch.testing.assert_close(found["tensors"][key], tensor, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ("F400", "AlexNet-F", "AlexNet-F, J in evaluation"))
def test_a_joint_solve_counts_once_and_separate_ones_each(two, name):
    network, samples = small(**CASES[name])
    found = two[0][name]["tally"], two[1][name]["tally"]
    assert [tally.solves for tally in found] == ([3, 0] if name == "AlexNet-F" else [3, 3])


@pytest.mark.parametrize("kind", APART)
def test_without_them_the_gradient_is_the_mean_of_the_shares_own(two, kind):
    halves = []
    for part in (slice(0, 3), slice(3, 6)):
        network, (inputs, labels, *_) = small(kind)
        F.cross_entropy(network(inputs[part]), labels[part]).backward()
        halves.append(gradients_of(network))
    for process in two:
        for name, gradient in process[kind, "apart"].items():
            torch.testing.assert_close(gradient, (halves[0][name] + halves[1][name]) / 2, rtol=1e-9, atol=1e-12)


def test_each_sample_has_one_place_in_an_epoch_and_one_in_the_test(two):
    """The processes' shares of each batch, in a row, are the batch that one process takes; the last test batch has a single sample."""
    first, second = (process["seen"] for process in two)
    assert [(len(mine), len(theirs)) for mine, theirs in zip(first, second)] == [(3, 3), (3, 3), (2, 3), *4 * [(2, 2)], (0, 1)]
    together = [mine + theirs for mine, theirs in zip(first, second)]
    assert together == seen_samples(0)
    assert sorted(sum(together[:3], [])) == sorted(sum(together[3:], [])) == list(range(COUNT))


def test_dropout_masks_are_each_processs_own(two):
    assert not torch.equal(two[0]["mask"], two[1]["mask"])


def test_training_starts_from_the_first_processs_network(two):
    torch.manual_seed(0)
    expected = f400(5, inputs=2, classes=2, neuron=make_neuron(0.8, 0.9), time_steps=2).state_dict()
    for process in two:
        tensors = process["shared"]["tensors"]
        assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_every_pass_starts_from_the_first_processs_buffers(two):
    first, second = (process["buffers"] for process in two)
    assert len(first) == 4 and all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, first[1:]))


def test_a_parameter_without_a_gradient_keeps_none(two):
    """As the feedback in back-propagation through a single time step; the others' gradients are averaged all the same."""
    for process in two:
        assert [gradient for gradient in process["shared"]["gradients"] if gradient is not None] == [torch.tensor(1.5)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads' names in /proc")
def test_the_process_group_ends_with_its_threads(two):
    """A thread that outlives the interpreter may abort the process, though all it had to do is done."""
    assert all(process["threads within"] > 0 and process["threads after"] == 0 for process in two)


def test_a_resumed_job_ends_as_one_that_was_not_stopped(two):
    """Bit for bit, from within an epoch, with dropout, whose masks each process draws from a random state of its own."""
    whole, resumed = (load_checkpoint(two[0]["folder"] / run / LATEST) for run in ("whole", "resumed"))
    middle = load_checkpoint(two[0]["folder"] / "whole" / PREVIOUS)
    assert (middle.epoch, middle.iteration) == (1, 2) and len(middle.random_state["others"]) == 1
    assert whole.epoch == resumed.epoch == 2 and whole.log_rows == resumed.log_rows
    assert all(torch.equal(tensor, resumed.state_dict[name]) for name, tensor in whole.state_dict.items())
    assert not torch.equal(whole.state_dict["readout.weight"], middle.state_dict["readout.weight"])
