"""A plug-in of vLLM: its server answers as any adapter of a directory, named by the request.

vLLM finds `register` by its entry point. It then asks the resolver for every name that it does not know yet::

    VENEER_VLLM_ADAPTERS=runs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from ..atomic import locked
from ..base_files import BaseFiles
from ..errors import AdapterFileError, CheckpointError, ConfigError, VeneerError
from ..files.layout import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME
from ..files.overwrite import check_writable
from .export import export_adapter

#: Variables of the environment: the directory that holds the adapters, and the one for their exports.
ADAPTERS, CACHE = "VENEER_VLLM_ADAPTERS", "VENEER_VLLM_CACHE"
#: vLLM asks resolvers only where this is set.
ASKED = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
#: A name that cannot lead out of the directory; hidden ones are those of saves that are not finished.
_NAME = re.compile(r"[^./\\\0][^/\\\0]*")
# Only loggers below vLLM's are shown in its log.
_LOG = logging.getLogger("vllm.veneer")


class AdapterResolver(LoRAResolver):
    """Finds adapters by their names, exports and verifies each once, and keeps the result.

    Args:
        adapters: Directory with a directory for each adapter.
        cache: Directory for the exports, which several servers may share.
    """

    def __init__(self, adapters: Path, cache: Path) -> None:
        self.adapters, self.cache = adapters, cache

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Where vLLM finds the adapter of a name; None for a name that the directory does not have.

        Raises:
            VeneerError: The adapter cannot be served. Such an error is what vLLM answers the request with.
        """
        adapter = self.adapters / lora_name
        if not _NAME.fullmatch(lora_name) or not os.path.isfile(adapter / CONFIG_NAME):
            return None
        try:
            place = await asyncio.to_thread(self._exported, adapter, base_model_name)
        except VeneerError as error:
            _LOG.warning("The adapter %s is not served: %s", lora_name, error)
            raise
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(place))  # vLLM numbers it anew

    def _exported(self, adapter: Path, base: str) -> Path:
        """The export of the files that the adapter has now, for this base."""
        key = _digest(adapter, base)
        place = self.cache / key
        with locked(self.cache):
            if not place.is_dir():
                report = export_adapter(adapter, place, "vllm", base=_weights(base))
                for line in (*report.folded, *report.left_out, *report.notes):
                    _LOG.info("The adapter %s: %s", adapter.name, line)
                if _digest(adapter, base) != key:
                    shutil.rmtree(place)
                    raise AdapterFileError(f"{adapter} was saved anew meanwhile; ask again")
        return place


def _digest(adapter: Path, base: str) -> str:
    """A digest of all that an export depends on."""
    sha = hashlib.sha256(f"{version('veneer')}\0{base}".encode())
    for file in (adapter / name for name in (CONFIG_NAME, SAFETENSORS_NAME, BIN_NAME)):
        sha.update(b"\0")
        if file.is_file():
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    sha.update(block)
    return sha.hexdigest()


def _weights(base: str) -> Path | None:
    """The directory of vLLM's base, if its weights can be compared with those that an adapter was made on."""
    from huggingface_hub import try_to_load_from_cache

    place = Path(base)
    if not place.is_dir():
        found = try_to_load_from_cache(base, "config.json")
        place = Path(found).parent if isinstance(found, str) else place
    try:
        BaseFiles(place)
    except CheckpointError as error:
        _LOG.warning("Adapters are not compared with the base: %s", error)
        return None
    return place


def register() -> None:
    """Register the resolver if a directory of adapters is named. vLLM calls this in each of its processes.

    Raises:
        ConfigError: It is no directory.
        VeneerError: The cache cannot be written to.
    """
    named = os.environ.get(ADAPTERS)
    if not named:
        return
    adapters = Path(named).expanduser().resolve()
    if not adapters.is_dir():
        raise ConfigError(f"{ADAPTERS} names {adapters}, which is no directory")
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = Path(os.environ.get(CACHE) or f"{caches}/veneer/vllm").expanduser().resolve()
    check_writable(cache)
    cache.mkdir(parents=True, exist_ok=True)
    if os.environ.get(ASKED, "0").strip().lower() not in ("1", "true"):
        _LOG.warning("%s is set, but vLLM looks for adapters only with %s=1", ADAPTERS, ASKED)
    LoRAResolverRegistry.register_resolver("veneer", AdapterResolver(adapters, cache))
