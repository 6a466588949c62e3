"""The Triton step: its laws in Triton's interpreter, its kernels through the real compiler, and on a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from tests.processes import run_python
from tests.unit.ops.cases import NAMES, SCALING, assert_same, exact, gradients, tensors
from veneer.ops import triton_kernels, triton_lora
from veneer.ops.gpu import SWITCH, triton_step
from veneer.ops.lora_linear import lora_linear, lora_linear_reference
from veneer.ops.triton_lora import Dropout

ROOT = Path(__file__).parents[3]
LAWS = Path(__file__).with_name("triton_laws.py")
#: Compute capability, its shared memory for one block in bytes, and the tiling that it gets.
GPUS = {
    "A100": (80, 166_912, triton_lora.LARGE),
    "RTX 4090": (89, 101_376, triton_lora.SMALL),
    "H100": (90, 232_448, triton_lora.LARGE),
}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def run_laws(interpret: str | None, which: str) -> str:
    """Run those of `triton_laws` with these marks in a process of its own, and return what pytest said."""
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", which)
    return run_python(code, *options, LAWS, env={"TRITON_INTERPRET": interpret}, cwd=ROOT).stdout


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_laws_hold_in_the_interpreter(which: str) -> None:
    assert re.search(r"^\d\d+ passed", run_laws("1", which), re.M)


@pytest.mark.gpu
def test_the_laws_hold_on_a_gpu() -> None:
    assert re.search(r"^\d\d+ passed", run_laws(None, ""), re.M)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_lora_linear_takes_it_on_a_gpu(dtype: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    given = {
        name: t.detach().cuda().requires_grad_()  # type: ignore[union-attr]
        for name, t in tensors((4, 1024, 1024), out=1056, r=16, dtype=dtype).items()
    }
    assert triton_step(*(given[name] for name in NAMES)) is triton_lora.TritonLora  # type: ignore[arg-type]
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,), device="cuda")
    mask = Dropout.of(seed, p).mask(4096, 1024).view(4, 1024, 1024) if p else None
    torch.manual_seed(5)
    y = lora_linear(*(given[name] for name in NAMES), SCALING, p)  # type: ignore[arg-type]
    expected = exact(given)  # type: ignore[arg-type]
    reference = lora_linear_reference(*(expected[name] for name in NAMES), SCALING, p, mask)  # type: ignore[arg-type]
    assert_same({"y": y}, {"y": reference}, dtype)
    assert_same(gradients(y, given), gradients(reference, expected), dtype)  # type: ignore[arg-type]


class Compiled:
    """Stands in for a kernel: compiles what it is launched with, for a GPU that need not be there."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability, self.results = kernel, capability, list[CompiledKernel]()

    def __getitem__(self, grid: tuple[int, ...]) -> Compiled:
        return self

    def __call__(self, *given: Any, **options: Any) -> None:
        names = self.kernel.arg_names
        blocks = {name: options.pop(name) for name in names if name in options}
        values = dict(zip(names, given, strict=False)) | blocks
        # As a launch does: no pointer, and a stride of one, are known when the kernel is compiled.
        constants = {
            n: v for n, v in values.items() if n in blocks or v is None or (type(v) is int and v == 1)
        }
        signature = {name: "constexpr" if name in constants else self.type(v) for name, v in values.items()}
        aligned = {
            (number,): [["tt.divisibility", 16]]
            for number, (name, v) in enumerate(values.items())
            if name not in constants and (isinstance(v, Tensor) or (type(v) is int and v % 16 == 0))
        }
        at = {(names.index(name),): v for name, v in constants.items()}
        source = ASTSource(self.kernel, signature, at, aligned)
        target = GPUTarget("cuda", self.capability, 32)
        self.results.append(triton.compile(source, target=target, options=options))

    @staticmethod
    def type(value: Any) -> str:
        if isinstance(value, Tensor):
            return TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


@pytest.mark.parametrize(("gpu", "r"), [("A100", 256), ("RTX 4090", 256), ("H100", 16), ("H100", 256)])
def test_the_kernels_compile_within_a_gpus_shared_memory(
    gpu: str, r: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    capability, shared, tiles = GPUS[gpu]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_lora, "tiling", lambda device: tiles)
    names = ("product", "projection", "correlation", "mask")
    kernels = {name: Compiled(getattr(triton_kernels, name), capability) for name in names}
    for name, kernel in kernels.items():
        monkeypatch.setattr(triton_kernels, name, kernel)
    given = tensors((64, 4096), out=4096, r=r, dtype=torch.bfloat16)
    y = triton_lora.TritonLora.apply(*(given[name] for name in NAMES), SCALING, 0.05)  # type: ignore[no-untyped-call]
    gradients(y, given)
    Dropout.of(torch.tensor([1]), 0.05).mask(64, 4096)
    assert {name: len(kernel.results) for name, kernel in kernels.items()} == {
        **dict.fromkeys(names, 1),
        "product": 2,
    }
    for kernel in kernels.values():
        for result in kernel.results:
            assert result.metadata.shared <= shared
    instruction = "wgmma" if capability >= 90 else "mma.sync"
    assert all(instruction in result.asm["ptx"] for result in kernels["product"].results)


def test_the_tiling_of_a_cpu_is_the_small_one() -> None:
    assert triton_lora.tiling(torch.device("cpu")) == triton_lora.SMALL
