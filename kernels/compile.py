"""Compiles recorded launches for a GPU that need not be there.

Not in a process that has TRITON_INTERPRET set: kernels are then no compiler's input.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_apt.kernels.launch import Launch, interpreted, triton

SHARED_LIMIT = 227 * 1024  # bytes a block may have on Hopper
_REGISTERS = 65536  # of a multiprocessor
_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on the chip."""

    kernel: str
    types: str  # of its floating-point tensors
    registers: int  # of a thread
    spilled: int  # bytes of a thread in local memory
    shared: int  # bytes of a block
    warps: int
    matrix: str  # instruction of its matrix products: "wgmma", "mma" or ""

    @property
    def blocks(self) -> int:
        """How many fit on a multiprocessor at once: by registers, memory and threads."""
        by_registers = _REGISTERS // (max(-(-self.registers // 8) * 8, 8) * 32 * self.warps)
        return min(by_registers, SHARED_LIMIT // max(self.shared, 1), 2048 // (32 * self.warps), 32)

    def problems(self) -> list[str]:
        found = []
        if self.spilled:
            found.append(f"{self.kernel} ({self.types}) spills {self.spilled} bytes a thread")
        if self.shared > SHARED_LIMIT:
            found.append(
                f"{self.kernel} ({self.types}) takes {self.shared} bytes of shared memory, {SHARED_LIMIT} "
                "are there"
            )
        return found

    def row(self) -> dict[str, object]:
        return asdict(self) | {"blocks": self.blocks}


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, object], dict[tuple[int, ...], list]]:
    """Types, constants and divisibility by 16 of a kernel's parameters, as Triton's own
    launcher would specialise them.
    """
    names = [name for name in launch.kernel.arg_names if name not in launch.constants]
    types: dict[str, str] = {}
    constants, attributes = dict(launch.constants), {}
    for name, value in zip(names, launch.arguments, strict=True):
        place = (launch.kernel.arg_names.index(name),)
        if isinstance(value, Tensor):
            types[name] = "*" + _NAMES[value.dtype]
            attributes[place] = [["tt.divisibility", 16]]
        elif value is None or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
            if value % 16 == 0:
                attributes[place] = [["tt.divisibility", 16]]
    return types | dict.fromkeys(launch.constants, "constexpr"), constants, attributes


def compiled(launch: Launch, capability: int = 90) -> Resources:
    """Compiles one launch.

    Raises:
        RuntimeError: in a process that interprets kernels.
    """
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process; unset it")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = _signature(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = binary.asm["ptx"]
    used = _usage(binary.asm["cubin"])
    floats = [_NAMES[a.dtype] for a in launch.arguments if isinstance(a, Tensor) and a.is_floating_point()]
    return Resources(
        kernel=f"{launch.kernel.fn.__module__.rpartition('.')[2]}.{launch.kernel.fn.__name__.lstrip('_')}",
        types=" ".join(dict.fromkeys(floats)),
        registers=used["REG"],
        spilled=used["LOCAL"] + used["STACK"],
        shared=binary.metadata.shared,
        warps=launch.num_warps,
        matrix="wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "",
    )


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One launch of each kernel and set of types and constants."""
    found = {}
    for launch in launches:
        types, constants, attributes = _signature(launch)
        found.setdefault(
            (launch.kernel, str(types), str(constants), str(attributes), launch.num_warps, launch.num_stages),
            launch,
        )
    return list(found.values())
