"""Python's garbage collector in a process whose steps must not pause.

A full collection goes through every object that may be part of a cycle. The prefix cache has three for each block, so
that it takes 120 ms for 72,000 blocks (measured on a Zen 3 core), in which no request gets a token. Scheduling, running
and answering leave no cycles behind, which a test holds.
"""

import gc
from typing import Final

_NEVER: Final = 2**31 - 1


def spare_old_objects() -> None:
    """From now on collect only among objects that were made lately.

    Call it when what lives as long as the process is there. What is old and becomes part of an unreachable cycle stays.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)
