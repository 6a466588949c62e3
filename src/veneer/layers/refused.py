"""Module types that Veneer knows but does not adapt."""

from __future__ import annotations

import functools

from torch import nn

#: Types that are not adapted, with the reason.
REFUSED: dict[str, str] = {
    **{
        f"bitsandbytes.nn.modules.Embedding{bits}bit": (
            "a quantised embedding looks its rows up in codes, and its library cannot save it; leave the "
            "embedding dense"
        )
        for bits in (4, 8)
    },
    **{
        f"torch.nn.modules.conv.ConvTranspose{n}d": (
            "a transposed convolution's update is not a convolution followed by a 1×1 one, which is what "
            "adapter files hold"
        )
        for n in (1, 2, 3)
    },
    "torch.nn.modules.linear.Bilinear": "its weight is a stack of matrices over two inputs, not one matrix",
    **{
        f"torch.nn.modules.rnn.{name}": (
            "its weights go into a fused recurrent kernel that calls no submodule: a branch beside them "
            "would never run"
        )
        for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
    },
    **{
        f"transformers.models.{name}": (
            "it gives scores and choices made of its product, to which a branch beside it cannot be added; "
            "name its weight in target_parameters"
        )
        for name in ("llama4.modeling_llama4.Llama4Router", "phimoe.modeling_phimoe.PhimoeTopKRouter")
    },
    "torch.nn.modules.sparse.EmbeddingBag": "it reduces over bags inside one kernel; use nn.Embedding",
}


#: Linear layers and convolutions of known models that are never called, although their weight is read: their
#: names, by the class that contains them.
READ: dict[str, tuple[str, ...]] = {
    # Mamba and similar models. A quantised `dt_proj` is called.
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer", "JambaMambaMixer"), ("conv1d", "dt_proj")),
    **dict.fromkeys(
        """
        BailingHybridDeltaAttention BambaMixer FalconH1Mixer Glm5NextTextLinearAttention
        GraniteMoeHybridMambaLayer InklingShortConvolution Inkling2ShortConvolution KimiLinearDeltaAttention
        Mamba2Mixer NemotronHMamba2Mixer OlmoHybridGatedDeltaNet Qwen3NextGatedDeltaNet Qwen3_5GatedDeltaNet
        Qwen3_5MoeGatedDeltaNet Qwen4ExpTextGatedDeltaNet ZambaMambaMixer Zamba2MambaMixer
        """.split(),
        ("conv1d",),
    ),
    **dict.fromkeys(("Lfm2ShortConv", "Lfm2MoeShortConv", "Lfm3ShortConv"), ("conv",)),
    # attention by one function of torch, or by a convolution
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    **dict.fromkeys(
        ("ConditionalDetrMHAttentionMap", "DetrMHAttentionMap", "MaskFormerDetrMHAttentionMap"), ("k_proj",)
    ),
    "DabDetrMHAttentionMap": ("k_linear",),
    "TDNNLayer": ("kernel",),
    # tables of positions, routers and heads
    **dict.fromkeys(
        ("LayoutLMv2Encoder", "LayoutLMv3Encoder"), ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")
    ),
    "PPDocLayoutV2ReadingOrderEncoder": ("rel_pos_bias",),
    "LongcatFlashTopkRouter": ("classifier",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
}


def reader(parent: nn.Module, name: str) -> str | None:
    """The class of a module, if it reads the weight of this child without ever calling it.

    Args:
        parent: The module.
        name: The child's name in it.
    """
    return next((cls.__name__ for cls in type(parent).__mro__ if name in READ.get(cls.__name__, ())), None)


def refusal(module: nn.Module) -> str | None:
    """Why a module of a known type is not adapted; None for all other types."""
    kind: type = type(module)
    return _refusal(kind)


@functools.lru_cache(maxsize=256)
def _refusal(kind: type) -> str | None:
    for base in kind.__mro__:
        reason = REFUSED.get(f"{base.__module__}.{base.__qualname__}")
        if reason is not None:
            return reason
    return None
