"""Where tensors live: a device's name -> a device that can be used."""

from __future__ import annotations

import torch

from bayesian_merger.errors import ConfigError, first_line


def device(name: str, where: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, else Apple's MPS, else the CPU.

    ConfigError, beginning with `where`, if there is no such device or torch was built without it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(0, device=found).cpu()  # the device "meta" holds no numbers
    except (RuntimeError, AssertionError) as error:  # the latter by torch built without CUDA
        raise ConfigError(f"{where}: {name!r} cannot be used ({first_line(error)})") from error
    return found
