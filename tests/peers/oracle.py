"""What sd-meh and sd-mecha make of given tensors; run by their own Python, as told by test_peers.py.

    python oracle.py INPUTS.safetensors CALLS.json RESULTS.safetensors

CALLS has {name: {"peer", "method", "inputs": names of tensors, "weights", "dtype"}}, and the results
have those names.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import sd_mecha
import sd_meh.merge_methods
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def of_sd_meh(method: str, tensors: list[Tensor], weights: dict[str, Any]) -> Tensor:
    function = getattr(sd_meh.merge_methods, method)
    result: Tensor = function(**dict(zip("abc", tensors, strict=False)), **weights)
    return result


def of_sd_mecha(method: str, tensors: list[Tensor], weights: dict[str, Any]) -> Tensor:
    theirs = sd_mecha.extensions.merge_methods.resolve(method)
    parameters = theirs.get_signature().parameters
    given = {
        name: torch.tensor(value)
        if parameters[name].annotation.data.interface is Tensor
        else value
        for name, value in weights.items()
    }
    first = next(iter(parameters.values())).annotation.data.interface
    if inspect.isclass(first):
        arguments: list[Any] = tensors
    else:  # StateDict[Tensor]
        arguments = [{"tensor": tensor} for tensor in tensors]
        given["key"] = "tensor"
    result: Tensor = theirs.__wrapped__(*arguments, **given)
    return result


def main(inputs: Path, calls: Path, results: Path) -> None:
    known = load_file(inputs)
    made = {}
    for name, call in json.loads(calls.read_text()).items():
        merge = {"sd-meh": of_sd_meh, "sd-mecha": of_sd_mecha}[call["peer"]]
        dtype = getattr(torch, call["dtype"])
        # Copies, since some of their methods write into them.
        tensors = [known[name].to(dtype, copy=True) for name in call["inputs"]]
        made[name] = merge(call["method"], tensors, call["weights"]).clone().contiguous()
    save_file(made, results)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
