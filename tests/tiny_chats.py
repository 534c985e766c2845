"""Small tokenizers with the special tokens of Qwen and MiniMind and chat templates in their style,
made on the spot for tests. The templates are ours: what they write is what the published ones do,
where it matters to who reads it.
"""

import json
from pathlib import Path

from tests.tiny_tokenizer import Style, write_tokenizer

# Where a template says what it offers as tools, and what tools have said.
HEAD = """\
{%- set system = messages[0].content if messages[0].role == 'system' else DEFAULT_SYSTEM -%}
{%- if system or tools -%}
{{- '<|im_start|>system\\n' ~ system -}}
{%- if tools -%}
{{- '\\n\\nFunctions to call, as JSON with name and arguments in tool_call tags:\\n' -}}
{{- '<tools>\\n' -}}
{%- for tool in tools %}{{ tool | tojson ~ '\\n' }}{% endfor -%}
{{- '</tools>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- macro calls(message, content) -%}
{%- for call in message.tool_calls or [] -%}
{%- if content or not loop.first %}{{ '\\n' }}{% endif -%}
CALL
{%- endfor -%}
{%- endmacro -%}
{%- set last = namespace(question=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
ASSISTANT
{{- message.content ~ calls(message, message.content) ~ '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
{%- if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif -%}
{%- elif message.role == 'user' -%}
{{- '<|im_start|>user\\n' ~ message.content ~ '<|im_end|>\\n' -}}
{%- elif message.role != 'system' -%}
{{- raise_exception('unknown role ' ~ message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
PROMPT
{%- endif -%}
"""
# How a call is written: as JSON, or by Qwen3-Coder with each argument between tags.
AS_JSON = """\
{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' -}}
{%- if call.function.arguments is string -%}
{{- call.function.arguments -}}
{%- else -%}
{{- call.function.arguments | tojson -}}
{%- endif -%}
{{- '}\\n</tool_call>' -}}"""
IN_TAGS = """\
{{- '<tool_call>\\n<function=' ~ call.function.name ~ '>\\n' -}}
{%- for name, value in call.function.arguments.items() -%}
{%- set nested = value is mapping or (value is sequence and value is not string) -%}
{{- '<parameter=' ~ name ~ '>\\n' ~ (value | tojson if nested else value) -}}
{{- '\\n</parameter>\\n' -}}
{%- endfor -%}
{{- '</function>\\n</tool_call>' -}}"""
# Reasoning is shown where the model still works on the last question (Qwen3), always (MiniMind).
SHOWN = "{{- '<think>\\n' ~ (message.reasoning_content or '') ~ '\\n</think>\\n\\n' -}}"
WHILE_WORKING = (
    "{%- if loop.index0 > last.question and (message.reasoning_content or loop.last) -%}"
    + SHOWN
    + "{%- endif -%}"
)
CLOSED = "{{- '<think>\\n\\n</think>\\n\\n' -}}"
THINK_UNLESS = "{%- if enable_thinking is defined and enable_thinking is false -%}" + CLOSED
THINK_IF = (
    "{%- if open_thinking is defined and open_thinking %}{{ '<think>\\n' }}{% else -%}" + CLOSED
)


def _template(system: str, assistant: str, prompt: str, call: str = AS_JSON) -> str:
    filled = HEAD.replace("DEFAULT_SYSTEM", f"'{system}'").replace("CALL", call)
    return filled.replace("ASSISTANT\n", assistant).replace("PROMPT\n", prompt)


CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CALL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
THINK_TAGS = ("<think>", "</think>")
QWEN_SETTINGS = {
    "tokenizer_class": "Qwen2Tokenizer",
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": 4096,
}
STYLES = {
    "qwen3": Style(
        control=CONTROL,
        markers=(*CALL_TAGS, *THINK_TAGS),
        settings=QWEN_SETTINGS,
        template=_template("", WHILE_WORKING, THINK_UNLESS + "{%- endif -%}"),
    ),
    "qwen3_coder": Style(
        control=CONTROL,
        markers=CALL_TAGS,
        settings=QWEN_SETTINGS,
        template=_template("", "", "", IN_TAGS),
    ),
    "qwen2": Style(
        control=CONTROL,
        markers=CALL_TAGS[:2],
        settings=QWEN_SETTINGS,
        template=_template("You help.", "", ""),
    ),
    "minimind": Style(
        control=CONTROL,
        markers=(*CALL_TAGS, *THINK_TAGS),
        settings={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
        },
        template=_template("", SHOWN, THINK_IF + "{%- endif -%}"),
        control_first=True,
    ),
}


MODEL_TYPES = {"qwen3_coder": "qwen3_moe"}  # where it is not the style's name


def write_chat_tokenizer(directory: Path, style: str, vocab_size: int = 384) -> Path:
    """Write the tokenizer files of a style, with a config.json that names its family unless one is
    there.
    """
    write_tokenizer(directory, vocab_size, STYLES[style])
    config = directory / "config.json"
    if not config.exists():
        config.write_text(json.dumps({"model_type": MODEL_TYPES.get(style, style)}))
    return directory
