"""The command line with small tiles: ``python driver.py SIDE [--no-check] [--delay SECONDS] [--hold MIB] ARGUMENTS...``

--no-check: what the plan would refuse is tried all the same. --delay: each tile, and each block of samples prepared,
takes so much longer, in this process and in its workers, so that there is a middle to be killed in. --hold: workers
hold so much more memory for each tile, until they are killed or, where nobody does that, for a minute.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]


DELAY = "TEST_TILE_DELAY"
HOLD = "TEST_TILE_HOLD"


def slow_down() -> None:
    """Make every tile and block of this process take longer, where the environment says so."""
    if DELAY not in os.environ:
        return
    from pipelines.stores import FeatureStore, GramStore

    def slowed(write):
        def slowly(*arguments):
            time.sleep(float(os.environ[DELAY]))
            return write(*arguments)

        return slowly

    setattr(GramStore, "write_tile", slowed(GramStore.write_tile))  # noqa: B010
    setattr(FeatureStore, "write_block", slowed(FeatureStore.write_block))  # noqa: B010


def hold_memory() -> None:
    """Make every tile of this process hold more memory, where the environment says so."""
    if HOLD not in os.environ:
        return
    from pipelines.stores import GramStore

    write = GramStore.write_tile

    def holding(*arguments):
        held = bytearray(int(os.environ[HOLD]) * 2**20)
        held[::4096] = b"x" * len(held[::4096])  # memory is taken where it is written to
        time.sleep(60)
        return write(*arguments)

    setattr(GramStore, "write_tile", holding)  # noqa: B010


def main() -> None:
    side, *arguments = sys.argv[1:]
    from cluster.worker import set_blas_environment

    set_blas_environment()
    import small

    small.use_tile_side(int(side), setattr)
    if arguments[0] == "--no-check":
        from pipelines.plan import Plan

        arguments = arguments[1:]
        setattr(Plan, "check", lambda self: None)  # noqa: B010
    if arguments[0] == "--delay":
        os.environ[DELAY], arguments = arguments[1], arguments[2:]
        slow_down()
    if arguments[0] == "--hold":
        os.environ[HOLD], arguments = arguments[1], arguments[2:]
    from flows import cli

    sys.argv = ["megagram", *arguments]
    cli.main()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    # A worker: processes that are spawned import the main module of the one that started them.
    slow_down()
    hold_memory()
