"""Where a data set's files come from: each source puts them into a folder, through its ordinary client, or says why it can't."""

import contextlib
import io
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

from utils.data.torchvision_import import import_torchvision
from utils.errors import UserError

DOWNLOAD_TIMEOUT_S = 20


class Source(NamedTuple):
    """`fetch(folder)` leaves the data set's files somewhere under `folder`, an empty scratch folder, or raises."""

    name: str
    fetch: Callable[[Path], None]


def torchvision_download(dataset: str) -> Source:
    """torchvision's own download of `torchvision.datasets.<dataset>`, silent and bounded in time where a mirror hangs."""
    def fetch(folder: Path) -> None:
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                getattr(import_torchvision().datasets, dataset)(str(folder), download=True)
        finally:
            socket.setdefaulttimeout(timeout)
    return Source("torchvision's download", fetch)


def installed_folder(path: str) -> Source:
    """A folder that a system package has installed."""
    def fetch(folder: Path) -> None:
        shutil.copytree(path, folder, dirs_exist_ok=True)
    return Source(f"the installed folder {path}", fetch)


def debian_package(package: str) -> Source:
    """A Debian package, downloaded and unpacked without root; where the package lists are missing, private ones are made."""
    def fetch(folder: Path) -> None:
        try:
            _run(["apt-get", "download", package], folder)
        except RuntimeError:
            (folder / "lists" / "partial").mkdir(parents=True)
            private = ["-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder}"]
            _run(["apt-get", *private, "update"], folder)
            _run(["apt-get", *private, "download", package], folder)
        _run(["dpkg", "-x", str(next(folder.glob("*.deb"))), "."], folder)
    return Source(f"Debian's package {package}", fetch)


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def fetch_from(sources: Sequence[Source], scratch: Path, place: Callable[[Path], None], what: str) -> str:
    """Try the sources in turn until `place(folder)` accepts what one fetched; returns that source's name.

    Each source works in an empty folder under `scratch`, so that nothing half fetched is ever seen elsewhere. Raises
    UserError with every source's reason where all fail.
    """
    reasons = []
    for number, source in enumerate(sources):
        folder = (scratch / str(number)).resolve()  # Absolute, as clients run inside it.
        folder.mkdir()
        try:
            source.fetch(folder)
            place(folder)
            return source.name
        except Exception as error:  # Whatever a client raises, the next source may still serve.
            reasons.append(f"{source.name}: {' '.join(str(error).split()) or type(error).__name__}")
    raise UserError(f"{what} could not be fetched. " + "; ".join(reasons) + ". See data/README.md for fetching it by hand.")
