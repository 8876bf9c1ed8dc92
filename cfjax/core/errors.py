"""Errors that end a command with a one-line message, and the exit codes by which schedulers start it again or not."""


class UserError(ValueError):
    """Bad input. The message is one line that names the file, key or flag, and how to fix it."""

    exit_code = 2


class Temporary(UserError):
    """A failure that may not happen again with the same command: a full disk, an unreachable bucket or process."""

    exit_code = 75  # EX_TEMPFAIL, "try again": schedulers restart the job, which goes on from its checkpoint
