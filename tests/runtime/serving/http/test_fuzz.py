"""Requests drawn from our own OpenAPI description: none of them is answered with 500."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import status_code_conformance

from uhd_export.runtime.serving.http.app import create_app
from uhd_export.runtime.serving.http.front import HttpOptions
from uhd_export.runtime.serving.service import Service, ServiceOptions

EXAMPLES = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.slow
def test_no_request_breaks_the_server(nano_bundle):
    with Service.open(nano_bundle, ServiceOptions(slots=2, context=512), threads=1) as service:
        app = create_app(service, HttpOptions(seconds=0.2, body_seconds=2))
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        paths, statuses = set(), set()
        for found in schema.get_all_operations():
            operation = found.ok()
            paths.add(operation.path)

            @EXAMPLES
            @given(case=operation.as_strategy())
            def ask(case):
                response = case.call()
                statuses.add(response.status_code)
                assert response.status_code < 500 or response.status_code == 504, response.text
                case.validate_response(response, checks=[status_code_conformance])

            ask()
    assert {"/v1/chat/completions", "/v1/plan", "/v1/tokenize", "/health", "/metrics"} <= paths
    assert {200, 400} <= statuses
