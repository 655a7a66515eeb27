"""The exceptions whose message is all that the user needs to see."""

import contextlib
import sys
from typing import Iterator

from termcolor import cprint


class UserError(Exception):
    """A mistake in what the user gave: a flag, a file, a folder or a machine.

    A sentence for the user that names the flag or file at fault and says what to do. The command line prints the sentence alone
    and exits with status 2; a traceback would hide it.
    """


class RunFailed(Exception):
    """A run that can't go on though its flags are right: the loss is not a number, or the disk is full.

    A sentence that says where it stopped and what is kept. The command line prints it alone and exits with status 1.
    """


@contextlib.contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Have a UserError or a RunFailed end the program with its sentence on stderr alone, with exit status 2 or 1."""
    try:
        yield
    except (UserError, RunFailed) as error:
        cprint(f"error: {error}", "red", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
