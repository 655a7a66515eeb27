"""F64C5 on N-MNIST: one convolutional spiking layer of 64 channels with feedback, shown the events of a moving camera.

    python nmnist_conv.py -c checkpoints/nmnist                                       train for 100 epochs (LIF, λ = 0.95, T = 30)
    python nmnist_conv.py -c checkpoints/nmnist_raw --path data/NMNIST                the same, read from the raw recordings
    python nmnist_conv.py -c checkpoints/nmnist_all --path data/NMNIST --nmnist-binning time         … over all their 300 ms
    python nmnist_conv.py --path data/NMNIST --resume checkpoints/nmnist_raw/model_best.pth.tar --evaluate --firing-rate
"""

from modules.zoo import f64c5_nmnist
from utils.data.nmnist import load_nmnist
from utils.data.recordings import BINNINGS
from utils.experiment import main
from utils.recipe import Recipe


def data(args):
    return load_nmnist(args.path, args.time_step, args.nmnist_binning)


def flags(parser):
    parser.add_argument_group("events").add_argument(
        "--nmnist-binning", choices=BINNINGS, default="paper",
        help="frames of raw recordings: the published ones, or all of a recording in T parts of equal time or number of events")


RECIPE = Recipe(
    description="F64C5 on N-MNIST",
    network=f64c5_nmnist,
    data=data,
    datasets={"nmnist": 10},
    defaults=dict(path="./data/NMNIST/2312_3000_stable/", time_step=30, leaky=0.95, epochs=100, lr=0.05, dropout=0.2),
    flags=flags,
)

if __name__ == "__main__":
    main(RECIPE)
