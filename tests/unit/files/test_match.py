from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import LoadMismatchError
from veneer.files.match import match

ROOT = "base_model.model."


def table(
    layers: int = 4,
    modules: tuple[str, ...] = ("self_attn.q_proj", "mlp.up_proj"),
    r: int = 8,
    width: int = 64,
    stem: str = "base_model.model.model.layers",
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an adapter on a decoder."""
    return {
        f"{stem}.{i}.{m}.lora_{x}.weight": (r, width) if x == "A" else (width, r)
        for i in range(layers)
        for m in modules
        for x in "AB"
    }


MODEL = table()


def test_what_fits() -> None:
    report = match(MODEL, MODEL)
    assert report.ok and report.renamed == {k: k for k in MODEL}
    assert report.notice is None and report.prefix is None
    report.raise_for("dir")


def test_shapes_may_be_lists() -> None:
    assert match({k: list(v) for k, v in MODEL.items()}, MODEL).ok


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda k: k.removeprefix(ROOT), "'base_model.model.' was put before"),
        (lambda k: k.removeprefix(ROOT + "model."), "'base_model.model.model.' was put before"),
        (lambda k: "module." + k, "'module.' was taken from the front"),
        (lambda k: k.replace(ROOT, ROOT + "language_model."), "was read as 'base_model.model.'"),
        (lambda k: k.replace("model.layers", "transformer.h"), "transformer.h.' at the front"),
        (lambda k: k.replace(ROOT, "unet."), "'unet.' at the front"),
        (lambda k: k.replace(ROOT, ROOT + "_orig_mod."), "segments of wrappers"),
        (lambda k: k.replace("self_attn", "self_attn._checkpoint_wrapped_module"), "segments of wrappers"),
        (lambda k: k.replace(".weight", ".default.weight"), "name 'default' was taken out"),
        (lambda k: "_orig_mod." + k.replace(".weight", ".my_name.weight"), "name 'my_name' was taken out"),
        (lambda k: k.removeprefix(ROOT).replace(".weight", ".x.weight"), "name 'x' was taken out"),
    ],
)
def test_keys_that_differ_in_one_unambiguous_way(rename: Callable[[str], str], said: str) -> None:
    report = match(MODEL, {rename(k): v for k, v in MODEL.items()})
    assert report.ok, report.message("dir")
    assert report.renamed == {rename(k): k for k in MODEL}
    assert said in (report.notice or "")


def test_parts_below_different_roots() -> None:
    """A head keeps its name where the layers' prefix differs."""
    head = {"base_model.model.score.weight": (2, 64)}
    report = match(table(stem="base_model.model.transformer.layers") | head, MODEL | head)
    assert report.ok and report.prefix == ("base_model.model.model.", "base_model.model.transformer.")


def test_a_vision_language_model_around_the_same_decoder() -> None:
    nested = table(stem="base_model.model.model.language_model.layers")
    assert match(nested, MODEL).ok and match(MODEL, nested).ok


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("base_model.model.encoder.block", "base_model.model.decoder.block"),
        ("base_model.model.text_model.encoder.layers", "base_model.model.vision_model.encoder.layers"),
        ("text_encoder_2.layers", "text_encoder.layers"),
    ],
)
def test_one_part_of_a_model_is_never_read_as_another(model: str, file: str) -> None:
    report = match(table(stem=model), table(stem=file))
    assert not report.renamed and report.notice is None and not report.ok


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("m.layers.1.q_proj.lora_A.weight", "m.layers.0.q_proj.lora_A.weight"),
        ("m.layers.0.v_proj.lora_A.weight", "m.layers.0.q_proj.lora_A.weight"),
        ("m.layers.0.cross_attn.q_proj.lora_A.weight", "m.layers.0.self_attn.q_proj.lora_A.weight"),
        ("m.layers.0.q_proj.lora_A.weight", "m.layers.0.q_proj.lora_B.weight"),
    ],
)
def test_one_layer_is_never_read_as_another(model: str, file: str) -> None:
    assert match({model: (8, 8)}, {file: (8, 8)}).renamed == {}


def test_two_equally_good_prefixes_are_an_error_that_names_both() -> None:
    model = table(stem="base_model.model.encoder.layers") | table(stem="base_model.model.decoder.layers")
    report = match(model, table(stem="layers"))
    assert not report.renamed and len(report.ambiguous) == 2
    message = report.message("dir")
    assert "'base_model.model.encoder.'" in message and "'base_model.model.decoder.'" in message


def test_shapes_decide_between_two_prefixes() -> None:
    model = table(stem="encoder.layers", width=32) | table(stem="decoder.layers")
    report = match(model, table(stem="layers"))
    assert report.prefix == ("", "decoder.") and len(report.missing) == len(MODEL)


def test_a_few_accidental_hits_are_no_prefix() -> None:
    file = {f"other.{i}.fc.lora_A.weight": (1, 1) for i in range(9)} | {
        "x.layers.0.self_attn.q_proj.lora_A.weight": (8, 64)
    }
    report = match(MODEL, file)
    assert report.prefix is None and not report.renamed


def test_optional_keys_may_be_missing_and_may_be_there() -> None:
    embedding = {"base_model.model.model.embed_tokens.base_layer.weight": (100, 64)}
    assert match(MODEL | embedding, MODEL, optional=embedding).ok
    assert match(MODEL | embedding, MODEL | embedding, optional=embedding).ok
    assert match(MODEL | embedding, MODEL).missing == tuple(embedding)


def test_everything_is_counted_once() -> None:
    file = dict(MODEL)
    lost = [file.popitem()[0] for _ in range(2)]
    first = next(iter(file))
    file[first] = (9, 64)
    file["stranger.lora_A.weight"] = (1, 1)
    report = match(MODEL, file)
    assert set(report.missing) == set(lost)
    assert report.unexpected == ("stranger.lora_A.weight",)
    assert report.mismatched == ((first, (8, 64), (9, 64)),)
    assert len(report.renamed) + len(report.mismatched) + len(report.unexpected) == len(file)
    assert len(report.renamed) + len(report.mismatched) + len(report.missing) == len(MODEL)


def test_the_message_counts_shows_three_examples_and_a_way_out() -> None:
    report = match(MODEL, table(layers=6))
    with pytest.raises(LoadMismatchError) as caught:
        report.raise_for("some/dir")
    message = str(caught.value)
    said = report.message("some/dir")  # what a call without that flag warns with
    assert message == said.removesuffix(".") + "; strict=False loads what fits." and "strict" not in said
    assert message.startswith(
        "the adapter in some/dir and this model do not fit: "
        "24 tensors in the file, 16 expected by the model, 16 usable\n"
        "  8 in the file, but nothing in the model takes them:\n"
        "      base_model.model.model.layers.4.self_attn.q_proj.lora_A.weight\n"
    )
    assert "and 5 more" in message and message.count("layers.4") == 3 and "strict=False" in message


def causes(report_message: str) -> list[str]:
    return [line for line in report_message.splitlines() if line.startswith("Likely cause:")]


VOCABULARY = {
    "m.embed_tokens.lora_embedding_A": lambda n: (8, n),
    "m.embed_tokens.lora_embedding_B": lambda n: (64, 8),
    "m.embed_tokens.base_layer.weight": lambda n: (n, 64),
    "m.lm_head.lora_A.weight": lambda n: (8, 64),
    "m.lm_head.lora_B.weight": lambda n: (n, 8),
}
DORA = {k.replace("lora_A.weight", "lora_magnitude_vector"): (64,) for k in MODEL if "lora_A" in k}
TOKENS = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (3, 64)}
BIASES = {k.replace("lora_A.weight", "base_layer.bias"): (64,) for k in MODEL if "lora_A" in k}
LORA_BIAS = {k.replace("A.weight", "B.bias"): (64,) for k in MODEL if "lora_A" in k}
SPELLED = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): shape for k, shape in MODEL.items()}


@pytest.mark.parametrize(
    ("model", "file", "cause"),
    [
        (
            MODEL,
            table(layers=6),
            "the file has layers 0-5 of 'base_model.model.model.layers', the model has 0-3",
        ),
        (
            table(layers=6),
            MODEL,
            "the file has layers 0-3 of 'base_model.model.model.layers', the model has 0-5",
        ),
        (table(6), table(4, stem="transformer.layers"), "the file has layers 0-3 of"),
        (
            MODEL,
            table(r=16),
            "r=16 in the file where the configuration gives r=8: adapter_config.json does not",
        ),
        (MODEL, table(width=128), "widths differ (128 in the file, 64 in the model)"),
        (
            {k: s(100) for k, s in VOCABULARY.items()},
            {k: s(103) for k, s in VOCABULARY.items()},
            "103 entries in the file and 100 in the model: model.resize_token_embeddings(103)",
        ),
        (
            MODEL,
            MODEL | DORA,
            "the file has magnitude vectors of DoRA, but the configuration has no use_dora",
        ),
        (MODEL | DORA, MODEL, "the configuration has use_dora, but the file has no magnitude vectors"),
        (MODEL, MODEL | TOKENS, "the file has trained tokens"),
        (MODEL, MODEL | BIASES, "the file has biases of the base model"),
        (MODEL | LORA_BIAS, MODEL, "the configuration has lora_bias, but"),
        (MODEL, dict(list(MODEL.items())[:4]) | SPELLED, "16 keys are spelled as in diffusers' older files"),
        (
            table(modules=("self_attn.q_proj",)),
            table(modules=("self_attn.k_proj",)),
            "no key of the file occurs",
        ),
        (MODEL, {"model.embed.weight": (3, 3)}, "the file is not a LoRA adapter"),
    ],
)
def test_likely_causes(
    model: dict[str, tuple[int, ...]], file: dict[str, tuple[int, ...]], cause: str
) -> None:
    found = causes(match(model, file).message("dir"))
    assert cause in found[0], found
    assert len(found) <= 2


def test_an_empty_file_has_everything_missing() -> None:
    report = match(MODEL, {})
    assert len(report.missing) == len(MODEL) and "0 tensors in the file" in report.message("dir")


SEGMENT = st.sampled_from(
    ["a", "b", "model", "layers", "0", "1", "encoder", "decoder", "q", "lora_A", "_orig_mod"]
)
KEYS = st.lists(
    st.lists(SEGMENT, min_size=1, max_size=5).map(lambda p: ".".join([*p, "q", "lora_A", "weight"])),
    max_size=6,
    unique=True,
)


@given(KEYS, KEYS)
def test_whatever_the_keys_the_account_is_complete(model: list[str], file: list[str]) -> None:
    report = match({k: (1,) for k in model}, {k: (1,) for k in file})
    assert set(report.renamed) | set(report.unexpected) == set(file)
    assert set(report.renamed.values()) | set(report.missing) == set(model)
    assert len(set(report.renamed.values())) == len(report.renamed)
    assert not set(report.renamed) & set(report.unexpected)
    assert {k for k in file if k in model} <= {k for k, e in report.renamed.items() if k == e}
    assert report.message("dir")


@given(KEYS, st.lists(SEGMENT, max_size=3))
def test_a_prefix_in_front_of_everything_is_found_or_ambiguous(model: list[str], prefix: list[str]) -> None:
    shapes = {k: (i, 1) for i, k in enumerate(model)}
    file = {".".join([*prefix, k]): v for k, v in shapes.items()}
    report = match(shapes, file)
    if (
        not any(part.isdigit() for part in prefix)
        and not set(file) & set(model)
        and "_orig_mod" not in str(file)
    ):
        assert report.ok or report.ambiguous, report.message("dir")


def test_a_large_model_is_matched_quickly() -> None:
    experts = table(
        24, tuple(f"experts.{i}.{m}" for i in range(64) for m in ("gate_proj", "up_proj", "down_proj"))
    )
    report = match(experts, {k.removeprefix(ROOT): v for k, v in experts.items()})
    assert report.ok and len(report.renamed) == 24 * 64 * 6
