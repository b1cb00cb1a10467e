"""The one exception for mistakes of the user: the command line prints it as one message and exits with code 2."""


class UserError(ValueError):
    """What is wrong, with the value, and how to fix it."""


class ConfigError(UserError):
    """A run config that cannot run; the message lists every problem found."""
