"""Use a shoal through the packages that people use, and print a line for each feature.

Run by ``tests/clients/run.py`` with a Python that has the packages. It needs nothing of shoal:

    python check.py URL MODEL CLIENT
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

ARGUMENTS = {"place": "Köln"}
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {json.dumps(ARGUMENTS)}}}\n</tool_call>'
PERSON = {"name": "Ann", "age": 41}
PARAMETERS = {
    "type": "object",
    "properties": {"place": {"type": "string"}},
    "required": ["place"],
    "additionalProperties": False,
}
PERSON_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SUNNY = "It is sunny."

Check = Callable[[str, str], None]


def say(*steps: str) -> str:
    """Make the model say this, one step in each of its turns."""
    return f"Hello! [[say]]{'[[then]]'.join(steps)}[[end]]"


def user(*steps: str) -> dict[str, str]:
    return {"role": "user", "content": say(*steps)}


def tool(**more: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS, **more}
    return {"type": "function", "function": function}


def json_schema() -> dict[str, Any]:
    schema = {"name": "person", "schema": PERSON_SCHEMA, "strict": True}
    return {"type": "json_schema", "json_schema": schema}


# ---- openai -------------------------------------------------------------------------------------


def openai_client(url: str) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def openai_chat(url: str, model: str) -> None:
    answer = openai_client(url).chat.completions.create(model=model, messages=[user("4")])
    assert answer.choices[0].message.content == "4"


def openai_stream(url: str, model: str) -> None:
    chunks = openai_client(url).chat.completions.create(
        model=model, messages=[user("one two")], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two"


def openai_tools(url: str, model: str) -> None:
    client, messages = openai_client(url), [user(CALL, SUNNY)]
    first = client.chat.completions.create(model=model, messages=messages, tools=[tool()])
    (call,) = first.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == ARGUMENTS
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages += [first.choices[0].message, result]
    second = client.chat.completions.create(model=model, messages=messages, tools=[tool()])
    assert second.choices[0].message.content == SUNNY


def openai_json(url: str, model: str) -> None:
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int

    answer = openai_client(url).chat.completions.parse(
        model=model, messages=[user(json.dumps(PERSON))], response_format=Person
    )
    assert answer.choices[0].message.parsed == Person(name="Ann", age=41)


def openai_required(url: str, model: str) -> None:
    answer = openai_client(url).chat.completions.create(
        model=model, messages=[user(CALL)], tools=[tool()], tool_choice="required"
    )
    assert answer.choices[0].message.tool_calls[0].function.name == "get_weather"


def openai_responses(url: str, model: str) -> None:
    with openai_client(url).responses.stream(model=model, input=say("one two")) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "one two"


# ---- openai-agents ------------------------------------------------------------------------------


def _agent(url: str, model: str, *, responses: bool) -> None:
    import agents
    import openai

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)

    @agents.function_tool
    def get_weather(place: str) -> str:
        return "sunny"

    kind = agents.OpenAIResponsesModel if responses else agents.OpenAIChatCompletionsModel
    agent = agents.Agent(
        name="helper",
        instructions="Help.",
        tools=[get_weather],
        model=kind(model=model, openai_client=client),
    )
    assert agents.Runner.run_sync(agent, say(CALL, SUNNY)).final_output == SUNNY


def agents_tools(url: str, model: str) -> None:
    _agent(url, model, responses=False)


def agents_responses(url: str, model: str) -> None:
    _agent(url, model, responses=True)


# ---- anthropic ----------------------------------------------------------------------------------


def anthropic_client(url: str) -> Any:
    import anthropic

    return anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0)


def anthropic_chat(url: str, model: str) -> None:
    answer = anthropic_client(url).messages.create(
        model=model, max_tokens=50, messages=[user("4")], system="Be brief."
    )
    assert answer.content[0].text == "4"


def anthropic_stream(url: str, model: str) -> None:
    with anthropic_client(url).messages.stream(
        model=model, max_tokens=50, messages=[user("one two")]
    ) as stream:
        assert "".join(stream.text_stream) == "one two"


def anthropic_tools(url: str, model: str) -> None:
    tools = [{"name": "get_weather", "description": "Weather.", "input_schema": PARAMETERS}]
    client, messages = anthropic_client(url), [user(CALL, SUNNY)]
    ask = {"model": model, "max_tokens": 500, "tools": tools}
    with client.messages.stream(messages=messages, **ask) as stream:
        first = stream.get_final_message()
    (use,) = first.content
    assert use.input == ARGUMENTS
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    messages += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    assert client.messages.create(messages=messages, **ask).content[0].text == SUNNY


# ---- litellm ------------------------------------------------------------------------------------


def _litellm(url: str, model: str, **more: Any) -> Any:
    import litellm

    return litellm.completion(
        model=f"openai/{model}", api_base=f"{url}/v1", api_key="unused", num_retries=0, **more
    )


def litellm_chat(url: str, model: str) -> None:
    answer = _litellm(url, model, messages=[user("4")])
    assert answer.choices[0].message.content == "4"


def litellm_stream(url: str, model: str) -> None:
    chunks = _litellm(url, model, messages=[user("one two")], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two"


def litellm_tools(url: str, model: str) -> None:
    messages: list[Any] = [user(CALL, SUNNY)]
    first = _litellm(url, model, messages=messages, tools=[tool()])
    (call,) = first.choices[0].message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "sunny"}
    messages += [first.choices[0].message.model_dump(), result]
    second = _litellm(url, model, messages=messages, tools=[tool()])
    assert second.choices[0].message.content == SUNNY


def litellm_json(url: str, model: str) -> None:
    answer = _litellm(
        url, model, messages=[user(json.dumps(PERSON))], response_format=json_schema()
    )
    assert json.loads(answer.choices[0].message.content) == PERSON


# ---- llm ----------------------------------------------------------------------------------------


def _llm(url: str, model: str, **more: Any) -> Any:
    from llm.default_plugins.openai_models import Chat

    return Chat(
        "shoal", model_name=model, api_base=f"{url}/v1", supports_tools=True, supports_schema=True
    )


def llm_chat(url: str, model: str) -> None:
    answer = _llm(url, model).prompt(say("4"), stream=False, key="unused")
    assert answer.text() == "4"


def llm_stream(url: str, model: str) -> None:
    pieces = list(_llm(url, model).prompt(say("one two"), key="unused"))
    assert "".join(pieces) == "one two"
    assert len(pieces) > 1


def llm_tools(url: str, model: str) -> None:
    def get_weather(place: str) -> str:
        """Weather."""
        return "sunny"

    chain = _llm(url, model).chain(say(CALL, SUNNY), tools=[get_weather], key="unused")
    assert chain.text().endswith(SUNNY)


def llm_json(url: str, model: str) -> None:
    answer = _llm(url, model).prompt(say(json.dumps(PERSON)), schema=PERSON_SCHEMA, key="unused")
    assert json.loads(answer.text()) == PERSON


# ---- langchain-openai ---------------------------------------------------------------------------


def _langchain(url: str, model: str) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="unused", max_retries=0)


def langchain_chat(url: str, model: str) -> None:
    assert _langchain(url, model).invoke(say("4")).content == "4"


def langchain_stream(url: str, model: str) -> None:
    pieces = [chunk.content for chunk in _langchain(url, model).stream(say("one two"))]
    assert "".join(pieces) == "one two"


def langchain_tools(url: str, model: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool as as_tool

    @as_tool
    def get_weather(place: str) -> str:
        """Weather."""
        return "sunny"

    bound = _langchain(url, model).bind_tools([get_weather])
    messages: list[Any] = [HumanMessage(say(CALL, SUNNY))]
    first = bound.invoke(messages)
    (call,) = first.tool_calls
    assert call["args"] == ARGUMENTS
    messages += [first, ToolMessage("sunny", tool_call_id=call["id"], name="get_weather")]
    assert bound.invoke(messages).content == SUNNY


def langchain_json(url: str, model: str) -> None:
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int

    structured = _langchain(url, model).with_structured_output(Person, method="json_schema")
    assert structured.invoke(say(json.dumps(PERSON))) == Person(name="Ann", age=41)


# ---- pydantic-ai --------------------------------------------------------------------------------


def _pydantic_ai(url: str, model: str, **more: Any) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="unused")
    return Agent(OpenAIChatModel(model, provider=provider), **more)


def pydantic_ai_chat(url: str, model: str) -> None:
    assert _pydantic_ai(url, model).run_sync(say("4")).output == "4"


def pydantic_ai_stream(url: str, model: str) -> None:
    async def run() -> None:
        async with _pydantic_ai(url, model).run_stream(say("one two")) as result:
            pieces = [piece async for piece in result.stream_text(delta=True)]
        assert "".join(pieces) == "one two"

    asyncio.run(run())


def pydantic_ai_tools(url: str, model: str) -> None:
    agent = _pydantic_ai(url, model)

    @agent.tool_plain
    def get_weather(place: str) -> str:
        return "sunny"

    assert agent.run_sync(say(CALL, SUNNY)).output == SUNNY


def pydantic_ai_json(url: str, model: str) -> None:
    """The output is the argument of a tool that must be called."""
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int

    call = {"name": "final_result", "arguments": PERSON}
    said = say(f"<tool_call>\n{json.dumps(call)}\n</tool_call>")
    result = _pydantic_ai(url, model, output_type=Person).run_sync(said)
    assert result.output == Person(name="Ann", age=41)


# ---- instructor ---------------------------------------------------------------------------------


def _instructor(url: str, model: str, mode: str, text: str, **more: Any) -> Any:
    import instructor
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int

    client = instructor.from_openai(openai_client(url), mode=getattr(instructor.Mode, mode))
    return client.chat.completions.create(
        model=model, messages=[user(text)], response_model=Person, max_retries=0, **more
    )


def instructor_tools(url: str, model: str) -> None:
    call = {"name": "Person", "arguments": PERSON}
    found = _instructor(url, model, "TOOLS", f"<tool_call>\n{json.dumps(call)}\n</tool_call>")
    assert (found.name, found.age) == ("Ann", 41)


def instructor_json(url: str, model: str) -> None:
    found = _instructor(url, model, "JSON_SCHEMA", json.dumps(PERSON))
    assert (found.name, found.age) == ("Ann", 41)


CLIENTS: dict[str, tuple[str, dict[str, Check]]] = {
    "openai": (
        "openai",
        {
            "chat": openai_chat,
            "stream": openai_stream,
            "tools": openai_tools,
            "required tool": openai_required,
            "JSON schema": openai_json,
            "responses": openai_responses,
        },
    ),
    "openai-agents": (
        "openai-agents",
        {"tools": agents_tools, "responses": agents_responses},
    ),
    "anthropic": (
        "anthropic",
        {"chat": anthropic_chat, "stream": anthropic_stream, "tools": anthropic_tools},
    ),
    "litellm": (
        "litellm",
        {
            "chat": litellm_chat,
            "stream": litellm_stream,
            "tools": litellm_tools,
            "JSON schema": litellm_json,
        },
    ),
    "llm": (
        "llm",
        {"chat": llm_chat, "stream": llm_stream, "tools": llm_tools, "JSON schema": llm_json},
    ),
    "langchain": (
        "langchain-openai",
        {
            "chat": langchain_chat,
            "stream": langchain_stream,
            "tools": langchain_tools,
            "JSON schema": langchain_json,
        },
    ),
    "pydantic-ai": (
        "pydantic-ai-slim",
        {
            "chat": pydantic_ai_chat,
            "stream": pydantic_ai_stream,
            "tools": pydantic_ai_tools,
            "JSON schema": pydantic_ai_json,
        },
    ),
    "instructor": (
        "instructor",
        {"required tool": instructor_tools, "JSON schema": instructor_json},
    ),
}


def main(url: str, model: str, client: str) -> None:
    os.environ["NO_PROXY"] = "127.0.0.1"
    package, checks = CLIENTS[client]
    version = importlib.metadata.version(package)
    for feature, check in checks.items():
        error = ""
        try:
            check(url, model)
        except Exception as failure:  # Each package has errors of its own.
            traceback.print_exc()
            error = f"{type(failure).__name__}: {str(failure)[:300]}"
        row = {"client": package, "version": version, "feature": feature, "error": error}
        print(json.dumps(row), flush=True)  # noqa: T201 - a command


if __name__ == "__main__":
    main(*sys.argv[1:])
