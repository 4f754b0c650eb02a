"""Optuna's CMA-ES, whose state a study holds as a pickle: read here without running what is in it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

from optuna.samplers import CmaEsSampler
from optuna.trial import FrozenTrial

from bayesian_merger.errors import RunError

# All that such a state names, with NumPy 1 and 2.
_KNOWN = {
    ("cmaes._cma", "CMA"),
    ("cmaes._cmawm", "CMAwM"),
    ("cmaes._sepcma", "SepCMA"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
}


class _State(pickle.Unpickler):
    """Reads numbers, and what CMA-ES makes of them."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class Evolution(CmaEsSampler):  # type: ignore[misc]  # Optuna imports it lazily
    """CMA-ES that trusts no study: one may be shared, or come with a stranger's run folder."""

    def _restore_optimizer(self, completed_trials: Sequence[FrozenTrial]) -> Any:
        """Its state after the last trial that holds one; RunError for a pickle of anything else."""
        for trial in reversed(completed_trials):
            attrs = trial.system_attrs
            held = {k: attrs[k] for k in attrs if k.startswith(self._attr_key_optimizer)}
            if held:
                try:
                    text = self._concat_optimizer_attrs(held)
                    return _State(io.BytesIO(bytes.fromhex(text))).load()
                except Exception as error:  # a pickle that is none may raise anything
                    raise RunError(
                        f"trial {trial.number} of the study holds no state of CMA-ES ({error}); it is "
                        f"damaged, or made to do harm: choose another --run-dir"
                    ) from error
        return None
