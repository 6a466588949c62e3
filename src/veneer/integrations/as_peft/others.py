"""Names of methods that Veneer does not have: they can be imported and tested against, but not used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from ...errors import VeneerError


class OtherMethod:
    """Base of the stand-ins for classes and functions of other methods than LoRA."""

    adapter_layer_names: tuple[str, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to be used.

        Raises:
            VeneerError: Always, naming what was used.
        """
        raise VeneerError(
            f"{cls.__name__} belongs to a method or option that Veneer, a LoRA library, does not have. "
            "Veneer stands in for peft in this process: use LoraConfig, or run the program with the real "
            "peft (without register_as_peft, `python -m veneer.as_peft` or VENEER_AS_PEFT=1)."
        )


def inside(name: str) -> Callable[..., NoReturn]:
    """The stand-in for an internal function of peft."""

    def function(*args: Any, **kwargs: Any) -> NoReturn:
        raise VeneerError(
            f"{name} is internal to peft, and Veneer, which stands in for peft, does not have it: call the "
            "public functions instead (get_peft_model, PeftModel.from_pretrained, set_peft_model_state_dict)"
        )

    function.__name__ = name
    return function


@functools.cache
def stub(name: str) -> type[OtherMethod]:
    return type(name, (OtherMethod,), {"__module__": "peft", "__doc__": f"Stand-in for peft's {name}."})
