"""Chat templates that take too much time or memory, and harmless ones that look alike."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from model.errors import TokenizerError
from model.template_process import MAX_WALL_S, TemplateProcess
from model.template_values import TemplateFailed
from model.tokenizer import ChatTemplate

VALUES = {"messages": [{"role": "user", "content": "a /think b"}] * 2}
LOOP = "{% for m in messages %}BODY{% endfor %}"
AGAIN = "{% for i in range(99999) %}{% if EXPRESSION %}{% endif %}{% endfor %}"
NESTED = (
    "{% set ns = namespace(s=[1]) %}{% for i in range(50) %}{% set ns.s = [ns.s, ns.s] %}"
    "{% endfor %}"
)


@pytest.fixture
def process() -> Iterator[TemplateProcess]:
    """One that is out of patience soon."""
    process = TemplateProcess(max_cpu_s=0.5)
    yield process
    process.close()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LOOP.replace("BODY", "{{ m.content.replace('/think', '') }}"), "a  ba  b"),
        (LOOP.replace("BODY", "{{ m.content.replace('a', 'x', 1) }}"), "x /think bx /think b"),
        (LOOP.replace("BODY", "{{ '-'.join(['a', 'b']) }}"), "a-ba-b"),
        (LOOP.replace("BODY", "{{ '{:>3}'.format('x') }}"), "  x  x"),
        (LOOP.replace("BODY", "{% set c = m.content.replace('/think', '') %}{{ c }}"), "a  ba  b"),
        ("{% block b %}{% set x = 'ab' %}{{ x.replace('a', 'c') }}{% endblock %}", "cb"),
        (
            "{% block b scoped %}{% for m in messages %}{{ m.role.replace('u', 'v') }}{% endfor %}"
            "{% endblock %}",
            "vservser",
        ),
        (
            "{% macro f(x) %}{{ x.replace('a', 'b') }}{{ caller() if caller }}{% endmacro %}"
            "{% for m in messages %}{% call f('aa') %}{{ m.role.upper() }}{% endcall %}"
            "{% endfor %}",
            "bbUSERbbUSER",
        ),
        (LOOP.replace("BODY", "{{ m.content | replace('/think', '') | upper }}"), "A  BA  B"),
        (LOOP.replace("BODY", "{{ loop.cycle('a', 'b') }}{{ loop.index }}"), "a1b2"),
        (LOOP.replace("BODY", "{% set j = joiner(',') %}{{ j() }}{{ j() }}"), ",,"),
        (LOOP.replace("BODY", "{{ raise_exception('no') if m.role == 'x' }}.") , ".."),
        (LOOP.replace("BODY", "{{ m | tojson }}"), '{"role": "user", "content": "a /think b"}' * 2),
        (LOOP.replace("BODY", "{{ dict(a=1).items() | list }}"), "[('a', 1)]" * 2),
        ("{% for c in 'abc' if c.replace('a', '') %}{{ c.replace('b', 'd') }}{% endfor %}", "dc"),
        ("{% filter upper %}{% for m in messages %}{{ m.role.replace('u', 'v') }}{% endfor %}"
         "{% endfilter %}", "VSERVSER"),
    ],
)  # fmt: skip
def test_calls_within_loops_blocks_and_macros(template: str, expected: str) -> None:
    assert ChatTemplate(template, Path("t")).render(VALUES) == expected


HOSTILE = {
    "squares": "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}"
    "{% endfor %}{{ ns.n > 1 }}",
    "text of nested lists": NESTED + "{{ ns.s | string | length }}",
    "JSON of nested lists": NESTED + "{{ ns.s | tojson | length }}",
    "nested lists compared": NESTED.replace("[1]", "[1], t=[1]").replace(
        "{% endfor %}", "{% set ns.t = [ns.t, ns.t] %}{% endfor %}"
    )
    + "{{ ns.s == ns.t }}",
    "sorting": "{% set s = range(99999) | list %}" + AGAIN.replace("EXPRESSION", "s | sort"),
    "counting words": "{% set s = 'a ' * 1999999 %}" + AGAIN.replace("EXPRESSION", "s | wordcount"),
    "lower": "{% set s = 'A' * 3999999 %}" + AGAIN.replace("EXPRESSION", "s | lower"),
    "in": "{% set s = 'A' * 3999999 %}" + AGAIN.replace("EXPRESSION", "'b' in s"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_takes_too_long_is_ended(name: str, process: TemplateProcess) -> None:
    with pytest.raises(TemplateFailed, match=r"0\.5 s of processor time|512 MiB of memory"):
        process.render(HOSTILE[name], VALUES)
    # The next one finds a new process, which knows nothing of it.
    assert process.render("{{ messages[0].role }}", VALUES) == "user"


def test_a_template_that_takes_too_much_memory_is_an_error() -> None:
    template = (
        "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}"
        "{% set ns.l = [ns.l, 'a' * 3999000 ~ i] %}{% endfor %}"
    )
    patient = TemplateProcess()  # A busy machine takes processor time for so much memory, too.
    with pytest.raises(TemplateFailed, match="more than 512 MiB of memory"):
        patient.render(template, VALUES)
    assert patient.render("{{ 'ok' }}", VALUES) == "ok"
    patient.close()


def test_a_process_with_less_memory_than_that_keeps_its_limit() -> None:
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20));"
        "from model.template_process import template_process;"
        "print(template_process().render('{{ x }}', {'x': 'ok'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "ok\n", done.stderr


def test_compiling_is_bounded_too(process: TemplateProcess) -> None:
    with pytest.raises(TemplateFailed):
        process.check("{{ " + "(" * 200_000 + "1" + ")" * 200_000 + " }}")
    with pytest.raises(TemplateFailed, match="Expected an expression"):
        process.check("{% if %}")


def test_a_process_that_stands_still_is_ended() -> None:
    process = TemplateProcess()
    try:
        assert process.render("{{ 'ok' }}", VALUES) == "ok"
        os.kill(child_of(process), signal.SIGSTOP)
        process._max_wall_s = 0.5
        with pytest.raises(TemplateFailed, match=r"did not end within 0\.5 s"):
            process.render("x" * 1_000_000, VALUES)
        process._max_wall_s = MAX_WALL_S
        assert process.render("{{ 'ok' }}", VALUES) == "ok"
    finally:
        process.close()


def test_a_process_that_was_killed_is_replaced(process: TemplateProcess) -> None:
    assert process.render("{{ 'ok' }}", VALUES) == "ok"
    killed = psutil.Process(child_of(process))
    killed.kill()
    psutil.wait_procs([killed], 10)
    assert process.render("{{ 'ok' }}", VALUES) == "ok"
    last = psutil.Process(child_of(process))
    process.close()
    assert not last.is_running()


def test_the_process_knows_no_token(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_TOKEN", "secret")
    process.check("")
    assert "SHOAL_TOKEN" not in psutil.Process(child_of(process)).environ()


def test_other_threads_run_while_a_template_does(process: TemplateProcess) -> None:
    def render() -> None:
        with pytest.raises(TemplateFailed):
            process.render(HOSTILE["lower"], VALUES)

    rounds_s = []
    thread = threading.Thread(target=render)
    thread.start()
    while thread.is_alive():
        rounds_s.append(time.monotonic())
        time.sleep(0.001)
    longest_s = max(after - before for before, after in itertools.pairwise(rounds_s))
    assert longest_s < (rounds_s[-1] - rounds_s[0]) / 2


@pytest.mark.parametrize(
    "template", ["{{ '\\ud800' }}", "{{ messages[0].role.replace() }}", "{{ ''.join() }}"]
)
def test_whatever_fails_names_the_template(template: str) -> None:
    with pytest.raises(TokenizerError, match="somewhere: chat template failed: "):
        ChatTemplate(template, Path("somewhere")).render(VALUES)


def test_a_template_larger_than_any_is_refused() -> None:
    with pytest.raises(TokenizerError, match="larger than any"):
        ChatTemplate("x" * 2_000_000, Path("t"))


def child_of(process: TemplateProcess) -> int:
    assert process._child is not None
    return process._child.pid
