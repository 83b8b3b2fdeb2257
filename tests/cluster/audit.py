"""What the API server has noted of one user's writes."""

import json
from collections import Counter
from pathlib import Path


class AuditLog:
    """Of a control plane that `audits_writes`; starts at the log's end."""

    def __init__(self, log: Path, user: str) -> None:
        self._log = log
        self._user = user
        self._offset = log.stat().st_size if log.exists() else 0

    def read(self) -> Counter[str]:
        """Writes since the last call, by what they wrote to: `deployments`, `inferenceservices/status`."""
        found: Counter[str] = Counter()
        with self._log.open("rb") as log:
            log.seek(self._offset)
            lines, _, _ = log.read().rpartition(b"\n")  # the last line may still be written
        self._offset += len(lines)
        for event in map(json.loads, filter(None, lines.splitlines())):
            if event["user"]["username"] == self._user:
                target = event["objectRef"]
                found["/".join(filter(None, (target["resource"], target.get("subresource"))))] += 1
        return found
