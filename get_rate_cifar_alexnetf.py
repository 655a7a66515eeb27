"""Firing rates of a trained AlexNet-F: accuracy, loss, the rate of each layer and in total, and a bar chart, in one pass.

    python get_rate_cifar_alexnetf.py --resume checkpoints/alexnetf/model_best.pth.tar
    python get_rate_cifar_alexnetf.py --dataset cifar100 --time_step 30 --leaky 1 --resume FILE -c FOLDER_OF_THE_CHART

It is cifar_alexnetf.py with --evaluate --firing-rate; every training script takes these flags for its own network.
"""

from dataclasses import replace

import cifar_alexnetf
from utils.experiment import main

RECIPE = replace(cifar_alexnetf.RECIPE, description="Firing rates of AlexNet-F on {dataset}",
                 defaults={**cifar_alexnetf.RECIPE.defaults, "evaluate": True, "firing_rate": True})

if __name__ == "__main__":
    main(RECIPE)
