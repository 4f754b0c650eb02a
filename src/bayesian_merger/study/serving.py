"""Being Optuna's proxy, as `search.storage = "grpc://HOST:PORT"` asks one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import grpc
from optuna.storages import get_storage
from optuna.storages._grpc.auto_generated.api_pb2_grpc import add_StorageServiceServicer_to_server
from optuna.storages._grpc.servicer import OptunaStorageProxyService

from bayesian_merger.errors import ConfigError
from bayesian_merger.study.proxy import PORT
from bayesian_merger.study.storage import close, file_of, require_local, storage_at

_THREADS = 10


def serve(url: str, host: str = "127.0.0.1", port: int = PORT) -> None:
    """Be the proxy of the database at an URL until the process is interrupted.

    Whoever reaches the port may read and write it. ConfigError if the database or the port is not to be
    had.
    """
    with suppress(KeyboardInterrupt), listening(url, host, port) as server:
        server.wait_for_termination()


@contextmanager
def listening(url: str, host: str, port: int) -> Iterator[grpc.Server]:
    """The server that `serve` waits for."""
    file = file_of(url)
    if file:
        require_local(file)
    storage = storage_at(url, is_patient=False)  # who asks the proxy waits
    server = grpc.server(
        # Nothing but the order of the calls lets one alone of several take a task from a file.
        ThreadPoolExecutor(1 if file else _THREADS),
        # Two processes would share the port, and the file.
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)],
    )
    service = OptunaStorageProxyService(get_storage(storage))
    add_StorageServiceServicer_to_server(service, server)
    try:
        try:
            server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise ConfigError(f"{host}:{port} cannot be listened on; is it in use?") from error
        server.start()
        yield server
    finally:
        server.stop(None).wait()
        close(storage)
