"""Start the test cluster by hand: `python tests/cluster/up.py`, and Ctrl-C to end it.

Prints the kubeconfig's path on its first line of output once the cluster takes pods. Everything that runs in the
cluster ends with it.
"""

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import binaries
from container import BackOff
from control_plane import ControlPlane, ControlPlaneError
from process_node import NodeHost, NodeSpec


def main() -> int:
    options = _options()
    logging.basicConfig(level=logging.DEBUG if options.verbose else logging.INFO, format="%(message)s")
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    try:
        if options.build_only:
            print(binaries.control_plane_binaries().folder)
        if options.helm:
            print(f"helm={binaries.helm_binary()}", file=sys.stderr)
        return 0 if options.build_only else _run(options)
    except (binaries.BuildError, ControlPlaneError) as error:
        print(error, file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    # Before anything starts: a Ctrl-C half-way through must still stop what runs by then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        with (
            ControlPlane(options.keep_state) as control_plane,
            NodeHost(control_plane.node_kubeconfig, control_plane.state) as nodes,
        ):
            back_off = BackOff(base_s=options.back_off_base)
            nodes.add(*(NodeSpec(f"process-{number}", back_off=back_off) for number in range(options.nodes)))
            print(control_plane.kubeconfig, flush=True)
            print(_usage(control_plane), file=sys.stderr, flush=True)
            if options.until_eof:
                sys.stdin.read()
            else:
                threading.Event().wait()
    except KeyboardInterrupt:
        # A second one must not leave half of the cluster behind.
        print("stopped", file=sys.stderr)
    return 0


def _interrupt(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _usage(control_plane: ControlPlane) -> str:
    return (
        f"export KUBECONFIG={control_plane.kubeconfig}\n"
        f"export PATH={control_plane.kubectl.parent}{os.pathsep}$PATH\n"
        f"logs of the containers: {control_plane.state / 'pods'}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A Kubernetes cluster on loopback whose pods are processes.")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="process nodes to register (1)")
    parser.add_argument("--keep-state", type=Path, metavar="DIR", help="keep data and identity in DIR")
    parser.add_argument("--build-only", action="store_true", help="build what is missing and end")
    parser.add_argument("--helm", action="store_true", help="have helm ready, too")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input closes")
    parser.add_argument("--back-off-base", type=float, default=10.0, metavar="S", help="first crash back-off (10)")
    parser.add_argument("--verbose", "-v", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
