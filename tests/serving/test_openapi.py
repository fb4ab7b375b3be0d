"""The requests that schemathesis makes of the server's OpenAPI document: valid ones and others."""

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from openai.types import Completion, ErrorObject
from openai.types.chat import ChatCompletion
from servers import Served, tiny_generator

KEY = "sesame"


class Failed(pydantic.BaseModel):
    error: ErrorObject


TYPES = {"/v1/chat/completions": ChatCompletion, "/v1/completions": Completion}


def is_as_openai(_, response, case):
    if case.path in TYPES and response.headers["content-type"] == ["application/json"]:
        kind = TYPES[case.path] if response.status_code == 200 else Failed
        kind.model_validate(response.json())


@pytest.mark.slow
def test_every_answer_is_as_the_document_says(text_model, byte_tokenizer):
    """Guards against status 500, errors of another format, answers that lack a field, and a key that is not
    asked for. The document cannot say which values go together, and null is neutral everywhere.
    """
    schemathesis = pytest.importorskip("schemathesis", reason="needs requirements-clients.txt")
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    key = {"Authorization": f"Bearer {KEY}"}
    with Served(tiny_generator(text_model, byte_tokenizer), api_key=KEY, max_waiting=60) as served:
        document = schemathesis.openapi.from_url(f"{served.url}/openapi.json", headers=key)
        statuses = set()
        for operation in document.get_all_operations():
            operation = operation.ok()
            modes = list(schemathesis.GenerationMode)[: 2 if operation.body else 1]
            for mode in modes:

                @settings(max_examples=200, suppress_health_check=[*HealthCheck])
                @given(operation.as_strategy(generation_mode=mode))
                def check(case):
                    response = case.call_and_validate(
                        headers=key,
                        timeout=300,
                        additional_checks=[is_as_openai],
                        excluded_checks=[positive_data_acceptance],
                    )
                    statuses.add((case.path, response.status_code))

                check()
        assert {(path, 200) for path in TYPES} < statuses
        assert {(path, 400) for path in TYPES} < statuses
