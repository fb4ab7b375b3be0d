"""The requests that schemathesis makes of the server's OpenAPI document: valid ones and others."""

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from openai.types import Completion, ErrorObject
from openai.types.chat import ChatCompletion
from servers import Served, tiny_generator

TYPES = {"/v1/chat/completions": ChatCompletion, "/v1/completions": Completion}


class Failed(pydantic.BaseModel):
    error: ErrorObject


def is_as_openai(_, response, case):
    if case.path in TYPES and response.headers["content-type"] == ["application/json"]:
        kind = TYPES[case.path] if response.status_code == 200 else Failed
        kind.model_validate(response.json())


@pytest.mark.slow
def test_every_answer_is_as_the_document_says(text_model, byte_tokenizer):
    """Guards against status 500, errors of another format, answers that lack a field, and a key that is not
    asked for. The document cannot say which values go together.
    """
    schemathesis = pytest.importorskip("schemathesis", reason="needs requirements-clients.txt")
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    key, statuses = {"Authorization": "Bearer sesame"}, set()
    checks = {"additional_checks": [is_as_openai], "excluded_checks": [positive_data_acceptance]}
    with Served(tiny_generator(text_model, byte_tokenizer), api_key="sesame", max_waiting=60) as served:
        document = schemathesis.openapi.from_url(f"{served.url}/openapi.json", headers=key)
        for operation in (result.ok() for result in document.get_all_operations()):
            for mode in list(schemathesis.GenerationMode)[: 2 if operation.body else 1]:

                @settings(max_examples=200, suppress_health_check=[*HealthCheck])
                @given(operation.as_strategy(generation_mode=mode))
                def check(case):
                    response = case.call_and_validate(headers=key, timeout=300, **checks)
                    statuses.add((case.path, response.status_code))

                check()
    assert {(path, status) for path in TYPES for status in (200, 400)} < statuses
