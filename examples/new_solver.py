"""A new solver of (I − Jᵀ) v = g: Richardson iteration with momentum.

    python -m examples.new_solver -c checkpoints/richardson --solver richardson --epochs 2

A solver is a class whose `propose` gives the next x from x, map(x) and map(x) − x; a name in METHODS makes it a choice of --solver.
What stops it, counts its iterations and keeps the best x is shared.
"""

import fmnist_mlp
from modules.solvers import METHODS
from utils.experiment import main


class Richardson:
    """x ← x + step · (map(x) − x) + momentum · (x − the x before)."""

    step, momentum = 0.9, 0.2

    def __init__(self):
        self.before = None

    def propose(self, x, mapped, residual):
        momentum = 0 if self.before is None else self.momentum * (x - self.before)
        self.before = x
        return x + self.step * residual + momentum


METHODS["richardson"] = Richardson
RECIPE = fmnist_mlp.RECIPE

if __name__ == "__main__":
    main(RECIPE)
