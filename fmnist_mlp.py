"""F400 on Fashion-MNIST: one fully connected spiking layer of 400 neurons with feedback.

    python fmnist_mlp.py -c checkpoints/f400                                          train for 100 epochs (LIF, λ = 0.95)
    python fmnist_mlp.py -c checkpoints/f400_if --leaky 1                             the same with IF neurons
    python fmnist_mlp.py --resume checkpoints/f400/model_best.pth.tar --evaluate --firing-rate
"""

from modules.zoo import f400
from utils.data.datasets import load_fashion_mnist
from utils.experiment import main
from utils.recipe import Recipe


def data(args):
    return load_fashion_mnist(args.path).normalised(mean=0.1307, std=0.3081, flatten=True)


RECIPE = Recipe(
    description="F400 on Fashion-MNIST",
    network=f400,
    data=data,
    datasets={"fashionmnist": 10},
    defaults=dict(time_step=5, leaky=0.95, epochs=100, schedule=[30, 60, 90], lr=0.05, dropout=0.2),
)

if __name__ == "__main__":
    main(RECIPE)
