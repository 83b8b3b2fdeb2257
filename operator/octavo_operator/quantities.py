"""Kubernetes quantities: text in, numbers out, and the canonical text back, which the API server keeps as it is."""

from decimal import Decimal, InvalidOperation

_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}

MIB = 1 << 20
GIB = 1 << 30


def parse_quantity(text: str | int | float) -> Decimal:
    """`1500m` -> 1.5, `16Gi` -> 17179869184.

    Raises ValueError if it is no quantity.
    """
    text = str(text).strip()
    number, factor = text, Decimal(1)
    if text[-2:] in _BINARY:
        number, factor = text[:-2], Decimal(1 << _BINARY[text[-2:]])
    elif text[-1:].isalpha() and text[-1] in _DECIMAL:
        number, factor = text[:-1], Decimal(10) ** _DECIMAL[text[-1]]
    try:
        return Decimal(number) * factor
    except InvalidOperation:
        raise ValueError(f"{text!r} is not a quantity such as 500m or 16Gi") from None


def format_bytes(num_bytes: int) -> str:
    """The canonical text of a number of bytes, rounded up to whole MiB: 1073741824 -> `1Gi`."""
    mib = -(-num_bytes // MIB)
    return f"{mib // 1024}Gi" if mib % 1024 == 0 else f"{mib}Mi"


def format_millicores(millicores: int) -> str:
    """The canonical text of a CPU request: 1500 -> `1500m`, 2000 -> `2`."""
    return str(millicores // 1000) if millicores % 1000 == 0 else f"{millicores}m"


def format_gib(num_bytes: int) -> str:
    """Bytes for people: `12.4 GiB`."""
    return f"{num_bytes / GIB:.1f} GiB"
