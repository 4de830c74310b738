"""Chat templates in Jinja's language that come with a checkpoint, and the bounds they run in."""

import sys
import time

import pytest
from talking import written

from rwkv_cli.engine.rendered import Rendered
from rwkv_cli.errors import ConversationError


def test_own_templates_get_what_transformers_gives_them() -> None:
    source = (
        "{%- for m in messages -%}{%- if m.role == 'judge' -%}{{ raise_exception('no') }}{%- endif -%}"
        "{% generation %}{{ m.content }}{% endgeneration %}{%- if loop.index > 8 -%}{% break %}{%- endif -%}"
        "{%- endfor -%}"
        "{{ strftime_now('%Y') | length }}{{ {'é': '<'} | tojson(indent=1) }}"
    )
    said = {"role": "user", "content": "Hi \r\n\r\nyou\t"}
    assert written(Rendered.of(source, {}), "off", [said]) == 'Hi \r\n\r\nyou\t4{\n "é": "<"\n}'


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[9].content }}",
        "{% if %}",
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{% break %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    ],
)
def test_a_template_that_fails_or_breaks_out_is_refused(source: str) -> None:
    with pytest.raises(ConversationError, match=r"chat template fails .*choose another with --template"):
        Rendered.of(source, {})


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
        "{{ ('a' * 9999999) | wordwrap(1) }}",
    ],
    ids=["loops", "calls", "filter"],
)
def test_a_template_that_never_ends_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_cli.engine.bounds._SECONDS", 0.2)
    tracing = sys.gettrace()
    begun = time.monotonic()
    with pytest.raises(ConversationError, match=r"chat template fails .it takes too long.; choose another"):
        Rendered.of(source, {})
    assert time.monotonic() - begun < 10
    assert sys.gettrace() is tracing


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is bounded on Linux only")
@pytest.mark.parametrize(
    "source",
    [
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ messages | tojson(indent=10 ** 12) }}",
        "{{ '%999999999999d' % 1 }}",
    ],
)
def test_a_template_that_takes_all_memory_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr("rwkv_cli.engine.bounds._MEMORY", 100 << 20)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ConversationError, match=r"chat template fails .it takes too much memory.; choose another"):
        Rendered.of(source, {})
    assert resource.getrlimit(resource.RLIMIT_AS) == limit
