"""The requests that schemathesis makes of the server's OpenAPI document: valid ones and others."""

import pydantic
import pytest
from hypothesis import HealthCheck, settings
from openai.types import Completion, ErrorObject
from openai.types.chat import ChatCompletion
from servers import Served, tiny_generator

schemathesis = pytest.importorskip("schemathesis", reason="needs requirements-clients.txt")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
KEY = "sesame"


class Failed(pydantic.BaseModel):
    error: ErrorObject


TYPES = {"/v1/chat/completions": ChatCompletion, "/v1/completions": Completion}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def api(text_model, byte_tokenizer):
    with Served(tiny_generator(text_model, byte_tokenizer), api_key=KEY, max_waiting=60) as served:
        yield schemathesis.openapi.from_url(
            f"{served.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}
        )


def is_as_openai(_, response, case):
    if case.path in TYPES and response.headers["content-type"] == ["application/json"]:
        kind = TYPES[case.path] if response.status_code == 200 else Failed
        kind.model_validate(response.json())


@schemathesis.pytest.from_fixture("api").parametrize()
@settings(max_examples=150, suppress_health_check=[*HealthCheck])
def test_every_answer_is_as_the_document_says(case):
    """Guards against status 500, errors of another format, answers that lack a field, and a key that is not
    asked for. The document cannot say which values go together, and null is neutral everywhere.
    """
    case.call_and_validate(
        headers={"Authorization": f"Bearer {KEY}"},
        additional_checks=[is_as_openai],
        excluded_checks=[checks.positive_data_acceptance],
    )
