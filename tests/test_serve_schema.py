"""What /openapi.json promises is what the server sends: schemathesis asks, with valid and with broken requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import pytest
import requests
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from nanochat.serve.settings import Settings
from tests.serving import GREEDY, Served, idle, script, scripted_replica, served, wait_for

schemathesis = pytest.importorskip("schemathesis")

CASES = 2000
PER_OPERATION = 110  # valid ones, and as many broken ones; endpoints without parameters have fewer


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    torch.set_num_threads(1)
    with served(lambda index: scripted_replica(script), Settings(defaults=GREEDY)) as running:
        yield running


def test_the_schema_says_what_is_sent(server: Served):
    paths = server.http.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            assert ("422" in operation["responses"]) is False or not path.startswith("/v1"), path
    assert "422" in paths["/chat"]["post"]["responses"]
    assert set(paths["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
    kinds = paths["/sessions/{session_id}/export"]["get"]["responses"]["200"]["content"]
    assert set(kinds) == {"application/json", "text/plain", "text/markdown"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_request_finds_a_crash_or_an_undocumented_answer(server: Served):
    from schemathesis import GenerationMode, checks

    wanted = [
        checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
        checks.response_headers_conformance, checks.response_schema_conformance,
    ]  # fmt: skip
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    connection, asked, answered = requests.Session(), Counter[str](), Counter[int]()

    def known_session() -> str:
        return server.http.post("/sessions", json={}).json()["id"]

    def ask(case) -> None:
        label = case.operation.label
        asked[label] += 1
        # Random names and ids are unknown ones: every other case gets behind the 404.
        if asked[label] % 2:
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "default"
            if "session_id" in (case.path_parameters or {}):
                case.path_parameters["session_id"] = known_session()
        response = case.call_and_validate(session=connection, checks=wanted, timeout=60)
        answered[response.status_code] += 1

    options = settings(
        max_examples=PER_OPERATION, deadline=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate], derandomize=True, database=None,
    )  # fmt: skip
    for result in schema.get_all_operations():
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            cases = result.ok().as_strategy(generation_mode=mode)
            with suppress(Unsatisfiable):  # an endpoint without parameters cannot be asked wrongly
                options(given(case=cases)(ask))()
    print(dict(asked), dict(answered))
    assert sum(asked.values()) >= CASES and {200, 400, 404, 422} <= answered.keys()
    wait_for(lambda: idle(server))
    assert server.pool.workers[0].num_failed == 0
