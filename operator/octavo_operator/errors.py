"""Errors of the operator. Each says in one sentence what went wrong and what its reader can do about it."""

from collections.abc import Collection

from octavo_engine.errors import CapacityError, OctavoError
from pydantic import ValidationError


class OperatorError(OctavoError):
    """A mistake of the user's, or of the environment, told in one sentence."""


class ManifestError(OperatorError):
    """A file that `octavo plan` was given is no InferenceService, or no list of Nodes."""


class ProfileError(OperatorError):
    """A HardwareProfile that cannot be used; `reason` is one CamelCase word."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class NothingFitsError(OperatorError):
    """`octavo plan` found no node type for the model."""


class NoLeaderWorkerSetsError(CapacityError):
    """A model would fit over several nodes, but the cluster has nothing that starts an engine there."""

    def __init__(self, split: str) -> None:
        super().__init__(
            f"the model takes {split}, and an engine over several nodes is a LeaderWorkerSet, which this cluster does "
            "not have or does not let Octavo use: install it from https://lws.sigs.k8s.io, or offer nodes with more "
            "or larger GPUs"
        )


class ConnectionSettingsError(OperatorError):
    """Neither a kubeconfig nor a service account leads to an API server."""


class MissingCrdError(OperatorError):
    """The API server does not know InferenceServices."""


class NameConflictError(OperatorError):
    """An object that somebody else made has the name that a child needs; it is left alone."""


class ApiError(OperatorError):
    """The API server refused a request: `status` is the HTTP status, the message its own sentence.

    causes: reasons of the Status object's details, such as NamespaceTerminating
    """

    def __init__(self, status: int, message: str, causes: Collection[str] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.causes = frozenset(causes)

    @property
    def ends_with_namespace(self) -> bool:
        """Whether nothing can be made any more because the namespace is being deleted."""
        return "NamespaceTerminating" in self.causes

    @property
    def is_final(self) -> bool:
        """Whether the same request would be refused again: the object is wrong, not the moment."""
        return self.status in {400, 422}


def explain_validation(error: ValidationError) -> str:
    """The first problem of a resource that does not validate, with its place."""
    problem = error.errors()[0]
    place = ".".join(str(each) for each in problem["loc"])
    return f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
