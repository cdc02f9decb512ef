"""A map that learns and its features: ``python feature_driver.py DATA ROOT WORKERS DELAY``.

DATA: folder of 144 samples. WORKERS: processes beside this one, or 0 for none. DELAY: seconds that learning, and each
block of features, take longer, so that there is a middle to be killed in. What is done adds a line to ROOT/made:
``learn``, or the number of a block of features and who made it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DELAY, MADE = "TEST_FEATURE_DELAY", "TEST_FEATURES_MADE"
SAMPLES, SIDE, BLOCKS = 144, 16, 9
ANCHORS = 12


def slow_down() -> None:
    """Make learning and blocks of this process take longer, and leave a trace, where the environment says so."""
    if DELAY not in os.environ:
        return
    from tiny_map import TinyMap

    from pipelines.stores import FeatureStore

    write, learn = FeatureStore.write_block, TinyMap.learn

    def slowly(self, block, prepared):
        if "features" in prepared.arrays:
            time.sleep(float(os.environ[DELAY]))
        write(self, block, prepared)
        if "features" in prepared.arrays:
            _trace(f"{block} {os.getpid()}")

    def thoroughly(self, *arguments):
        _trace("learn")
        time.sleep(float(os.environ[DELAY]))
        return learn(self, *arguments)

    setattr(FeatureStore, "write_block", slowly)  # noqa: B010
    setattr(TinyMap, "learn", thoroughly)  # noqa: B010


def _trace(line: str) -> None:
    with open(os.environ[MADE], "a") as stream:
        stream.write(line + "\n")


def main() -> None:
    data, root, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    root.mkdir(exist_ok=True)
    os.environ[DELAY], os.environ[MADE] = sys.argv[4], str(root / "made")
    slow_down()
    import numpy as np
    import small
    from tiny_map import tiny

    from cluster.local import open_cluster
    from cluster.profiles import Profile
    from cluster.watchdog import Watchdog
    from pipelines import features, pools, tasks
    from pipelines.explicit import maps

    small.use_tile_side(SIDE, setattr)
    samples = small.Samples(data)
    one = samples.experiment(
        data={"train": 100, "validation": 44, "preprocess": ["zca"]}, gram={"dtype": "float32"}
    )
    resolved = pools.resolve(one)
    with contextlib.ExitStack() as stack:
        workers = tasks.Workers()
        if count:
            client = stack.enter_context(open_cluster(Profile(workers=count)))
            workers = tasks.Workers(client, count, None, Watchdog(client, count).check)
        learned, folder = maps.learned(
            resolved, tiny(ANCHORS), "float32", root, resolved.split.train, lambda: workers
        )
        report = features.materialise(
            resolved, learned, "float32", root, np.arange(SAMPLES), lambda: workers, learned=folder
        )
    print(report.computed, report.reused, flush=True)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    # A worker: processes that are spawned import the main module of the one that started them.
    import tiny_map  # noqa: F401  # that the map can be rebuilt from its description

    slow_down()
