"""Exceptions whose message is all that a user needs: the command line prints them without a traceback."""


class UserError(ValueError):
    """A mistake of the user's: what is wrong, with the value, and how to fix it. Exit code 2."""


class RunError(RuntimeError):
    """A run failed for a reason that is not the user's; the message says where its output is. Exit code 1."""


class Interrupted(Exception):
    """A run was told to stop and has saved its state. Exit code 75, for launchers: start it again."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step} as asked; the same command goes on from there")
        self.step = step


class ConfigError(UserError):
    """A run config that cannot run; the message lists every problem found."""
