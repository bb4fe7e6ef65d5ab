"""The errors that a user's mistake or a user's file can cause.

Each message is one line: what is wrong, the value that was found, and what to do. The command line prints it and
exits with 2. Everything else that is raised is a bug of ours and keeps its traceback.
"""


class UserError(ValueError):
    """Base of all errors that the user can mend."""


class ConfigError(UserError):
    """A model configuration that no Megalodon can have."""


class CheckpointError(UserError):
    """A checkpoint that is incomplete, damaged or of an unknown layout."""


class BundleError(UserError):
    """A bundle that is incomplete, damaged or of another format version."""


class StateError(UserError):
    """A saved stream that does not belong to this bundle, or is damaged."""


class EngineError(UserError):
    """An engine that cannot be built, or cannot run on this machine."""


class TrainError(UserError):
    """Data that cannot be trained on, or a run that diverged."""


class MissingDependencyError(UserError, ImportError):
    """An optional package that is not installed; the message names the extra that installs it."""


class CheckFailedError(Exception):
    """A verification that ran and missed its tolerance: exit code 1, not 2."""


class InterruptedRunError(Exception):
    """A run that the user stopped, after it saved its work: exit code 130."""
