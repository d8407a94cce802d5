"""Detects whether a device computes in bfloat16 natively."""

from __future__ import annotations

from pathlib import Path

import torch

#: Instruction sets for bfloat16, as `torch.cpu.get_capabilities` and Linux's /proc/cpuinfo name them.
_BF16_INSTRUCTIONS = {"amx_bf16", "avx512_bf16", "bf16", "sve_bf16", "svebf16"}


def training_device_type(use_cpu: bool = False) -> str:
    """Returns the type of the device that the Trainer uses, such as "cuda" or "cpu"."""
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def native_bf16(device_type: str) -> tuple[bool, str]:
    """Tells whether a device computes in bfloat16 natively.

    Emulated bfloat16 is slower than float32: about 6 times on a CPU with AVX2 only.

    Args:
        device_type (`str`): Type of a `torch.device`.

    Returns:
        `tuple[bool, str]`: the answer, and the reason as the end of a sentence for a log line.
    """
    if device_type == "cuda":
        name = torch.cuda.get_device_name()
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return native, f"{name} {'has' if native else 'lacks'} native bfloat16"
    if device_type != "cpu":
        return False, f"bfloat16 is chosen automatically on CUDA and CPU devices only, not on {device_type!r}"
    instructions = sorted(_cpu_instructions() & _BF16_INSTRUCTIONS)
    if instructions:
        return True, f"the CPU has native bfloat16 ({', '.join(instructions)})"
    return False, "the CPU lacks native bfloat16"


def _cpu_instructions() -> set[str]:
    """Returns the names of the CPU's instruction sets."""
    # Older versions of torch lack this function.
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split()}
