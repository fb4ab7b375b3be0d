"""The server's OpenAPI document: its models describe requests, and the fields that each answer has."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from self_speculation import __version__
from serving.protocol import ChatRequest, CompletionRequest


def document(has_key: bool) -> dict[str, Any]:
    """OpenAPI 3.1; with `has_key`, clients must send the API key."""
    kinds = (ChatRequest, CompletionRequest)
    template = "#/components/schemas/{model}"
    _, models = models_json_schema([(kind, "validation") for kind in kinds], ref_template=template)
    model = _object(id={"type": "string"}, object={"const": "model"}, max_model_len={"type": "integer"})
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "self-speculation", "version": __version__},
        "paths": {
            "/health": {"get": {**_responds(_object()), "security": []}},
            "/metrics": {"get": _responds({"type": "string"}, "text/plain")},
            "/v1/models": {"get": _responds(_object(data={"type": "array", "items": model}))},
            "/v1/models/{name}": {"get": {**_responds(model), "parameters": [name]}},
            "/v1/chat/completions": {"post": _generates(ChatRequest, message=_object(role={}, content={}))},
            "/v1/completions": {"post": _generates(CompletionRequest, text={"type": "string"})},
        },
        "security": [{"key": []}] if has_key else [],
        "components": {
            "schemas": models["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _generates(kind: type[ChatRequest] | type[CompletionRequest], **content: Any) -> dict[str, Any]:
    body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
    choice = _object(index={"type": "integer"}, **content, finish_reason={"type": "string"}, logprobs={})
    count = {"type": "integer"}
    answer = _object(
        id={"type": "string"},
        object={"const": kind.object_name},
        created=count,
        model={"type": "string"},
        choices={"type": "array", "items": choice},
        usage=_object(prompt_tokens=count, completion_tokens=count, total_tokens=count),
        metrics=_object(),
    )
    operation = _responds(answer)
    operation["responses"]["200"]["content"]["text/event-stream"] = {}
    return {"summary": kind.__doc__, "requestBody": {"content": body, "required": True}, **operation}


def _responds(schema: dict[str, Any], media_type: str = "application/json") -> dict[str, Any]:
    error = _object(error=_object(message={"type": "string"}, type={"type": "string"}, param={}, code={}))
    return {
        "responses": {
            "200": {"description": "success", "content": {media_type: {"schema": schema}}},
            "default": {"description": "an error", "content": {"application/json": {"schema": error}}},
        }
    }


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
