import pytest
from engine.server.server_process import ServerProcess, running_server


def test_answers_while_the_model_loads() -> None:
    with running_server("LoadingCore", until_ready=False) as server:
        assert server.get("/livez").status_code == 200
        assert server.get("/readyz").status_code == 503
        assert server.get("/health").status_code == 503
        assert server.get("/metrics").status_code == 200
        assert server.get("/v1/models").json()["data"][0]["id"] == "fake"
        startup = server.get("/startupz")
        assert startup.status_code == 503
        assert startup.json()["phase"] in {"starting", "loading"}
        assert startup.json()["phase"] == list(startup.json()["phases_s"])[-1]
        refused = server.post("/v1/completions", {"prompt": "a"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "model_loading"
        assert int(refused.headers["retry-after"]) > 0
        started = server.wait_for("/startupz", 200).json()
        assert started["phase"] == "ready"
        assert started["elapsed_s"] >= 2
        phases = started["phases_s"]
        assert list(phases) == ["starting", "loading", "warming_up"]
        assert phases["loading"] >= 1.5
        assert sum(phases.values()) == pytest.approx(started["elapsed_s"], abs=0.01)
        server.wait_for_log(r"is ready after .* \(starting .*, loading .*, warming_up .*\)")
        assert server.wait_for("/readyz", 200).json() == {"status": "ok", "reason": None}
        server.wait_for_log("Loading weights: ")


def test_live_until_work_waits_and_no_step_finishes() -> None:
    with running_server("HangingCore", "--stall-timeout-s", "0.5", "--drain-timeout-s", "0.1") as server:
        assert server.get("/livez").status_code == 200
        with server.open_socket("/v1/completions", {"prompt": "a"}):
            reason = server.wait_for("/livez", 503).json()["reason"]
            assert reason == "no step finished in 0.5 s while requests wait"
            assert server.get("/readyz").status_code == 200
        assert server.get("/livez").status_code == 503, "the engine hangs on though its client left"


def test_all_probes_when_ready(echo_server: ServerProcess) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert echo_server.get(path).json() == {"status": "ok", "reason": None}


def test_version(echo_server: ServerProcess) -> None:
    assert set(echo_server.get("/version").json()) == {"version"}


def test_models(echo_server: ServerProcess) -> None:
    (model,) = echo_server.client.models.list().data
    assert (model.id, model.owned_by) == ("fake", "octavo")
    assert echo_server.get("/v1/models/fake").json()["max_model_len"] == 2048


def test_model_names_may_hold_slashes() -> None:
    with running_server("EchoCore", "--served-model-name", "org/model") as server:
        assert server.client.models.retrieve("org/model").id == "org/model"
        assert server.client.completions.create(model="org/model", prompt="a", max_tokens=1).model == "org/model"
