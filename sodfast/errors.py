"""The ways a command ends without its result."""


class UsageError(Exception):
    """What the user gave cannot be used. One line that says what to change; the CLI exits 2."""


class RunFailed(Exception):
    """A run broke after it began (a NaN loss, a full disk). The CLI exits 1."""

    alone = False  # True: only one of several ranks has failed, and the others do not know of it


class Interrupted(BaseException):
    """The user or the cluster wants the process to end. Not an `Exception`, so that no library's
    error handling swallows it. The CLI exits 130."""
