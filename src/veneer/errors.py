"""Every error that Veneer raises on purpose.

The tree; each also is the built-in exception that callers of the field's API already catch::

    VeneerError
    ├── ConfigError          ValueError    a configuration that cannot be right
    │   └── UnknownOptionError  TypeError  an option that does not exist (or is spelt otherwise)
    ├── TargetError          ValueError    nothing matched, or what matched cannot be adapted
    ├── AdapterNameError     ValueError    an adapter name that is unknown, taken or unusable
    ├── CheckpointError      ValueError    files and tensors of an adapter
    │   ├── AdapterFileError               missing, truncated, hostile or unreadable file
    │   ├── LoadMismatchError RuntimeError tensors that do not fit the model
    │   └── BaseMismatchError              the adapter was made on another base model
    ├── RoutingError         ValueError    rows of a batch that cannot go through the adapters named
    ├── MergeError           ValueError    a merge that would be wrong
    ├── CombineError         ValueError    adapters that cannot be combined
    ├── ExportError          ValueError    an adapter that another reader's format cannot hold, or the reverse
    ├── DataError            ValueError    training or evaluation data that cannot be used
    ├── TrainingError        RuntimeError  a training run that cannot go on
    └── MissingExtraError    ImportError   an optional library that is not installed

    VeneerWarning            UserWarning   something the user should know; nothing was refused
"""

from __future__ import annotations


class VeneerError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(VeneerError, ValueError):
    """A configuration that cannot be right; the message lists all its problems."""


class UnknownOptionError(ConfigError, TypeError):
    """An option that does not exist, with the nearest one that does."""


class TargetError(VeneerError, ValueError):
    """No module matched, or a matched module cannot be adapted."""


class AdapterNameError(VeneerError, ValueError):
    """An adapter name that is unknown, already taken, or unusable as a module name."""


class CheckpointError(VeneerError, ValueError):
    """Base of the errors about adapter files and their tensors."""


class AdapterFileError(CheckpointError):
    """A file that is missing, truncated, hostile or not what it claims to be."""


class LoadMismatchError(CheckpointError, RuntimeError):
    """Tensors of an adapter that do not fit the model; the message accounts for all of them."""


class BaseMismatchError(CheckpointError):
    """The adapter was trained on another base model than the one it is loaded onto."""


class RoutingError(VeneerError, ValueError):
    """Rows of a batch that cannot go through the adapters named for them."""


class MergeError(VeneerError, ValueError):
    """A merge or unmerge that would give a wrong weight."""


class CombineError(VeneerError, ValueError):
    """Adapters that cannot be combined in the way asked for."""


class ExportError(VeneerError, ValueError):
    """An adapter that another reader's format cannot hold, or a file of one that holds what we cannot."""


class DataError(VeneerError, ValueError):
    """Training or evaluation data that cannot be used."""


class TrainingError(VeneerError, RuntimeError):
    """A training run that cannot start or go on."""


class MissingExtraError(VeneerError, ImportError):
    """An optional library that is not installed, with the line that installs it."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {library}, which is not installed: pip install 'veneer[{extra}]'")
        self.library = library
        self.extra = extra


class VeneerWarning(UserWarning):
    """Something the user should know, though nothing was refused."""
