"""Tasks of a sweep on a Dask cluster (extra ``odt-plan[dask]``)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .ir.errors import UsageError
from .sweep import OnDone, Task, solve

#: A scheduler that has not answered within this many seconds is not there.
CONNECT_S = 5.0


@contextmanager
def connect(address: str) -> Iterator[DaskCluster]:
    """The cluster of a scheduler.

    Raises:
        UsageError: Dask is missing here, nobody answers at the address, or no worker is there.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UsageError(
            "--scheduler: Dask is not installed; `pip install 'odt-plan[dask]'`, or leave"
            " --scheduler out to use this machine's cores"
        ) from None
    try:
        asyncio.run(asyncio.wait_for(_greet(address), 2 * CONNECT_S))
        client = Client(address, timeout=CONNECT_S, set_as_default=False)
    except Exception as e:  # what is no address, or no scheduler, raises all kinds
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UsageError(
            f"--scheduler: no Dask scheduler answers at {address!r} ({reason}); start one with"
            " `dask scheduler`, or leave --scheduler out to use this machine's cores"
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_S)
        except TimeoutError:
            raise UsageError(
                f"--scheduler: {address} has no workers; start some with `dask worker {address}`"
                " where odt-plan is installed"
            ) from None
        yield DaskCluster(client)


async def _greet(address: str) -> None:
    """Shake hands as a client would; a ``Client`` without a scheduler can't be got rid of."""
    from distributed.comm import connect
    from distributed.security import Security

    arguments = Security().get_connection_args("client")
    comm = await connect(address, timeout=CONNECT_S, **arguments)
    await comm.close()


class DaskCluster:
    """Runs tasks on the workers of a cluster.

    Dask runs the task of a worker that died again elsewhere, as often as the scheduler's
    ``distributed.scheduler.allowed-failures`` says.
    """

    def __init__(self, client: Any) -> None:
        """Use a connected ``distributed.Client``."""
        self._client = client

    def run(self, tasks: Sequence[Task], on_done: OnDone) -> None:
        """Run all tasks."""
        from distributed import as_completed

        index = {self._client.submit(solve, t, pure=False): i for i, t in enumerate(tasks)}
        for future in as_completed(list(index), loop=self._client.loop):
            i = index[future]
            error = future.exception()
            if error is None:
                on_done(i, future.result())
            else:
                kind = type(error).__name__
                reason = f"{tasks[i].name}: failed on the cluster: {kind}: {error}"
                on_done(i, tasks[i].lost(reason))
