"""A plain implementation of the published algorithm, the yardstick that the project is timed against.

Eager PyTorch as one would write it from the paper: a Python loop over time with batch norm and dropout in each step, Broyden's
method from zero with its two arrays of stored vectors, samples transformed one by one in a DataLoader. It shares no code
with the project and is not meant to be imported by anything but benchmarks and their tests.
"""

import torch
import torch.nn.functional as F
from torch import nn

STORED_VECTORS, MOST_ITERATIONS, TOLERANCE = 27, 30, 7e-7


class Block(nn.Module):
    """Linear map, batch norm and a dropout mask that is drawn once per forward pass."""

    def __init__(self, linear: nn.Module, norm: nn.Module, dropout: float):
        super().__init__()
        self.linear, self.norm, self.dropout, self.mask = linear, norm, dropout, None

    def forward(self, x):
        y = self.norm(self.linear(x))
        if not self.training or self.dropout == 0:
            return y
        if self.mask is None:
            self.mask = torch.empty_like(y).bernoulli_(1 - self.dropout).div_(1 - self.dropout).detach()
        return y * self.mask


class FeedbackBlock(nn.Module):
    """The spectrally normalised feedback with its dropout mask."""

    def __init__(self, linear: nn.Module, dropout: float):
        super().__init__()
        self.linear, self.dropout, self.mask = linear, dropout, None
        self.g = nn.Parameter(torch.ones(()))
        self.register_buffer("u", F.normalize(torch.randn(linear.weight.shape[0]), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(linear.weight[0].numel()), dim=0))

    def normalise(self):
        w = self.linear.weight
        with torch.no_grad():
            self.v = F.normalize(w.flatten(1).t() @ self.u, dim=0)
            self.u = F.normalize(w.flatten(1) @ self.v, dim=0)
        self.weight = w * self.g.clamp(-1, 1) / torch.dot(self.u, w.flatten(1) @ self.v)

    def forward(self, x):
        if isinstance(self.linear, nn.Linear):
            y = F.linear(x, self.weight)
        elif isinstance(self.linear, nn.Conv2d):
            y = F.conv2d(x, self.weight, None, self.linear.stride, self.linear.padding)
        else:
            y = F.conv_transpose2d(x, self.weight, None, self.linear.stride, self.linear.padding, self.linear.output_padding)
        if not self.training or self.dropout == 0:
            return y
        if self.mask is None:
            self.mask = torch.empty_like(y).bernoulli_(1 - self.dropout).div_(1 - self.dropout).detach()
        return y * self.mask


class Yardstick(nn.Module):
    def __init__(self, blocks, feedback, features, classes, time_steps, leak, threshold=2.0):
        super().__init__()
        self.blocks, self.feedback = nn.ModuleList(blocks), feedback
        self.classifier = nn.Linear(features, classes)
        self.time_steps, self.leak, self.threshold = time_steps, leak, threshold

    def equilibrium(self, a, x):
        a = torch.clamp((self.blocks[0](x) + self.feedback(a)) / self.threshold, 0, 1)
        for block in self.blocks[1:]:
            a = torch.clamp(block(a) / self.threshold, 0, 1)
        return a

    def simulate(self, x):
        norms = [block.norm for block in self.blocks]
        if self.training:
            norms[0].momentum = 0.0
            for norm in norms[1:]:
                norm.eval()
        potentials, spikes = [0.0] * len(self.blocks), [0.0] * len(self.blocks)
        rate, total = 0.0, 0.0
        for t in range(self.time_steps):
            for layer, block in enumerate(self.blocks):
                current = block(x if layer == 0 else spikes[layer - 1])
                if layer == 0 and t > 0:
                    current = current + self.feedback(spikes[-1])
                potentials[layer] = self.leak * (potentials[layer] - self.threshold * spikes[layer]) + current
                spikes[layer] = (potentials[layer] >= self.threshold).to(current.dtype)
            rate = rate * self.leak + spikes[-1]
            total = total * self.leak + 1
        norms[0].momentum = 0.1
        for norm in norms:
            norm.train(self.training)
        return rate / total

    def forward(self, x):
        for block in [*self.blocks, self.feedback]:
            block.mask = None
        self.feedback.normalise()
        with torch.no_grad():
            rate = self.simulate(x)
        if not self.training:
            return self.classifier(rate.flatten(1))
        mapped = self.equilibrium(rate, x)
        z = (mapped if len(self.blocks) > 1 else rate).detach().requires_grad_()
        jacobian_value = self.equilibrium(z, x)
        out = mapped + (rate - mapped).detach()

        def backward_hook(gradient):
            hook.remove()
            return broyden(lambda v: torch.autograd.grad(jacobian_value, z, v, retain_graph=True)[0] + gradient - v, gradient)

        hook = out.register_hook(backward_hook)
        return self.classifier(out.flatten(1))


def broyden(g, like):
    """Solve g(v) = 0 from v = 0 by Broyden's good method, one rank-one update per sample and iteration; the best v seen."""
    batch, shape = like.shape[0], like.shape
    x = torch.zeros_like(like).view(batch, -1)
    left = x.new_zeros(batch, x.shape[1], STORED_VECTORS)
    right = x.new_zeros(batch, STORED_VECTORS, x.shape[1])
    value = g(x.view(shape)).reshape(batch, -1)
    step = -_matvec(left[..., :0], right[:, :0], value)
    best, lowest, bound = x, value.norm().item(), TOLERANCE * like.norm().item()
    for iteration in range(MOST_ITERATIONS):
        x = x + step
        new = g(x.view(shape)).reshape(batch, -1)
        change, value = new - value, new
        residual = value.norm().item()
        if residual < lowest:
            best, lowest = x, residual
        if residual < bound or iteration + 1 >= MOST_ITERATIONS:
            break
        used = min(iteration, STORED_VECTORS)
        row = _vecmat(step, left[..., :used], right[:, :used])
        column = step - _matvec(left[..., :used], right[:, :used], change)
        column = column / (row * change).sum(1, keepdim=True)
        slot = iteration % STORED_VECTORS
        left[..., slot], right[:, slot] = torch.nan_to_num(column), torch.nan_to_num(row)
        used = min(iteration + 1, STORED_VECTORS)
        step = -_matvec(left[..., :used], right[:, :used], value)
    return best.view(shape)


def _matvec(left, right, vector):
    return -vector + torch.einsum("bdi,bi->bd", left, torch.einsum("bid,bd->bi", right, vector))


def _vecmat(vector, left, right):
    return -vector + torch.einsum("bi,bid->bd", torch.einsum("bd,bdi->bi", vector, left), right)


def yardstick_f400(time_steps=5, leak=0.95, dropout=0.2, width=400, inputs=784, classes=10):
    return Yardstick([Block(nn.Linear(inputs, width), nn.BatchNorm1d(width), dropout)],
                     FeedbackBlock(nn.Linear(width, width, bias=False), dropout), width, classes, time_steps, leak)


def yardstick_f64c5(time_steps=30, leak=0.95, dropout=0.2, width=64, classes=10):
    return Yardstick([Block(nn.Conv2d(1, width, 5, 2, 2), nn.BatchNorm2d(width), dropout)],
                     FeedbackBlock(nn.Conv2d(width, width, 5, padding=2, bias=False), dropout), width * 14 * 14, classes, time_steps, leak)


def yardstick_alexnet_f(time_steps=30, leak=0.99, dropout=0.2, widths=(96, 256, 384, 384, 256), classes=10):
    blocks = [Block(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), dropout)
              for before, after, stride in zip((3, *widths), widths, (2, 1, 2, 1, 1))]
    feedback = nn.ConvTranspose2d(widths[-1], widths[0], 3, 2, 1, 1, bias=False)
    return Yardstick(blocks, FeedbackBlock(feedback, dropout), widths[-1] * 64, classes, time_steps, leak)


def copy_weights(yardstick: Yardstick, network: nn.Module) -> None:
    """Give the yardstick the weights of the project's network of the same shape."""
    with torch.no_grad():
        for block, connection in zip(yardstick.blocks, [network.input, *network.hidden]):
            block.linear.load_state_dict(connection.linear.state_dict())
            block.norm.load_state_dict(connection.norm.state_dict())
        yardstick.feedback.linear.weight.copy_(network.feedback.w)
        for name in ("g", "u", "v"):
            getattr(yardstick.feedback, name).copy_(getattr(network.feedback, name))
        yardstick.classifier.load_state_dict(network.readout.state_dict())


def yardstick_epoch(network, optimizer, train_dataset, test_dataset, workers=2):
    """One epoch of training and one of testing over datasets of (transformed sample, label)."""
    results = []
    for dataset, training in ((train_dataset, True), (test_dataset, False)):
        loader = torch.utils.data.DataLoader(dataset, 128 if training else 200, shuffle=training, num_workers=workers,
                                             multiprocessing_context="fork" if workers else None)
        network.train(training)
        loss_sum, hits1, hits5 = 0.0, 0.0, 0.0
        with torch.set_grad_enabled(training):
            for x, labels in loader:
                logits = network(x)
                loss = F.cross_entropy(logits, labels)
                if training:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                hits = logits.topk(5, 1)[1].eq(labels[:, None])
                loss_sum += loss.item() * len(labels)
                hits1 += hits[:, 0].sum().item()
                hits5 += hits.sum().item()
        results.append((loss_sum / len(dataset), 100 * hits1 / len(dataset)))
    return results
