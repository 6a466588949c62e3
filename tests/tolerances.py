"""The only place with atol and rtol, each with its reason, beside those by dtype in `veneer.testing`.

`rtol` is in units of the value, `atol` in units of the typical magnitude of the tensors compared (about 1
in these tests). Choose by the dtype in which the *coarser* of the two sides computes.
"""

from __future__ import annotations

from veneer.testing.tolerances import BY_DTYPE, Tolerance, assert_close

__all__ = ["BY_DTYPE", "Tolerance", "assert_close"]

#: Losses of ten training steps from the same factors and data, two implementations of the same step.
TRAINING = Tolerance(1e-4, 1e-5, "fp32 rounding differs per step and is carried on by the optimiser")
TRAINING_BF16 = Tolerance(
    2e-2, 2e-2, "the branch's intermediates are rounded to 8 bits in one of the two; logits are bf16 in both"
)


#: Singular values, norms and truncation errors from two factorisations (QR then a small SVD; a dense SVD).
OPS_SPECTRUM = Tolerance(
    1e-4, 2e-5, "fp32 factors: backward-stable, errors of some eps times the largest value"
)

#: The share of an update that a merge kept: in fp32 from chunks, and in fp64 from dense matrices.
OPS_KEPT = Tolerance(0.0, 1e-4, "norms of rounding errors of 2**-9, themselves known to about 2**-15 of that")

#: Outputs of quantised bases against the same sums over the dense weight that is read from them.
STORED: dict[str, Tolerance] = {
    "bitsandbytes-8bit": Tolerance(
        2e-2, 2e-2, "in evaluation its kernel rounds each row of the input to 8 bits, and biases to 16"
    ),
    "torchao": Tolerance(2e-2, 1e-2, "bf16 outputs: scaled after the product, not before it"),
}

#: Relative error of the outputs (2-norm) once a weight with the update in it is quantised again.
REQUANTISED: dict[str, Tolerance] = {
    "bitsandbytes-4bit": Tolerance(
        0.25, 0.0, "steps of nf4 in the middle of a block: 8 to 10 % of its scale"
    ),
    "bitsandbytes-8bit": Tolerance(
        0.03, 0.0, "steps of 1/127 of a row's largest weight; inputs in 8 bits too"
    ),
    "torchao": Tolerance(0.03, 0.0, "steps of 1/127 of a row's largest weight"),
}

#: A weight put together again from its decomposition by a covariance, relative to its norm.
CONTEXT = Tolerance(0.0, 1e-3, "fp32, with the inverse of a covariance whose condition is some 1e3")

#: Losses and factors of an adapter in a family, and alone: products of other sizes sum in another order.
FAMILY = Tolerance(1e-4, 1e-6, "fp32 rounding of larger products, carried on by the optimizer")

#: Principal angles in degrees, from float64 factors and from a dense product that was rounded to float32.
ANGLES = Tolerance(0.0, 1e-3, "a rounding of eps turns weak directions by eps times what they are weaker")

#: ΔW of an expert, in fp64 from the same fp32 factors in two layouts; with one more rounding of B.
EXPERTS_DELTA = Tolerance(1e-14, 1e-14, "fp64: sums of a few products, in another order")
EXPERTS_ROUNDED = Tolerance(2e-7, 2e-7, "one rounding of B to fp32, eps 1.2e-7")
