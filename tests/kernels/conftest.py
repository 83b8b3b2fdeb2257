"""Every op is tested twice: as it runs here, and on torch alone."""

import pytest
from octavo_kernels import native


@pytest.fixture(autouse=True, params=["c", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "cpu_kernels", lambda: None)
    elif native.cpu_kernels() is None:
        pytest.skip("there is no C compiler")
    return request.param
