"""The doors to what stands to the right, and to what is heavy: nothing passes them before it is used.

Everything else imports only from its left; a repository id needs huggingface_hub, which is imported
when one is used and not before. Local paths never pass that door, hub ids do.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from veneer.errors import UnknownOptionError, show
from veneer.wording import did_you_mean

#: Keywords that say how to fetch from the hub, or that libraries pass along; a local path needs none of them.
HUB_OPTIONS = frozenset(
    """
    revision token use_auth_token cache_dir local_files_only force_download resume_download proxies subfolder
    user_agent repo_type library_name library_version headers etag_timeout endpoint local_dir
    local_dir_use_symlinks force_filename legacy_cache_layout tqdm_class dry_run
    trust_remote_code adapter_kwargs _commit_hash _from_auto _from_pipeline
    _raise_exceptions_for_missing_entries
    _raise_exceptions_for_gated_repo _raise_exceptions_for_connection_errors
    """.split()
)


def hub() -> ModuleType:
    """The integration with the hub."""
    return importlib.import_module("veneer.integrations.hub")


def adapter_files() -> ModuleType:
    """What tells which files of a directory are an adapter; a configuration belongs to tensors."""
    return importlib.import_module("veneer.files.layout")


def public_names(package: str) -> Callable[[str], Any]:
    """The ``__getattr__`` (PEP 562) of a package whose public names stand in its module ``public``.

    They come all together with the first that is asked for. So a module of the package can be imported
    without what the others need, which for most is torch.
    """

    def find(name: str) -> Any:
        if not name.startswith("__") or name == "__all__":  # the import system asks every package for some
            public = importlib.import_module(f"{package}.public")
            found = {"__all__": public.__all__, **{each: getattr(public, each) for each in public.__all__}}
            if name in found:
                vars(sys.modules[package]).update(found)
                return found[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def is_local(where: str | os.PathLike[str]) -> bool:
    """Whether this is a path here, existing or not, rather than a repository id such as ``org/name``.

    A name whose directory is here is a path, perhaps a mistyped one: ``out/checkpoint-4`` beside ``out``.
    """
    text = os.fspath(where)
    if not isinstance(where, str) or os.path.exists(os.path.expanduser(text)):
        return True
    if text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or not text:
        return True
    return os.path.isabs(text) or ("/" in text and os.path.isdir(text.partition("/")[0]))


def refuse_unknown(
    call: str, given: Iterable[str], accepted: Collection[str], near: Iterable[str] = ()
) -> None:
    """Refuse keywords that a call does not have, rather than let a misspelt one do nothing.

    Args:
        call: Name of what was called.
        given: Names of the keywords that no parameter took.
        accepted: Those that are accepted all the same.
        near: Names of the parameters, which may have been meant.

    Raises:
        UnknownOptionError: Naming each unknown keyword, with the known one that is most like it.
    """
    known = sorted({*accepted, *near})
    problems = [show(name) + did_you_mean(name, known) for name in given if name not in accepted]
    if problems:
        raise UnknownOptionError(f"{call} has no option {', '.join(problems)}")


def adapter_directory(
    where: str | os.PathLike[str], subfolder: str | None = None, **hub_options: Any
) -> Path:
    """A local directory that holds the adapter: the one named, or a copy from the hub.

    Args:
        where: A path, which never touches the network, or a repository id.
        subfolder: Where in it the adapter lies.
        **hub_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and the like.

    Raises:
        UnknownOptionError: For keywords that neither the hub nor its users have.
    """
    refuse_unknown("loading an adapter", hub_options, HUB_OPTIONS)
    if is_local(where):
        path = Path(where).expanduser()
        return path / subfolder if subfolder else path
    directory: Path = hub().download_adapter(os.fspath(where), subfolder=subfolder, **hub_options)
    return directory
