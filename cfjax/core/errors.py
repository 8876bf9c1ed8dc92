"""Errors that end a command with one clear line, and the exit codes that tell schedulers whether to start it again."""


class UserError(ValueError):
    """Bad input. The message is one line that names the file, key or flag, and the mend."""

    exit_code = 2


class Temporary(UserError):
    """A failure that the same command may not meet again: a disk that is full, a bucket or a process out of reach."""

    exit_code = 75  # EX_TEMPFAIL, "try again": schedulers restart the job, which goes on from its checkpoint
