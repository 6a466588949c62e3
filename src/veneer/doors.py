"""The door to what stands to the right: local paths never pass it, hub ids do.

Everything else imports only from its left; a repository id needs huggingface_hub, which is imported
when one is used and not before.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any


def hub() -> ModuleType:
    """The integration with the hub."""
    return importlib.import_module("veneer.integrations.hub")


def is_local(where: str | os.PathLike[str]) -> bool:
    """Whether this is a path here, existing or not, rather than a repository id such as ``org/name``."""
    text = os.fspath(where)
    if not isinstance(where, str) or os.path.exists(os.path.expanduser(text)):
        return True
    return text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or not text


def adapter_directory(
    where: str | os.PathLike[str], subfolder: str | None = None, **hub_options: Any
) -> Path:
    """A local directory that holds the adapter: the one named, or a copy from the hub.

    Args:
        where: A path, which never touches the network, or a repository id.
        subfolder: Where in it the adapter lies.
        **hub_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and the like.
    """
    if is_local(where):
        path = Path(where).expanduser()
        return path / subfolder if subfolder else path
    directory: Path = hub().download_adapter(os.fspath(where), subfolder=subfolder, **hub_options)
    return directory
