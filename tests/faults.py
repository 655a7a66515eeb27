"""Runs that are killed, interrupted or run out of disk, and go on as if nothing had happened: `make test-faults`.

    python -m tests.faults                    everything, about a quarter of an hour on two cores
    python -m tests.faults --kills 6          a try
    python -m tests.faults --only SIGTERM     one kind of fault

Each fault is done to a real run of a training script in a process of its own. Afterwards every checkpoint in its folder must be
readable, the run must go on with --resume auto from the newest one, and end with the same weights, log and best accuracy as a run
that nothing happened to, bit for bit. The last line is `N passed, N failed`; the exit status is 1 if any failed.
"""

import argparse
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, List, Optional, Tuple

from tests.same_run import assert_same
from tests.small_data import write_small_data, write_small_mnist
from utils.checkpoint import BEST, LATEST, PREVIOUS, load_checkpoint, newest_checkpoint

ROOT = Path(__file__).parents[1]
PATIENCE = 120  # seconds for a process to come to its next step
SHARED = ["--manualSeed", "3", "--device", "cpu", "--warmup", "9"]
EXPERIMENTS = {
    "F400": ("fmnist_mlp.py", ["--train-batch", "8", "--epochs", "4", "--train-limit", "256", "--lr", "0.003"]),
    "F64C5": ("mnist_conv.py", ["--train-batch", "4", "--epochs", "3", "--train-limit", "64", "--test-limit", "40", "--time_step", "3",
                                "--lr", "0.002"]),
}


@dataclass
class Experiment:
    """A command whose runs are harmed, with the folder and the seconds of training of its run that nothing happened to."""

    name: str
    base: Path
    seconds: float = 0.0

    @property
    def whole(self) -> Path:
        return self.base / f"whole-{self.name}"

    def start(self, folder: Path, *more: str, **options) -> subprocess.Popen:
        script, arguments = EXPERIMENTS[self.name]
        command = [sys.executable, script, "--path", str(self.base / "data"), "-c", str(folder), *SHARED, *arguments, *more]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)

    def run(self, folder: Path, *more: str, **options) -> Tuple[int, str, str]:
        """Exit status, output and error output."""
        process = self.start(folder, *more, **options)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    def run_whole(self) -> None:
        process = self.start(self.whole)
        wait_for(lambda: (self.whole / "log.txt").exists(), process)
        began = time.monotonic()
        wait_for(lambda: load_if_whole(self.whole) == (int(EXPERIMENTS[self.name][1][3]), 0), process)
        self.seconds = time.monotonic() - began
        assert process.wait(PATIENCE) == 0, process.stderr.read()

    def goes_on(self, folder: Path) -> None:
        """The run in `folder` goes on from its newest checkpoint, which nothing got lost of, and ends as the whole one did."""
        self.starts_where_it_stopped(folder, *self.run(folder, "--resume", "auto", "--checkpoint-every", "3"))
        assert_same(self.whole, folder)

    @staticmethod
    def starts_where_it_stopped(folder: Path, status: int, out: str, err: str, expected: Optional[Tuple[int, int]] = None) -> None:
        assert status == 0, f"exit status {status}: {err}"
        if expected:
            assert position_named(out) == expected, f"{out} (it stopped at {expected})"


def position(folder: Path) -> Tuple[int, int]:
    """Whole epochs and iterations of the newest checkpoint; (0, 0) without any. Every one that is there must be readable."""
    found = [load_checkpoint(path) for path in (folder / LATEST, folder / PREVIOUS, folder / BEST) if path.exists()]
    newest = newest_checkpoint(folder)
    assert bool(found) == bool(newest)
    if newest is None:
        return 0, 0
    assert newest.name == LATEST, f"{LATEST} is missing"
    return found[0].epoch, found[0].iteration


def load_if_whole(folder: Path) -> Tuple[int, int]:
    path = folder / LATEST
    checkpoint = load_checkpoint(path) if path.exists() else None
    return (checkpoint.epoch, checkpoint.iteration) if checkpoint else (0, 0)


def position_named(out: str) -> Tuple[int, int]:
    """Where the program says that it goes on, or that it stopped."""
    within = re.search(r"in epoch (\d+) after (\d+) iterations", out, re.IGNORECASE)
    if within:
        return int(within[1]) - 1, int(within[2])
    between = re.search(r"after (\d+) epochs", out, re.IGNORECASE) or re.search(r"is finished: (\d+) epochs", out)
    if between:
        return int(between[1]), 0
    assert "a new run starts" in out, out
    return 0, 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, pause: float = 0.02) -> bool:
    """Wait until the condition holds (True) or the process has ended (False)."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None:
            return condition()
        assert time.monotonic() < deadline, "nothing happened for too long"
        time.sleep(pause)
    return True


def kill_and_go_on(experiment: Experiment, folder: Path, seed: int) -> str:
    """One run, killed once to three times at random moments of its training, half of them inside a save."""
    chance, kills = random.Random(seed), []
    every = str(chance.randint(1, 5))
    stopped, times = (0, 0), chance.choice([1, 1, 1, 2, 3])
    for _ in range(times):
        process = experiment.start(folder, "--resume", "auto", "--checkpoint-every", every)
        in_training = folder / "log.txt"
        before = in_training.stat().st_mtime_ns if in_training.exists() else None
        if not wait_for(lambda: in_training.exists() and in_training.stat().st_mtime_ns != before, process):
            break
        time.sleep(chance.uniform(0, 0.9 * experiment.seconds / times))
        inside = chance.random() < 0.5
        if inside:
            part = folder / f"{LATEST}.part"
            inside = wait_for(part.exists, process, pause=0.0005)
        seen = load_if_whole(folder)
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode in (-signal.SIGKILL, 0), err
        assert position_named(out) == stopped, f"started at {position_named(out)}, stopped at {stopped}"
        kills.append("in a save" if (folder / f"{LATEST}.part").exists() else "between saves")
        stopped_before, stopped = stopped, position(folder)
        assert stopped >= max(seen, stopped_before), f"{stopped} is behind {seen} or {stopped_before}"
    result = experiment.run(folder, "--resume", "auto", "--checkpoint-every", every)
    experiment.starts_where_it_stopped(folder, *result, expected=stopped)
    assert_same(experiment.whole, folder)
    assert kills, "it was never killed"
    return f"every {every}, killed {', '.join(kills)}"


def interrupt_and_go_on(number: signal.Signals, experiment: Experiment, folder: Path, seed: int) -> str:
    chance = random.Random(seed)
    process = experiment.start(folder)
    wait_for((folder / "log.txt").exists, process)
    time.sleep(chance.uniform(0.02, 0.5) * experiment.seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    if process.returncode in (0, -number):
        assert_same(experiment.whole, folder)
        return "it had finished before"
    assert process.returncode == 128 + number, f"exit status {process.returncode}: {err}"
    assert f"Stopped by {number.name}" in err and str(folder / LATEST) in err and "--resume auto" in err, err
    assert position_named(err) == position(folder)
    experiment.goes_on(folder)
    return "{} epochs and {} iterations were done".format(*position_named(err))


def damage_and_go_on(experiment: Experiment, folder: Path, seed: int) -> str:
    chance = random.Random(seed)
    process = experiment.start(folder, "--checkpoint-every", "3")
    wait_for((folder / PREVIOUS).exists, process)
    time.sleep(chance.uniform(0, 0.5 * experiment.seconds))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    latest = folder / LATEST
    # An epoch ends with the best network, which is then newer than the previous checkpoint.
    others = {path: load_checkpoint(path) for path in (folder / PREVIOUS, folder / BEST) if path.exists()}
    next_best = max(others, key=lambda path: (others[path].epoch, others[path].iteration))
    whole = bytearray(latest.read_bytes())
    place = chance.randrange(len(whole) // 4, len(whole) * 3 // 4)
    if seed % 2:
        latest.write_bytes(whole[:place])
    else:
        whole[place] ^= 1 << chance.randrange(8)
        latest.write_bytes(whole)
    status, out, err = experiment.run(folder, "--resume", "auto")
    assert f"{latest} is damaged" in out and f"Going on from {next_best}" in out, out
    experiment.starts_where_it_stopped(folder, status, out, err, expected=(others[next_best].epoch, others[next_best].iteration))
    assert_same(experiment.whole, folder)
    return ("cut short" if seed % 2 else "one bit flipped") + f" at byte {place:,d}"


def assert_failed_clearly(status: int, err: str, reason: str) -> None:
    assert status == 1 and len(err.strip().splitlines()) == 1 and reason in err and "Traceback" not in err, f"status {status}: {err}"


def fill_and_go_on(experiment: Experiment, folder: Path, seed: int) -> str:
    """A file may not grow beyond half a checkpoint, which every machine can have."""
    process = experiment.start(folder, "--checkpoint-every", "3")
    wait_for((folder / LATEST).exists, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    before = (folder / LATEST).read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
    status, _, err = experiment.run(folder, "--resume", "auto", preexec_fn=limit)
    assert_failed_clearly(status, err, "File too large")
    assert (folder / LATEST).read_bytes() == before and not list(folder.glob("*.part"))
    experiment.goes_on(folder)
    return "limit on the size of a file"


def fill_disk_and_go_on(experiment: Experiment, folder: Path, seed: int) -> str:
    """A disk of its own, in memory, with room for some checkpoints and a half."""
    size = (experiment.whole / LATEST).stat().st_size * (2 * (seed % 4) + 1) // 2
    mount(folder, f"size={size}")
    status, _, err = experiment.run(folder, "--checkpoint-every", "3")
    assert_failed_clearly(status, err, "No space left on device")
    assert not list(folder.glob("*.part"))
    stopped = position(folder)
    assert (stopped == (0, 0)) == (seed % 4 == 0)
    mount(folder, "remount,size=500m")
    result = experiment.run(folder, "--resume", "auto")
    experiment.starts_where_it_stopped(folder, *result, expected=stopped)
    assert_same(experiment.whole, folder)
    return f"a disk of {size:,d} bytes"


def write_protect_and_go_on(experiment: Experiment, folder: Path, seed: int) -> str:
    """A disk that becomes read-only while the run is under way, as Linux does with one that has errors; and one that is from the start."""
    mount(folder, "size=500m")
    process = experiment.start(folder, "--checkpoint-every", "5")
    wait_for((folder / PREVIOUS).exists, process)
    while subprocess.run(["mount", "-o", "remount,ro", str(folder)], stderr=subprocess.DEVNULL).returncode:
        time.sleep(0.005)  # It is refused while a file is being written.
    _, err = process.communicate(timeout=PATIENCE)
    assert_failed_clearly(process.returncode, err, "Read-only file system")
    position(folder)
    status, _, err = experiment.run(folder, "--resume", "auto")
    assert status == 2 and f"-c {folder}" in err and "Traceback" not in err, err
    mount(folder, "remount,rw")
    experiment.goes_on(folder)
    return "remounted read-only"


def mount(folder: Path, options: str) -> None:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)


FAULTS = {
    "kill": kill_and_go_on, "damage": damage_and_go_on, "limit": fill_and_go_on, "full disk": fill_disk_and_go_on,
    "read-only": write_protect_and_go_on, "SIGTERM": lambda *given: interrupt_and_go_on(signal.SIGTERM, *given),
    "SIGINT": lambda *given: interrupt_and_go_on(signal.SIGINT, *given),
}
# Done in a name space of its own, where anyone may mount a disk.
NEED_A_DISK = ("full disk", "read-only")
NAME_SPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def do(fault: str, experiment: Experiment, seed: int) -> Tuple[bool, str]:
    """Whether the fault did no harm, and a line that says so."""
    folder = experiment.base / f"{fault}-{seed}".replace(" ", "-")
    began = time.monotonic()
    try:
        if fault in NEED_A_DISK:
            told = in_name_space(fault, experiment, seed)
        else:
            told = FAULTS[fault](experiment, folder, seed)
    except Exception as error:
        return False, f"FAILED {fault} {seed}, {experiment.name}: {type(error).__name__}: {error} (left in {folder})"
    shutil.rmtree(folder, ignore_errors=True)
    return True, f"passed {fault} {seed}, {experiment.name}: {told} ({time.monotonic() - began:.0f} s)"


def in_name_space(fault: str, experiment: Experiment, seed: int) -> str:
    inner = [sys.executable, "-m", "tests.faults", "--inside", fault, experiment.name, str(experiment.base), str(seed)]
    done = subprocess.run([*NAME_SPACE, *inner], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return subprocess.run([*NAME_SPACE, "mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode == 0
        except OSError:
            return False


def plan(kills: int, seed: int) -> List[Tuple[str, str, int]]:
    """What is done: fault, experiment and seed. A quarter of the runs are convolutional."""
    counts = {"kill": kills, "damage": 4, "limit": 1, "full disk": 4, "read-only": 1, "SIGTERM": 3, "SIGINT": 2}
    if not can_mount():
        print("No disk can be mounted here: left out are", *NEED_A_DISK, flush=True)
        counts = {fault: count for fault, count in counts.items() if fault not in NEED_A_DISK}
    return [(fault, "F64C5" if number % 4 == 3 else "F400", seed + number) for fault, count in counts.items() for number in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=64, help="runs to kill (default: 64)")
    parser.add_argument("--only", choices=FAULTS, help="one kind of fault (default: all)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="other moments (default: 0)")
    parser.add_argument("--inside", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        fault, name, base, seed = args.inside
        print(FAULTS[fault](Experiment(name, Path(base)), Path(base) / f"{fault}-{seed}".replace(" ", "-"), int(seed)))
        return
    began, base = time.monotonic(), Path(tempfile.mkdtemp(prefix="faults-"))
    write_small_data(base / "data", train=256, test=200)
    write_small_mnist(base / "data", train=64, test=40)
    experiments = {name: Experiment(name, base) for name in EXPERIMENTS}
    for experiment in experiments.values():
        experiment.run_whole()
        print(f"{experiment.name}: {experiment.seconds:.1f} s of training in the run that nothing happens to", flush=True)
    cases = [case for case in plan(args.kills, args.seed) if args.only in (None, case[0])]
    counts = [0, 0]
    with ThreadPoolExecutor(args.jobs) as pool:
        for passed, line in pool.map(lambda case: do(case[0], experiments[case[1]], case[2]), cases):
            counts[not passed] += 1
            print(line, flush=True)
    if not counts[1]:
        shutil.rmtree(base)
    print(f"{time.monotonic() - began:.0f} s\n{counts[0]} passed, {counts[1]} failed")
    sys.exit(bool(counts[1]))


if __name__ == "__main__":
    main()
