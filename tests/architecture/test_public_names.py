"""The public names: the field's are there, each resolves, and nothing else is promised."""

from __future__ import annotations

import importlib
import inspect

import pytest

import veneer
from tests.processes import run_python

FIELD = """
LoraConfig PeftConfig PeftModel PeftType TaskType LoftQConfig LoraRuntimeConfig
get_peft_config get_peft_model inject_adapter_in_model LoraModel
PeftModelForCausalLM PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification
PeftModelForQuestionAnswering PeftModelForFeatureExtraction
AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification
AutoPeftModelForTokenClassification AutoPeftModelForQuestionAnswering AutoPeftModelForFeatureExtraction
get_peft_model_state_dict set_peft_model_state_dict load_peft_weights
PEFT_TYPE_TO_CONFIG_MAPPING
""".split()


def test_the_fields_names_are_public() -> None:
    assert [name for name in FIELD if name not in veneer.__all__] == []


def test_every_public_name_resolves_in_a_fresh_process_in_any_order() -> None:
    run_python(
        f"import veneer\nfor name in {sorted(veneer.__all__, reverse=True)!r}:\n    getattr(veneer, name)"
    )


def test_all_has_no_doubles_and_dir_shows_it() -> None:
    assert len(veneer.__all__) == len(set(veneer.__all__))
    assert set(veneer.__all__) <= set(dir(veneer))


#: The modules whose ``__all__`` users import from.
PUBLIC_MODULES = """
veneer veneer.calibration veneer.integrations.export veneer.optimizers veneer.tools veneer.training
""".split()


def undocumented(thing: object, name: str) -> list[str]:
    """The name, and the public methods of its class, that have no docstring of their own or of a base."""
    if not inspect.isclass(thing):
        return [name] if callable(thing) and not inspect.getdoc(thing) else []
    own = {n: m for n, m in vars(thing).items() if not n.startswith("_")}
    methods = [n for n, m in own.items() if inspect.isroutine(m) or isinstance(m, property)]
    found = [f"{name}.{n}" for n in methods if not inspect.getdoc(getattr(thing, n))]
    return found if thing.__doc__ else [name, *found]


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_public_names_are_documented(module: str) -> None:
    public = importlib.import_module(module)
    assert [x for name in public.__all__ for x in undocumented(getattr(public, name), name)] == []


def test_a_missing_docstring_is_found() -> None:
    class Documented:
        """Yes."""

        def method(self) -> None:
            pass

    class Override(Documented):
        """The docstring of a method that is overridden counts."""

    Documented.method.__doc__ = None
    assert undocumented(Documented, "D") == ["D.method"]
    assert undocumented(lambda: 0, "f") == ["f"]
    assert undocumented(Override, "O") == []


def test_every_error_is_caught_by_a_public_name() -> None:
    own = [thing for thing in vars(veneer.errors).values() if isinstance(thing, type)]
    errors = [thing for thing in own if issubclass(thing, BaseException)]
    assert len(errors) > 10
    assert [e for e in errors if not issubclass(e, veneer.VeneerError | veneer.VeneerWarning)] == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchName"):
        veneer.NoSuchName  # noqa: B018


@pytest.mark.parametrize(
    "name",
    """ArrowConfig create_arrow_model BdLoraConfig KasaConfig MontecloraConfig VeloraConfig convert_to_lora
    save_as_lora find_kappa_target_modules""".split(),
)
def test_a_name_that_is_refused_says_why_and_what_to_use(name: str) -> None:
    assert not hasattr(veneer, name)
    with pytest.raises(AttributeError, match=f"{name}.*Veneer does not have .*: "):
        getattr(veneer, name)


def test_star_import_gives_exactly_the_public_names() -> None:
    given: dict[str, object] = {}
    exec("from veneer import *", given)
    assert sorted(given.keys() - {"__builtins__"}) == sorted(veneer.__all__)
