"""Addresses of pods that share the machine's one network.

The API server refuses loopback addresses in EndpointSlices, so a pod reports 10.244.x.y. Its process listens on
127.244.x.y with the same x.y: every address of 127.0.0.0/8 can be bound on Linux without any set-up.
"""

import ipaddress
import random

_REPORTED = ipaddress.ip_network("10.244.0.0/16")
_REACHABLE = ipaddress.ip_network("127.244.0.0/16")


def reachable_address(pod_ip: str) -> str:
    """Where the pod that reports `pod_ip` is listening. An address from elsewhere is its own answer."""
    address = ipaddress.ip_address(pod_ip)
    if address not in _REPORTED:
        return pod_ip
    return str(_REACHABLE[int(address) - int(_REPORTED.network_address)])


class PodAddresses:
    """Hands out reported pod addresses, each to one pod at a time.

    Drawn at random: two test clusters on one machine share 127.0.0.0/8, and counting from 1 in both would put
    pods of both on the same address and port.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, earlier: str | None = None) -> str:
        """An address for a pod; the `earlier` one that it has reported already, which cannot change, if any."""
        if earlier is not None:
            self._taken.add(earlier)
            return earlier
        while True:
            address = str(_REPORTED[random.randrange(2, _REPORTED.num_addresses - 1)])
            if address not in self._taken:
                self._taken.add(address)
                return address

    def release(self, address: str) -> None:
        self._taken.discard(address)
