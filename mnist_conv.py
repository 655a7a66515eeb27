"""F64C5 on MNIST: one convolutional spiking layer of 64 channels with feedback.

    python mnist_conv.py -c checkpoints/mnist                                         train for 100 epochs (LIF, λ = 0.95, T = 30)
    python mnist_conv.py -c checkpoints/mnist_if --leaky 1                            the same with IF neurons
    python mnist_conv.py -c checkpoints/mnist_try --epochs 3 --train-limit 2000 --test-limit 1000          a try of minutes
    python mnist_conv.py --resume checkpoints/mnist/model_best.pth.tar --evaluate --firing-rate
"""

from modules.zoo import f64c5_mnist
from utils.data.datasets import load_mnist
from utils.experiment import main
from utils.recipe import Recipe


def data(args):
    return load_mnist(args.path).normalised(mean=0.1307, std=0.3081)


RECIPE = Recipe(
    description="F64C5 on MNIST",
    network=f64c5_mnist,
    data=data,
    datasets={"mnist": 10},
    defaults=dict(time_step=30, leaky=0.95, epochs=100, schedule=[30, 60, 90], lr=0.05, dropout=0.2),
)

if __name__ == "__main__":
    main(RECIPE)
