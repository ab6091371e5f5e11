"""/openapi.json: the OpenAPI document of the routes for clients.

Types and names are here, and ranges by the constants of what reads them. How fields act together is
in docs/api.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from api.openai.encoders import MOST_ANSWERS, MOST_TEXTS
from api.openai.fields import IGNORED
from api.openai.responses_input import INCLUDED, SAME
from api.openai.sampling import (
    MAX_CHOICES,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_TOKENS,
)
from model.generation import (
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
)
from wire.logprobs import MOST_TOP_LOGPROBS

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_OBJECT: Schema = {"type": "object"}
_WHOLE: Schema = {"type": "integer"}


def document_routes() -> list[Route]:
    return [Route("/openapi.json", _document, methods=["GET"])]


async def _document(request: Request) -> Response:
    return JSONResponse(document())


@cache
def document() -> Schema:
    """Return the document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "shoal",
            "version": version("shoal-llm"),
            "description": "One large language model across a shoal of small devices. The routes "
            "are those of OpenAI, Anthropic, llama-server and vLLM where these have them.",
        },
        "paths": {path: _path(path, *about) for path, about in _PATHS.items()},
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"header": []}],
    }


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _number(low: float, high: float) -> Schema:
    return _or_null({"type": "number", "minimum": low, "maximum": high})


def _integer(low: int, high: int | None = None) -> Schema:
    bounds: Schema = {"type": "integer", "minimum": low}
    return _or_null(bounds if high is None else {**bounds, "maximum": high})


def _one_of(*values: Any) -> Schema:
    return _or_null({"enum": list(values)})


def _list(items: Schema, **more: int) -> Schema:
    return {"type": "array", "items": items, **more}


def _closed(properties: Mapping[str, Schema], *required: str) -> Schema:
    """Return the schema of a request, which has no other fields."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def _open(properties: Mapping[str, Schema]) -> Schema:
    """Return the schema of an answer that has all of these."""
    return {"type": "object", "properties": dict(properties), "required": list(properties)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_FLAG = _or_null({"type": "boolean"})
_STOP_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_STOP = _or_null({"anyOf": [_STOP_TEXT, _list(_STOP_TEXT, maxItems=MAX_STOP_STRINGS)]})

COMMON: dict[str, Schema] = {
    "model": _or_null(_TEXT),
    "stream": _FLAG,
    "stream_options": _or_null(_closed({"include_usage": _FLAG, "include_obfuscation": _FLAG})),
    "stop": _STOP,
    "seed": _integer(-(1 << 63), (1 << 63) - 1),
    "temperature": _number(0, MAX_TEMPERATURE),
    "top_p": _number(0, 1),
    "top_k": _integer(0, MAX_TOP_K),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    "presence_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
    "frequency_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
    "logit_bias": _or_null({"type": "object", "additionalProperties": {"type": "number"}}),
    "n": _integer(1, MAX_CHOICES),
    "max_tokens": _integer(0, MAX_TOKENS),
    "ignore_eos": _FLAG,
    "return_token_ids": _FLAG,
    "cache_prompt": _FLAG,
    "speculative.n_max": _integer(0, MAX_TOKENS),
    "speculative.draft_model": _FLAG,
    "response_format": _or_null(_OBJECT),
    "json_schema": _or_null({}),
    "grammar": _or_null(_TEXT),
    "guided_json": _or_null({}),
    "guided_regex": _or_null(_TEXT),
    "guided_choice": _or_null(_list(_TEXT, minItems=1)),
    "guided_grammar": _or_null(_TEXT),
    "structured_outputs": _or_null(_OBJECT),
    # Fields that change nothing, and fields of OpenAI's with the only value that is taken.
    "user": _or_null(_TEXT),
    "store": _FLAG,
    "metadata": _or_null(_OBJECT),
    "service_tier": _or_null(_TEXT),
    "safety_identifier": _or_null(_TEXT),
    "prompt_cache_key": _or_null(_TEXT),
    "prompt_cache_retention": _or_null(_TEXT),
    "suffix": _one_of(""),
    "functions": _or_null(_list({}, maxItems=0)),
    "function_call": _one_of("none", "auto"),
    "modalities": _one_of(["text"]),
    "audio": {"type": "null"},
    "prediction": {"type": "null"},
    "verbosity": _one_of("medium"),
    "web_search_options": {"type": "null"},
}

_CALL = _closed(
    {
        "id": {"type": "string", "minLength": 1},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string", "minLength": 1}, "arguments": _TEXT},
            "required": ["name", "arguments"],
        },
    },
    "id",
    "function",
)
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _TEXT},
    "required": ["type", "text"],
}
_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [_TEXT, _list(_PART), {"type": "null"}]},
        "name": _or_null(_TEXT),
        "tool_calls": _or_null(_list(_CALL)),
        "tool_call_id": _or_null(_TEXT),
        "reasoning_content": _or_null(_TEXT),
    },
    "required": ["role"],
}
_FUNCTION = _closed(
    {
        "name": {"type": "string", "pattern": r"^[A-Za-z0-9_.\-]{1,128}$"},
        "description": _or_null(_TEXT),
        "parameters": _or_null(_OBJECT),
        "strict": _FLAG,
    },
    "name",
)
_TOOL = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": _FUNCTION},
    "required": ["type", "function"],
}

CHAT: dict[str, Schema] = {
    "messages": _list(_MESSAGE, minItems=1),
    "max_completion_tokens": _integer(1, MAX_TOKENS),
    "tools": _or_null(_list(_TOOL)),
    "tool_choice": _or_null({"anyOf": [{"enum": ["none", "auto", "required"]}, _OBJECT]}),
    "parallel_tool_calls": _FLAG,
    "logprobs": _FLAG,
    "top_logprobs": _integer(0, MOST_TOP_LOGPROBS),
    "reasoning_effort": _one_of("none", "minimal", "low", "medium", "high", "xhigh"),
    "enable_thinking": _FLAG,
    "reasoning_format": _one_of("auto", "deepseek", "none"),
    "chat_template_kwargs": _or_null(_OBJECT),
}
_TOKENS = _list({"type": "integer", "minimum": 0})
COMPLETION: dict[str, Schema] = {
    "prompt": {"anyOf": [_TEXT, _TOKENS, _list(_TEXT, minItems=1), _list(_TOKENS, minItems=1)]},
    "logprobs": {"anyOf": [_integer(0, MOST_TOP_LOGPROBS), {"const": False}]},
    "echo": _FLAG,
    "best_of": _integer(1, MAX_CHOICES),
}

_ALL = {**COMMON, **CHAT}
_IGNORED = {field: COMMON[field] for field in sorted(IGNORED)}

RESPONSE: dict[str, Schema] = {
    **{field: _ALL[field] for field in SAME},
    "input": {"anyOf": [_TEXT, _list(_OBJECT, minItems=1)]},
    "instructions": _or_null(_TEXT),
    "max_output_tokens": _integer(1, MAX_TOKENS),
    "tools": _or_null(_list(_OBJECT)),
    "tool_choice": _ALL["tool_choice"],
    "reasoning": _or_null(_OBJECT),
    "text": _or_null(_OBJECT),
    "store": _FLAG,
    "include": _or_null(_list({"enum": list(INCLUDED)})),
    "top_logprobs": _integer(0, 0),
    # Fields that would need something stored, with the only value that is taken.
    "previous_response_id": {"type": "null"},
    "conversation": {"type": "null"},
    "background": _or_null({"const": False}),
    "prompt": {"type": "null"},
    "truncation": _one_of("disabled"),
    "max_tool_calls": {"type": "null"},
    "context_management": _or_null(_list({}, maxItems=0)),
}

_TEXTS: Schema = {"anyOf": [_TEXT, _list(_PART)]}


def _block(kind: str, properties: Mapping[str, Schema], *required: str) -> Schema:
    """Return the schema of a block of Anthropic's."""
    found = {"type": {"const": kind}, **properties, "cache_control": {}}
    return {"type": "object", "properties": found, "required": ["type", *required]}


_BLOCK: Schema = {
    "anyOf": [
        _PART,
        _block("tool_use", {"id": _TEXT, "name": _TEXT, "input": _OBJECT}, "id", "name", "input"),
        _block(
            "tool_result",
            {"tool_use_id": _TEXT, "content": _or_null(_TEXTS), "is_error": _FLAG},
            "tool_use_id",
        ),
        _block("thinking", {"thinking": _TEXT, "signature": _or_null(_TEXT)}, "thinking"),
    ]
}
MESSAGES: dict[str, Schema] = {
    **{
        field: _ALL[field]
        for field in (
            *("model", "temperature", "top_p", "top_k", "min_p", "seed", "stream", "metadata"),
            *("service_tier", "cache_prompt", "chat_template_kwargs"),
        )
    },
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS},
    "messages": _list(
        {
            "type": "object",
            "properties": {
                "role": {"enum": ["user", "assistant", "system"]},
                "content": {"anyOf": [_TEXT, _list(_BLOCK)]},
            },
            "required": ["role", "content"],
        },
        minItems=1,
    ),
    "system": _or_null(_TEXTS),
    "stop_sequences": _or_null(_list(_STOP_TEXT, maxItems=MAX_STOP_STRINGS)),
    "tools": _or_null(_list(_OBJECT)),
    "tool_choice": _or_null(
        {
            "type": "object",
            "properties": {
                "type": {"enum": ["auto", "any", "tool", "none"]},
                "name": _or_null(_TEXT),
                "disable_parallel_tool_use": _FLAG,
            },
            "required": ["type"],
        }
    ),
    "thinking": _or_null(
        {
            "type": "object",
            "properties": {"type": {"enum": ["enabled", "disabled", "adaptive"]}},
            "required": ["type"],
        }
    ),
    "cache_control": {},
    "container": {"type": "null"},
    "mcp_servers": _or_null(_list({}, maxItems=0)),
    "context_management": {"type": "null"},
}

_USAGE = _open({"prompt_tokens": _WHOLE, "completion_tokens": _WHOLE, "total_tokens": _WHOLE})
_FINISH = {"enum": ["stop", "length", "tool_calls"]}

_OF_ENCODERS: dict[str, Schema] = {
    "model": _TEXT,
    "input": {
        "anyOf": [
            _TEXT,
            _TOKENS,
            _list({"anyOf": [_TEXT, _list(_TEXT), _TOKENS]}, minItems=1, maxItems=MOST_TEXTS),
        ]
    },
    "truncate": _FLAG,
    **_IGNORED,
}
_COUNTED: dict[str, Schema] = {
    "model": _TEXT,
    "usage": _open({"prompt_tokens": _WHOLE, "total_tokens": _WHOLE}),
}

_SCHEMAS: dict[str, Schema] = {
    "Error": _open(
        {
            "error": {
                "type": "object",
                "properties": {"message": _TEXT, "type": _TEXT},
                "required": ["message", "type"],
            }
        }
    ),
    "MessagesError": _open(
        {"error": {"type": "object", "properties": {"message": _TEXT}, "required": ["message"]}}
    ),
    "Model": _open(
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "context_length": _or_null(_WHOLE),
            "shoal": _OBJECT,
        }
    ),
    "Models": _open({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
    "Choice": _open({"index": _WHOLE, "message": _OBJECT, "finish_reason": _FINISH}),
    "TextChoice": _open({"index": _WHOLE, "text": _TEXT, "finish_reason": _FINISH}),
    "ChatCompletionRequest": _closed({**COMMON, **CHAT}, "messages"),
    "ChatCompletion": _open(
        {
            "id": _TEXT,
            "object": {"const": "chat.completion"},
            "created": _WHOLE,
            "model": _TEXT,
            "choices": _list(_ref("Choice")),
            "usage": _USAGE,
        }
    ),
    "CompletionRequest": _closed({**COMMON, **COMPLETION}, "prompt"),
    "Completion": _open(
        {
            "id": _TEXT,
            "object": {"const": "text_completion"},
            "created": _WHOLE,
            "model": _TEXT,
            "choices": _list(_ref("TextChoice")),
            "usage": _USAGE,
        }
    ),
    "ResponseRequest": _closed(RESPONSE, "input"),
    "Response": _open(
        {
            "id": _TEXT,
            "object": {"const": "response"},
            "status": {"enum": ["completed", "incomplete"]},
            "model": _TEXT,
            "output": _list(_OBJECT),
            "usage": _open({"input_tokens": _WHOLE, "output_tokens": _WHOLE}),
        }
    ),
    "MessagesRequest": _closed(MESSAGES, "max_tokens", "messages"),
    "CountRequest": _closed(MESSAGES, "messages"),
    "Message": _open(
        {
            "id": _TEXT,
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "model": _TEXT,
            "content": _list(_OBJECT),
            "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
            "usage": _open({"input_tokens": _WHOLE, "output_tokens": _WHOLE}),
        }
    ),
    "TokenizeRequest": {
        "type": "object",
        "properties": {
            **COMMON,
            **CHAT,
            "content": _TEXT,
            "prompt": _TEXT,
            "add_special": _FLAG,
            "add_special_tokens": _FLAG,
            "parse_special": _or_null({"const": True}),
            "with_pieces": _FLAG,
            "return_token_strs": _FLAG,
        },
    },
    "Tokens": _open({"tokens": _list({}), "count": _WHOLE, "max_model_len": _WHOLE}),
    "DetokenizeRequest": _closed({"model": _TEXT, "tokens": _TOKENS}, "tokens"),
    "DetokenizedText": _open({"content": _TEXT, "prompt": _TEXT}),
    "TemplateRequest": _closed({**COMMON, **CHAT}, "messages"),
    "Prompt": _open({"prompt": _TEXT}),
    "Count": _open({"input_tokens": _WHOLE}),
    "EmbeddingRequest": _closed(
        {
            **_OF_ENCODERS,
            "encoding_format": {"enum": ["float", "base64"]},
            "dimensions": _integer(1),
            "prompt_name": _or_null(_TEXT),
        },
        "input",
    ),
    "Embeddings": _open(
        {
            "object": {"const": "list"},
            "data": _list(
                _open(
                    {
                        "object": {"const": "embedding"},
                        "index": _WHOLE,
                        "embedding": {"anyOf": [_list({"type": "number"}), _TEXT]},
                    }
                )
            ),
            **_COUNTED,
        }
    ),
    "ClassifyRequest": _closed(_OF_ENCODERS, "input"),
    "Classes": _open({"data": _list(_open({"index": _WHOLE})), **_COUNTED}),
    "AnswersRequest": _closed(
        {
            "model": _TEXT,
            "question": _TEXT,
            "context": _TEXT,
            "top": _integer(1, MOST_ANSWERS),
            "may_lack": _FLAG,
            **_IGNORED,
        },
        "question",
        "context",
    ),
    "Answers": _open(
        {
            "data": _list(
                _open(
                    {
                        "answer": _TEXT,
                        "score": {"type": "number"},
                        "start": _WHOLE,
                        "end": _WHOLE,
                    }
                )
            ),
            **_COUNTED,
        }
    ),
}

_PATHS: dict[str, tuple[str, str, str, str]] = {
    "/v1/models": ("List the models.", "", "Models", ""),
    "/v1/models/{model}": ("Describe a model.", "", "Model", ""),
    "/v1/chat/completions": (
        "Answer a chat.",
        "ChatCompletionRequest",
        "ChatCompletion",
        "A chunk of a chat completion in each event, and [DONE] at the end.",
    ),
    "/v1/completions": (
        "Continue a text.",
        "CompletionRequest",
        "Completion",
        "A chunk of a completion in each event, and [DONE] at the end.",
    ),
    "/v1/responses": (
        "Answer, in OpenAI's newer form. Nothing is stored.",
        "ResponseRequest",
        "Response",
        "OpenAI's events of responses.",
    ),
    "/v1/messages": (
        "Answer, in Anthropic's form.",
        "MessagesRequest",
        "Message",
        "Anthropic's events of messages.",
    ),
    "/v1/messages/count_tokens": (
        "Count the tokens of a request to /v1/messages.",
        "CountRequest",
        "Count",
        "",
    ),
    "/tokenize": ("Turn a text or a chat into tokens.", "TokenizeRequest", "Tokens", ""),
    "/detokenize": ("Turn tokens into text.", "DetokenizeRequest", "DetokenizedText", ""),
    "/apply-template": ("Turn a chat into a prompt.", "TemplateRequest", "Prompt", ""),
    "/v1/embeddings": ("Turn texts into vectors.", "EmbeddingRequest", "Embeddings", ""),
    "/v1/classify": (
        "Give texts, pairs of texts or their tokens a class.",
        "ClassifyRequest",
        "Classes",
        "",
    ),
    "/v1/answers": (
        "Find the parts of a text that answer a question.",
        "AnswersRequest",
        "Answers",
        "",
    ),
}
"""For each path: its summary, the schemas of request and answer, and what its stream has."""

_REFUSALS = {
    "400": "The request is wrong.",
    "401": "An API key is needed.",
    "403": "The host or the origin is not known.",
    "404": "The model is not here.",
    "408": "The request took too long to arrive.",
    "429": "Too many requests wait. Retry-After says when to come again.",
    "500": "An error of the server.",
    "502": "A device failed.",
    "503": "No model answers now. Retry-After says when to come again, if it is known.",
    "507": "A disk is full.",
}


def _path(path: str, summary: str, request: str, answer: str, stream: str) -> Schema:
    error = "MessagesError" if path.startswith("/v1/messages") else "Error"
    responses: Schema = {
        status: {"description": text, "content": {"application/json": {"schema": _ref(error)}}}
        for status, text in _REFUSALS.items()
    }
    if answer:
        content: Schema = {"application/json": {"schema": _ref(answer)}}
        if stream:
            # No type: some tools take the whole body for the value, a text, and some each event.
            content["text/event-stream"] = {"schema": {"description": stream}}
        responses = {"200": {"description": "The answer.", "content": content}, **responses}
    operation: Schema = {"summary": summary, "responses": responses}
    if "{model}" in path:
        operation["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if request:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _ref(request)}},
        }
    return {"post" if request else "get": operation}
