"""Errors that are the user's to mend: one clear line, exit code 2."""


class UserError(ValueError):
    """Bad input. The message is one line that names the file, key or flag, and the mend."""
