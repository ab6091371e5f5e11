"""Chat templates are rendered as transformers renders them.

``tests/compare_templates.py`` wrote the golden texts, and compares other templates.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.errors import TokenizerError
from model.tokenizer import ChatTemplate
from tests.compare_templates import GOLDEN, TEMPLATES, conversations, variables

EXPECTED: dict[str, list[str | None]] = json.loads(GOLDEN.read_text())
CONVERSATIONS = conversations()


@pytest.mark.parametrize("name", EXPECTED)
def test_conversations_are_rendered_as_by_transformers(name: str) -> None:
    template = ChatTemplate((TEMPLATES / name).read_text(), Path(name))
    for conversation, expected in zip(CONVERSATIONS, EXPECTED[name], strict=True):
        if expected is None:
            with pytest.raises(TokenizerError, match="chat template failed"):
                template.render(variables(conversation))
        else:
            assert template.render(variables(conversation)) == expected, conversation["name"]


def test_every_template_has_golden_texts() -> None:
    assert set(EXPECTED) == {path.name for path in TEMPLATES.glob("*.jinja")}
    assert len(CONVERSATIONS) == 15
    # Most are rendered, and some are refused.
    texts = [text for golden in EXPECTED.values() for text in golden]
    assert 150 < len([text for text in texts if text is not None]) < len(texts)


@pytest.mark.parametrize(
    "template",
    [
        "{{ '%999999999d' | format(1) }}",
        "{{ '%*d' | format(999999999, 1) }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:{}}'.format('a', 999999999) }}",
        "{{ 'a' | indent('b' * 99999) | indent('b' * 3999999) }}",
        "{{ (1).to_bytes(999999999) | length }}",
        "{{ [{'a': 'b' * 99999}] * 99999 | join('c' * 99999, attribute='a') }}",
    ],
)
def test_no_filter_makes_a_huge_text(template: str) -> None:
    with pytest.raises(TokenizerError, match="chat template failed"):
        ChatTemplate(template, Path("t")).render({})
