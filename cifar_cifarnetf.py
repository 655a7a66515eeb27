"""CIFARNet-F on CIFAR-10 or CIFAR-100: five wide convolutional spiking layers with feedback from the last to the first.

    python cifar_cifarnetf.py -c checkpoints/cifarnetf                                CIFAR-10, 100 epochs (λ = 0.99, T = 100)
    python cifar_cifarnetf.py -c checkpoints/cifarnetf_30 --leaky 1 --time_step 30    IF neurons, T = 30
    python cifar_cifarnetf.py -c checkpoints/cifarnetf_100 --dataset cifar100         CIFAR-100
    python cifar_cifarnetf.py --resume checkpoints/cifarnetf/model_best.pth.tar --evaluate --firing-rate
"""

from modules.zoo import cifarnet_f
from utils.cifar_recipe import cifar_recipe
from utils.experiment import main

RECIPE = cifar_recipe("CIFARNet-F", cifarnet_f)

if __name__ == "__main__":
    main(RECIPE)
