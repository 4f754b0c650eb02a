"""Where tensors live: a device's name -> a device that can be used."""

from __future__ import annotations

import torch

from bayesian_merger.errors import ConfigError, first_line


def device(name: str, where: str, *, float64: bool = False) -> torch.device:
    """The device called `name`; "auto" is CUDA, else Apple's MPS, else the CPU.

    `float64` asks for one that has numbers of 64 bits, which MPS has not. ConfigError, beginning with
    `where`, if there is no such device or torch was built without it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        use_mps = torch.backends.mps.is_available() and not float64
        return torch.device("mps" if use_mps else "cpu")
    try:
        found = torch.device(name)
        dtype = torch.float64 if float64 else torch.float32
        torch.empty(0, device=found, dtype=dtype).cpu()  # the device "meta" holds no numbers
    except (RuntimeError, AssertionError, TypeError) as error:
        # AssertionError by torch built without CUDA, TypeError by MPS for float64.
        raise ConfigError(f"{where}: {name!r} cannot be used ({first_line(error)})") from error
    return found


def free(where: torch.device) -> int | None:
    """Bytes that a GPU could still give; None where nobody tells."""
    if where.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    return torch.cuda.mem_get_info(where)[0] + unused
