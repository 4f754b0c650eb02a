"""Optuna's proxy: a process that many machines ask by gRPC, and that alone asks the database."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import grpc
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import GrpcStorageProxy
from optuna.storages._grpc.auto_generated.api_pb2_grpc import StorageServiceStub
from optuna.storages._grpc.client import GrpcClientCache

from bayesian_merger.errors import one_line
from bayesian_merger.study.patience import ASKED, Patient

PORT = 13000
_CONNECT_S, _ANSWER_S = 10.0, 60.0
# It connects anew as often as it is asked, and a line that is dead is noticed.
_CHANNEL = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 30_000),
)
_AWAY = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
}
# What the proxy says when its database does not answer it.
_DATABASE = ("OperationalError", "InterfaceError", "during the commit")
_T = TypeVar("_T")


class ProxyError(StorageInternalError):  # type: ignore[misc]  # Optuna imports it lazily
    """The proxy has not answered, or has said that it cannot."""

    def __init__(self, error: grpc.RpcError) -> None:
        code, said = error.code(), one_line(Exception(error.details() or error.code().name))
        self.is_away = code in _AWAY
        if code == grpc.StatusCode.UNKNOWN and any(text in said for text in _DATABASE):
            self.is_away = True
            said = "its database does not answer, of which it says more itself"
        elif code == grpc.StatusCode.UNIMPLEMENTED:
            said = f"it is none of Optuna's, or of another version of Optuna: {said}"
        super().__init__(said)


class ProxyStorage(
    Patient,
    GrpcStorageProxy,  # type: ignore[misc]
    waits=(*ASKED, "create_new_trial", "get_all_trials", "set_trial_param"),
):
    """A storage behind a proxy."""

    what = "proxy"

    def __init__(self, host: str, port: int) -> None:
        """ProxyError if no proxy answers."""
        self._answer_s = _CONNECT_S
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(host=host, port=port)
        try:
            with suppress(KeyError):  # there is no such study, which is an answer
                self._asked(lambda: GrpcStorageProxy.get_study_id_from_name(self, ""))
        except ProxyError:
            self.close()
            raise
        self._answer_s = _ANSWER_S

    def _setup(self) -> None:
        self._channel = grpc.insecure_channel(f"{self._host}:{self._port}", options=_CHANNEL)
        calls = vars(StorageServiceStub(self._channel))
        self._stub = SimpleNamespace(**{name: partial(self._call, calls[name]) for name in calls})
        self._cache = GrpcClientCache(self._stub)

    def _call(self, call: Callable[..., Any], request: object) -> Any:
        """One call of the proxy, which may not take forever."""
        return call(request, timeout=self._answer_s)

    def set_trial_param(
        self, trial_id: int, name: str, value: float, distribution: BaseDistribution
    ) -> None:
        """Store a parameter, also of a trial that a proxy does not know which was begun anew since."""
        ask = partial(super().set_trial_param, trial_id, name, value, distribution)
        try:
            ask()
        except KeyError:
            for study in list(self._cache.studies):  # it knows a trial once it was asked for all
                self._cache.get_all_trials(study, None)
            ask()

    def wait_for(self, call: Callable[[], _T]) -> _T:
        return super().wait_for(lambda: self._asked(call))

    def _asked(self, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except grpc.RpcError as error:
            raise ProxyError(error) from None

    def _is_away(self, error: Exception) -> bool:
        return isinstance(error, ProxyError) and error.is_away
