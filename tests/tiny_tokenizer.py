"""A small byte-level tokenizer with MiniMax's special tokens and chat format, or those of another
style, made on the spot for tests.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

CONTROL = ["]!p~[", "]!d~[", "]~b]", "[e~[", "]~!b["]
MARKERS = ["<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"]
CORPUS = [
    "The weather in Paris is sunny, and the weather in Oslo is not.",
    'You may call one or more tools. <invoke name="get_weather"> <parameter '
    'name="city">Paris</parameter> </invoke>',
    '{"type": "function", "name": "add", "parameters": {"a": 1, "b": 2}} one two three four five '
    "six seven",
]
# MiniMax-M2's way of splitting words before the byte-pair merges: digits in groups of three,
# letters, punctuation.
SPLIT = r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string %}{{ content }}{% elif content is not none %}
{%- for part in content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif -%}
{%- endmacro -%}
{%- set first_is_system = messages[0].role == 'system' -%}
{{- ']~!b[]~b]system\\n' -}}
{{- text(messages[0].content) if first_is_system else 'You are a helpful assistant.' -}}
{%- if tools -%}
{{- '\\n\\n# Tools\\nYou may call one or more tools. ' -}}
{{- 'Here are the tools in JSONSchema format:\\n\\n<tools>\\n' -}}
{%- for tool in tools %}{{ '<tool>' ~ (tool.function | tojson) ~ '</tool>\\n' }}{% endfor -%}
{{- '</tools>' -}}
{%- endif -%}
{{- '[e~[\\n' -}}
{%- set turns = messages[1:] if first_is_system else messages -%}
{%- for message in turns -%}
{%- if message.role == 'user' -%}
{{- ']~b]user\\n' ~ text(message.content) ~ '[e~[\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- ']~b]ai\\n' -}}
{%- if message.reasoning_content -%}
{{- '<think>\\n' ~ message.reasoning_content ~ '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- text(message.content) -}}
{%- if message.tool_calls -%}
{{- '\\n<minimax:tool_call>\\n' -}}
{%- for call in message.tool_calls -%}
{{- '<invoke name="' ~ call.function.name ~ '">\\n' -}}
{%- for name, value in call.function.arguments.items() -%}
{{- '<parameter name="' ~ name ~ '">' -}}
{{- value if value is string else value | tojson -}}
{{- '</parameter>\\n' -}}
{%- endfor -%}
{{- '</invoke>\\n' -}}
{%- endfor -%}
{{- '</minimax:tool_call>' -}}
{%- endif -%}
{{- '[e~[\\n' -}}
{%- elif message.role == 'tool' -%}
{{- ']~b]tool\\n<response>' ~ text(message.content) ~ '</response>[e~[\\n' -}}
{%- else -%}
{{- raise_exception('unknown role ' ~ message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ']~b]ai\\n<think>\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True, kw_only=True)
class Style:
    """The control tokens, the tags, the chat template and tokenizer_config.json of a family.

    `control_first`: the control tokens have the lowest numbers, not numbers behind the others.
    """

    control: tuple[str, ...]
    markers: tuple[str, ...]
    settings: Mapping[str, Any]
    template: str
    control_first: bool = False


MINIMAX = Style(
    control=tuple(CONTROL),
    markers=tuple(MARKERS),
    settings={
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "]~!b[",
        "eos_token": "[e~[",
        "model_max_length": 4096,
    },
    template=TEMPLATE,
)


def write_tokenizer(directory: Path, vocab_size: int = 384, style: Style = MINIMAX) -> Path:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; it has at most
    `vocab_size` tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [AddedToken(token, special=True, normalized=False) for token in style.control]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(style.markers) - (0 if style.control_first else len(control)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=control if style.control_first else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in style.markers]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(style.settings))
    (directory / "chat_template.jinja").write_text(style.template)
    return directory
