"""AlexNet-F on CIFAR-10 or CIFAR-100: five convolutional spiking layers with feedback from the last to the first.

    python cifar_alexnetf.py -c checkpoints/alexnetf                                  CIFAR-10, 100 epochs (λ = 0.99, T = 100)
    python cifar_alexnetf.py -c checkpoints/alexnetf_if_30 --leaky 1 --time_step 30   IF neurons, T = 30
    python cifar_alexnetf.py -c checkpoints/alexnetf_100 --dataset cifar100           CIFAR-100
    python cifar_alexnetf.py --resume checkpoints/alexnetf/model_best.pth.tar --evaluate
    python get_rate_cifar_alexnetf.py --resume checkpoints/alexnetf/model_best.pth.tar
"""

from modules.zoo import alexnet_f
from utils.cifar_recipe import cifar_recipe
from utils.experiment import main

RECIPE = cifar_recipe("AlexNet-F", alexnet_f)

if __name__ == "__main__":
    main(RECIPE)
