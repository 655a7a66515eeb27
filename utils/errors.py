"""The one exception that stands for a mistake in what the user gave: a flag, a file, a folder or a machine."""


class UserError(Exception):
    """A sentence for the user that names the flag or file at fault and says what to do.

    The command line prints the sentence alone and exits with status 2; a traceback would hide it.
    """
