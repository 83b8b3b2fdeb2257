"""`octavo bench`: measure this engine, and any other server, with the same client and the same seeded workloads.

One module a command; each imports what it measures with once it runs, so that help costs nothing.
"""

import click

from octavo_engine.bench.commands.batching import batching
from octavo_engine.bench.commands.ceilings import ceilings
from octavo_engine.bench.commands.make_checkpoint import make_checkpoint
from octavo_engine.bench.commands.offline import offline
from octavo_engine.bench.commands.serve import serve


@click.group()
def bench() -> None:
    """Measure throughput, latency and the use of the KV cache."""


for _command in (batching, ceilings, make_checkpoint, offline, serve):
    bench.add_command(_command)
