"""A real Prefect server, started once for all tests that ask for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect_servers import PrefectServer, running_server


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory) -> Iterator[PrefectServer]:
    with running_server(tmp_path_factory.mktemp("megagram-home")) as server:
        yield server
