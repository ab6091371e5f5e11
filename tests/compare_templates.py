"""Compare how shoal and transformers render chat templates, over 15 conversations.

In an environment that has transformers:

    python tests/compare_templates.py FOLDER    # every template below a folder of models or files
    python tests/compare_templates.py --write   # the golden texts of tests/model/templates

Templates are files *.jinja, and the chat_template in each tokenizer_config.json. Each difference
is one line, and the last line has their number. The exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TEMPLATES = ROOT / "tests" / "model" / "templates"
GOLDEN = TEMPLATES / "golden.json"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

Render = Callable[[str, dict[str, Any]], str]


def conversations() -> list[dict[str, Any]]:
    """Return the conversations: messages, and perhaps tools, documents and further variables."""
    found: list[dict[str, Any]] = json.loads((TEMPLATES / "conversations.json").read_text())
    return found


def variables(conversation: dict[str, Any]) -> dict[str, Any]:
    """Return all that a template sees of a conversation."""
    return {
        **SPECIAL,
        **conversation.get("variables", {}),
        "messages": conversation["messages"],
        "tools": conversation.get("tools"),
        "documents": conversation.get("documents"),
        "add_generation_prompt": conversation.get("add_generation_prompt", True),
    }


def by_transformers(template: str, values: dict[str, Any]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rest = dict(values)
    rendered, _ = render_jinja_template([rest.pop("messages")], chat_template=template, **rest)
    return str(rendered[0])


def by_shoal(template: str, values: dict[str, Any]) -> str:
    from model.template_sandbox import Sandbox

    return Sandbox(template).render(values)


def outcome(render: Render, template: str, conversation: dict[str, Any]) -> str | None:
    """Return the text, or None if the template refuses the conversation."""
    try:
        return render(template, variables(conversation))
    except Exception:  # Templates raise whatever they like, and other libraries do, too.
        return None


def templates(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each template below a folder."""
    for path in sorted(folder.rglob("*.jinja")):
        yield str(path.relative_to(folder)), path.read_text(encoding="utf-8")
    for path in sorted(folder.rglob("tokenizer_config.json")):
        found = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        named = found if isinstance(found, list) else [{"name": "", "template": found}]
        for item in named:
            if isinstance(item["template"], str):
                yield f"{path.relative_to(folder)} {item['name']}".strip(), item["template"]


def differences(folder: Path) -> Iterator[str]:
    """Yield a line for each template and conversation that are not rendered alike."""
    for name, template in templates(folder):
        for conversation in conversations():
            expected = outcome(by_transformers, template, conversation)
            found = outcome(by_shoal, template, conversation)
            if found != expected:
                yield f"{name}, {conversation['name']}: {_difference(expected, found)}"


def _difference(expected: str | None, found: str | None) -> str:
    if expected is None or found is None:
        renders = "transformers" if found is None else "shoal"
        return f"only {renders} renders it"
    at = next(
        (at for at, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]),
        min(len(expected), len(found)),
    )
    return f"{found[at : at + 40]!r} instead of {expected[at : at + 40]!r} at character {at}"


def golden() -> dict[str, list[str | None]]:
    """Return by template what transformers makes of each conversation. None: it refuses."""
    return {
        name: [outcome(by_transformers, template, item) for item in conversations()]
        for name, template in templates(TEMPLATES)
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where the templates are")
    parser.add_argument("--write", action="store_true", help="write the golden texts of the tests")
    options = parser.parse_args(arguments)
    if options.write:
        GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n", encoding="ascii")
        return 0
    if options.folder is None:
        parser.error("give a folder")
    found = list(differences(options.folder))
    count = len(list(templates(options.folder)))
    print(*found, sep="\n", end="\n" if found else "")  # noqa: T201 - a command
    print(f"{count} templates x {len(conversations())} conversations: {len(found)} differ")  # noqa: T201 - a command
    return 1 if found else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
