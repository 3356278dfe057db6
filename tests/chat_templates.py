"""Chat templates in the manner of published models, and conversations that use what they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TEMPLATES: Mapping[str, str] = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "headers": (  # as in Llama 3: a begin token, headers, trimmed contents, a date
        "{{- bos_token }}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system = messages[0]['content'] | trim %}\n"
        "    {%- set messages = messages[1:] %}\n"
        "{%- else %}{%- set system = '' %}{%- endif %}\n"
        "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday is ' + strftime_now('%Y') + '\\n\\n' + system }}\n"
        "{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim }}\n"
        "    {{- eos_token }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
    ),
    "tools": (  # as in Falcon-H1-Instruct: tools as JSON in the system turn, calls and answers as tagged JSON
        "{{ bos_token }}\n"
        "{%- if tools %}\n"
        "    {{- '<|im_start|>system\\n' }}\n"
        "    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}\n"
        "    {{- 'The functions are within <tools></tools>:\\n<tools>[' }}\n"
        "    {%- for tool in tools %}{{- tool | tojson }}{{ ', ' if not loop.last }}{%- endfor %}\n"
        "    {{- ']</tools><|im_end|>\\n' }}\n"
        "{%- elif messages[0].role == 'system' %}\n"
        "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n"
        "{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
        "    {%- elif message.role == 'assistant' %}\n"
        "        {{- '<|im_start|>assistant' }}\n"
        "        {%- for call in message.tool_calls %}\n"
        "            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}\n"
        "            {{- '\\n<tool_call>\\n' + {'name': call.name, 'arguments': call.arguments} | tojson(indent=2) }}\n"
        "            {{- '\\n</tool_call>' }}\n"
        "        {%- endfor %}\n"
        "        {{- '<|im_end|>\\n' }}\n"
        "    {%- elif message.role == 'tool' %}\n"
        "        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}\n"
        "        {{- '\\n</tool_response><|im_end|>\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
    ),
    "no_system": (  # as in Gemma: turns alternate, and there is no system message
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "thinking": (  # as in Qwen 3: a namespace, loop controls, a macro, reasoning that only the last turns keep
        "{%- macro turn(role, text) %}{{- '<|im_start|>' ~ role ~ '\\n' ~ text ~ '<|im_end|>\\n' }}{%- endmacro %}\n"
        "{%- set ns = namespace(last=messages | length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n"
        "    {%- if message.role == 'user' %}\n"
        "        {%- set ns.last = messages | length - loop.index %}{%- break %}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'tool' %}{%- continue %}{%- endif %}\n"
        "    {%- if message.reasoning_content is defined and loop.index0 > ns.last %}\n"
        "        {%- set text = '<think>\\n' + message.reasoning_content + '\\n</think>\\n' + message.content %}\n"
        "        {{- turn(message.role, text) }}\n"
        "    {%- else %}{{- turn(message.role, message.content) }}{%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and not enable_thinking %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endif %}"
    ),
    "blocks": (  # blocks on lines of their own, the tag for what the model wrote, unicode, a dict, an absent token
        "{% for message in messages %}\n"
        "  {% if message.role == 'assistant' %}\n"
        "    {% generation %}\n"
        "[{{ message.content | upper }}] «{{ unk_token }}»\n"
        "    {% endgeneration %}\n"
        "  {% else %}\n"
        "{{ dict(role=message.role, content=message.content) | tojson }}\n"
        "  {% endif %}\n"
        "{% endfor %}\n"
    ),
}

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Orléans", "days": [1, 2.5, None]}}}
CONVERSATIONS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "question": [{"role": "user", "content": "What is 2 < 3 & 'x'?"}],
    "system": [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "  hi  "}],
    "turns": [
        {"role": "user", "content": "Ünïcode → 漢字 \U0001f600"},
        {"role": "assistant", "content": "yes \n", "reasoning_content": "hm"},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
    ],
    "calls": [
        {"role": "user", "content": "How is it there?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sky": "blue"}'},
        {"role": "assistant", "content": "Fine.", "thinking": "The sky is blue.", "tool_calls": None},
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}},
    }
]
