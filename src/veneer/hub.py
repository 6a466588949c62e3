"""A directory here, or a repository on the hub: which of both is meant, fetching and publishing.

A repository needs huggingface_hub, which is imported when one is used; a local path never needs it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from veneer.errors import AdapterFileError, Blank, Hint, MissingExtraError, UnknownOptionError, short, show
from veneer.files.header import metadata_and_shapes
from veneer.files.layout import (
    BIN_NAME,
    CONFIG_NAME,
    SAFETENSORS_NAME,
    check_directory,
    find_config,
    locate_tensors,
)
from veneer.wording import did_you_mean

_COMMIT = re.compile(r"[0-9a-f]{40}")
#: Seconds that the hub has to answer a first request.
PATIENCE = 4.0

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


@contextlib.contextmanager
def cached_if_unreachable() -> Iterator[str]:
    """Within the block, libraries look into their caches at once where the hub does not answer.

    huggingface_hub repeats each request five times, which takes 24 seconds.

    Yields:
        Why the hub cannot be reached; empty if it can, or if offline mode is set already.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    reason = ""
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        except Exception as error:  # of requests or of httpx, by the version
            reason = f"the hub at {constants.ENDPOINT} does not answer: {error}"
    modules = [constants, sys.modules.get("datasets.config")] if reason else []
    before = [(module, module.HF_HUB_OFFLINE) for module in modules if module is not None]
    for module, _ in before:
        module.HF_HUB_OFFLINE = True
    try:
        yield reason
    finally:
        for module, value in before:
            module.HF_HUB_OFFLINE = value


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
    return download_adapter(os.fspath(where), subfolder=subfolder, **hub_options)


class EntryMissingError(AdapterFileError):
    """The repository is there, the file is not in it."""


class NotCachedError(AdapterFileError):
    """The file is not in the cache, and the network cannot be asked."""


def download_file(repo_id: str, filename: str, *, local_files_only: bool = False, **options: Any) -> str:
    """Fetch one file of a repository, or find it in the cache, and return its path.

    Args:
        repo_id: `"owner/name"`.
        filename: Name of the file in the repository, or in `subfolder`.
        local_files_only: Do not ask the network; take what the cache has.
        **options: `subfolder` (directory of the repository, with `/` between its parts), `revision` (branch,
            tag or commit), `token`, `cache_dir` and `force_download`; others that callers of PEFT's interface
            pass have no meaning any more.

    Raises:
        AdapterFileError: Saying what stands in the way (no such repository, revision or file; no access; no
            network), and what to do.
        MissingExtraError: huggingface_hub is not installed.
    """
    with _asking(repo_id, local_files_only) as unreachable:
        return _download(repo_id, filename, unreachable, local_files_only=local_files_only, **options)


@contextlib.contextmanager
def _asking(repo_id: str, local_files_only: bool) -> Iterator[str]:
    """`cached_if_unreachable`, unless the network is not to be asked."""
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("huggingface_hub", "hf", f"reading {repo_id!r}") from error
    with contextlib.nullcontext("") if local_files_only else cached_if_unreachable() as unreachable:
        yield unreachable


def _download(
    repo_id: str,
    filename: str,
    unreachable: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    **ignored: Any,
) -> str:
    """`download_file`, where it is known why the hub cannot be reached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        found: str = hf_hub_download(
            repo_id,
            filename,
            subfolder=subfolder or None,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            library_name="veneer",
        )
        return found
    except HFValidationError as error:
        raise AdapterFileError(
            f'{show(repo_id)} is neither a directory here nor the id of a repository ("owner/name"): '
            f"{short(str(error))}"
        ) from error
    except (OSError, ValueError) as error:
        path = "/".join(filter(None, [subfolder, filename]))
        raise _explain(error, repo_id, path, revision, local_files_only, unreachable) from error


def download_adapter(repo_id: str, *, subfolder: str | None = None, **options: Any) -> Path:
    """Fetch the configuration and the tensors of an adapter and return the directory that holds them.

    The tensors are `adapter_model.safetensors` if the repository has it, else `adapter_model.bin`. Both files
    come from one commit, also if the branch moves between the two requests.

    Args:
        repo_id: `"owner/name"`.
        subfolder: Directory of the repository that holds the adapter.
        **options: As for `download_file`.

    Raises:
        AdapterFileError: The adapter, or a part of it, cannot be had; says why.
        MissingExtraError: huggingface_hub is not installed.
    """
    options["subfolder"] = subfolder
    with _asking(repo_id, options.get("local_files_only", False)) as unreachable:
        config = Path(_download(repo_id, CONFIG_NAME, unreachable, **options))
        commit = config.parents[len(Path(subfolder or "").parts)].name
        if _COMMIT.fullmatch(commit):
            options["revision"] = commit
        try:
            _download(repo_id, SAFETENSORS_NAME, unreachable, **options)
        except (EntryMissingError, NotCachedError) as no_safetensors:
            try:
                _download(repo_id, BIN_NAME, unreachable, **options)
            except NotCachedError:
                raise no_safetensors from None
            except EntryMissingError:
                raise AdapterFileError(
                    f"{repo_id} has an {CONFIG_NAME} but neither {SAFETENSORS_NAME} nor {BIN_NAME} beside it"
                    f"{f' in {subfolder}' if subfolder else ''}: the upload is incomplete"
                ) from no_safetensors
    return config.parent


def adapter_files(directory: str | os.PathLike[str]) -> dict[str, int]:
    """What of a directory is published: adapters in it and in its subdirectories, and their cards.

    Returns:
        Name in the directory -> size in bytes.

    Raises:
        AdapterFileError: There is no adapter, or one of them cannot be read.
    """
    root = check_directory(Path(directory))
    names = (CONFIG_NAME, SAFETENSORS_NAME, BIN_NAME, "README.md")
    found = sorted(path for part in ("", "*/") for name in names for path in root.glob(part + name))
    places = [path.parent for path in found if path.name == CONFIG_NAME]
    if not places:
        raise AdapterFileError(f"no {CONFIG_NAME} in {os.fspath(directory)!r}: save the adapter there first")
    for place in places:
        if any((place / name).exists() for name in (SAFETENSORS_NAME, BIN_NAME)):
            metadata_and_shapes(locate_tensors(place))  # a configuration may be published alone
        if find_config(place).cut_short:
            raise AdapterFileError(
                f"a save into {place} was cut short, and others would read its tensors with the "
                "configuration of another adapter: save it again first"
            )
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in found}


def push_to_hub(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    path_in_repo: str | None = None,
) -> str:
    """Upload a saved adapter and return the address of the commit.

    Args:
        directory: What `save_pretrained` wrote. Only adapter files and the model card are uploaded.
        repo_id: `"owner/name"`; made if it does not exist.
        commit_message: First line of the commit.
        revision: Branch; made if it does not exist. The main branch if None.
        token: A token with the right to write, or True or None for the stored one.
        private: Make a new repository private; refused for one that exists and is public.
        create_pr: Propose the change instead of making it.
        path_in_repo: Directory of the repository; the root if None.

    Raises:
        AdapterFileError: There is no whole adapter in the directory, or the hub refuses; says why.
        MissingExtraError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError as error:
        raise MissingExtraError("huggingface_hub", "hf", f"uploading to {repo_id!r}") from error
    files = adapter_files(directory)
    api = HfApi(token=token, library_name="veneer")
    try:
        repository = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if private and not api.model_info(repository).private:
            raise AdapterFileError(
                f"nothing was pushed: {repository} is there already, and is public. Leave out ",
                Hint("private", True),
                ", or push to another repository",
            )
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=os.fspath(directory),
            path_in_repo=path_in_repo,
            commit_message=commit_message or "Upload adapter",
            revision=revision,
            create_pr=create_pr,
            allow_patterns=list(files),
        )
    except AdapterFileError:
        raise
    except Exception as error:
        if not isinstance(error, OSError | ValueError) and not _no_answer(error):
            raise
        raise _explain(error, repo_id, None, revision, pushing=True) from error
    return str(done)


def push_adapter(
    model: Any,
    repo_id: str,
    *,
    safe_serialization: bool = True,
    selected_adapters: Sequence[str] | None = None,
    **kwargs: Any,
) -> str:
    """Save the adapters of a model, upload them, and return the address of the commit.

    Args:
        model: A `PeftModel`.
        repo_id: `"owner/name"`; made if it does not exist.
        safe_serialization: Write safetensors.
        selected_adapters: The adapters; all of them if None.
        kwargs: As for `push_to_hub`.

    Raises:
        AdapterFileError: The hub refuses; says why.
        MissingExtraError: huggingface_hub is not installed.
    """
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(
            directory, safe_serialization=safe_serialization, selected_adapters=selected_adapters
        )
        return push_to_hub(directory, repo_id, **kwargs)


#: huggingface_hub's error -> what it means, and the way out.
_MEANINGS = {
    "GatedRepoError": "{repo} is gated: its owner has to let you in. Ask for access on its page, then pass "
    "token=... or log in with `hf auth login`.",
    "RepositoryNotFoundError": "there is no directory {repo!r} here, and no repository of that id on the hub "
    "that this token may see. Check the spelling; for a private repository pass token=... or log in with "
    "`hf auth login`; for a local adapter pass the directory that holds its adapter_config.json.",
    "RevisionNotFoundError": "{repo} has no branch, tag or commit {revision!r}. Leave revision out for the "
    "main branch, or look its revisions up on its page.",
    "EntryNotFoundError": "the hub has no {place}. A repository without it is no adapter (a whole model, "
    "perhaps: load it with its own library), or keeps it in a directory: pass subfolder=...",
}


def _explain(
    error: Exception,
    repo_id: str,
    path: str | None,
    revision: str | None,
    local_only: bool = False,
    unreachable: str = "",
    pushing: bool = False,
) -> AdapterFileError:
    """What huggingface_hub's error means here, and the way out."""
    from huggingface_hub import errors

    repo, revision = short(repo_id), revision and short(revision)
    place = (f"{path} of {repo}" if path else repo) + (f" at revision {revision!r}" if revision else "")
    cause = error.__cause__ or error
    offline = isinstance(cause, errors.OfflineModeIsEnabled)
    if pushing and (offline or _no_answer(error)):
        reason, way_out = _why_offline(cause, local_only, unreachable)
        return AdapterFileError(f"nothing was pushed to {place}: {reason}. To push it, {way_out}")
    # First, as huggingface_hub counts an entry that is not in the cache among the missing ones.
    if isinstance(error, errors.LocalEntryNotFoundError) or offline:
        reason, way_out = _why_offline(cause, local_only, unreachable)
        return NotCachedError(
            f"{place} is not in the local cache, and {reason}. To get it, {way_out}; or pass a local "
            "directory."
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if pushing and status in (401, 403, 404):
        return AdapterFileError(
            f"nothing was pushed: the hub refuses {place} (status {status}). There is no token, or it is "
            "invalid, expired, or lacks the right to write. Log in with `hf auth login`, or set HF_TOKEN",
            Hint("token", Blank("..."), ", or pass {}"),
        )
    for name, meaning in _MEANINGS.items():
        if isinstance(error, getattr(errors, name)):
            kind = EntryMissingError if name == "EntryNotFoundError" else AdapterFileError
            return kind(meaning.format(repo=repo, revision=revision, place=place))
    if status in (401, 403):
        return AdapterFileError(
            f"the hub refuses {place} (status {status}): the token is invalid, expired, or lacks the right. "
            "Pass token=..., or log in with `hf auth login`."
        )
    by_status = f" (status {status})" if status else ""
    return AdapterFileError(
        f"the hub did not do what was asked of {place}{by_status}: {type(cause).__name__}: {cause}"
    )


def _no_answer(error: Exception) -> bool:
    """Whether the hub did not answer. Versions of huggingface_hub use requests, httpx or httpx2."""
    return any(cls.__name__ in ("ConnectionError", "TransportError") for cls in type(error).__mro__)


def _why_offline(error: BaseException, local_only: bool, unreachable: str) -> tuple[str, str]:
    """Why the hub was not reached, and the way out."""
    from huggingface_hub import constants

    if local_only:
        return "local_files_only=True was passed", "leave that out once, with a network"
    network = "check the connection, the proxy and HF_ENDPOINT"
    if unreachable:
        return unreachable, network
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1 is set", "unset it once, with a network"
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    return (
        f"the hub at {constants.ENDPOINT} did not answer ({type(root).__name__}: {root})",
        network,
    )
