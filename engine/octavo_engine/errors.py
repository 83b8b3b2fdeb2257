"""Errors of the engine. Each says what went wrong and what its reader can do about it.

User mistakes raise an `OctavoError`; the command line prints its one sentence and exits with 2, the HTTP server
answers with OpenAI's error body. Anything else is a defect and keeps its traceback.
"""

from typing import Literal


class OctavoError(Exception):
    """A mistake of the user's, or of the environment, told in one sentence."""


class ConfigError(OctavoError):
    """A flag, an OCTAVO_* variable or a field of the configuration file is wrong."""


SourceReason = Literal[
    "ModelNotFound", "ModelAccessDenied", "ModelUnreadable", "HubRateLimited", "HubUnavailable",
    "SourceRateLimited", "SourceUnavailable", "InspectionFailed",
]  # fmt: skip


class ModelSourceError(OctavoError):
    """The model cannot be found, reached or read; `reason` is the same in one word, for conditions."""

    def __init__(self, message: str, *, reason: SourceReason = "ModelUnreadable") -> None:
        super().__init__(message)
        self.reason = reason


class UnsupportedModelError(OctavoError):
    """The model's architecture or format is not one that this engine serves."""


class CapacityError(OctavoError):
    """The model, or what was asked for, does not fit onto the hardware that there is."""


class InvalidRequestError(OctavoError):
    """A request is wrong; `param` names the field, as OpenAI's error body does."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class RankLostError(Exception):
    """Another process of the same engine is gone, or does not answer; what ended it is that one's to say."""


class EngineDeadError(OctavoError):
    """The engine process ended; the requests it held end with this error."""
