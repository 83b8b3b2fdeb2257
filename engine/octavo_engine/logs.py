"""How the engine's processes log: one line per event on standard error, the same in front end and engine process."""

import logging

LINE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# Libraries that tell each request or each file at INFO.
QUIET_LOGGERS = ("httpx", "httpx2", "botocore", "urllib3", "filelock", "asyncio", "uvicorn.error")


def configure_logging(level: str) -> None:
    """Log to standard error from `level` on. Libraries speak from WARNING on, unless `level` is debug."""
    logging.basicConfig(level=level.upper(), format=LINE_FORMAT, force=True)
    if level != "debug":
        for name in QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
