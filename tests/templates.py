"""Chat templates of well-known models, the branches for tools left out, and what is true of each, found by reading.

special: control tokens beside bos and eos; closing: what ends an assistant's turn (None: no control token does);
markers: what the template spells in plain text to say who speaks; began: how it starts an answer; extends: whether a
conversation is its turns one after another.
"""

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass
class Template:
    text: str
    closing: str | None
    special: str = ""
    markers: str = ""  # a line each
    eos: str = "</s>"
    bos: str = "<s>"
    began: str = ""
    extends: bool = True


def byte_tokenizer(template: Template) -> PreTrainedTokenizerFast:
    """A token for each byte and each control token, so that a context's text says everything about its ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*template.special.split(), template.bos, template.eos]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=template.bos,
        eos_token=template.eos,
        chat_template=template.text,
        clean_up_tokenization_spaces=False,
    )


def by_role(user: str, assistant: str, system: str = "''", *, before: str = "", prompt: str = "''") -> str:
    """A template that writes each message by its role. Arguments but `before` are Jinja expressions of c, the text."""
    return (
        before + "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'user' %}{{ " + user + " }}"
        "{% elif m['role'] == 'assistant' %}{{ " + assistant + " }}{% else %}{{ " + system + " }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ " + prompt + " }}{% endif %}"
    )


def chatml(before: str = "", prompt: str = r"'<|im_start|>assistant\n'") -> str:
    return (
        before + "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ " + prompt + " }}{% endif %}"
    )


def default_system(text: str) -> str:
    return "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n" + text + "<|im_end|>\\n' }}{% endif %}"


QWEN25 = chatml(default_system("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."))
# Thoughts of turns before the last question are dropped; with enable_thinking off an empty thought starts the answer.
QWEN3 = r"""{%- set ns = namespace(last=messages|length - 1) %}
{%- for m in messages[::-1] %}{%- set i = (messages|length - 1) - loop.index0 %}
{%- if ns.last == messages|length - 1 and m.role == 'user' %}{%- set ns.last = i %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role in ('user', 'system') %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- else %}{%- set content = m.content %}{%- set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}PROMPT{%- endif %}"""
NO_THINKING = (
    r"{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set c = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set c = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + c.strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + c.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
MISTRAL1 = ALTERNATING + (
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
MISTRAL3 = ALTERNATING + (
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
HEADERS = "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>"
HEADER = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>'"
ANSWER_HEADER = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
LLAMA3 = (
    "{% for m in messages %}{% set c = " + HEADER + " %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}"
    "{{ c }}{% endfor %}" + ANSWER_HEADER
)
LLAMA32 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n" }}'
    '{{- "Today Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}'
    "{%- for m in messages %}{{- " + HEADER + " }}{%- endfor %}" + ANSWER_HEADER
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set c = m['content'] %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + c + '<｜end▁of▁sentence｜>' }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
GRANITE = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set system = \"Knowledge Cutoff Date: April 2024.\\nToday's Date: \" + strftime_now('%B %d, %Y') "
    '+ ".\\nYou are Granite, developed by IBM." %}{%- set rest = messages %}{%- endif %}'
    "{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}{%- for m in rest %}"
    "{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)
TURN, SPEAKERS = "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>"
IM = "<|im_start|> <|im_end|>"

TEMPLATES = {
    "chatml": Template(chatml(), "<|im_end|>", IM, eos="<|im_end|>"),
    "qwen2.5-instruct": Template(QWEN25, "<|im_end|>", IM + " <|endoftext|>", eos="<|im_end|>"),
    "qwen2.5-base": Template(QWEN25, "<|im_end|>", IM, eos="<|endoftext|>"),
    "qwen3": Template(QWEN3.replace("PROMPT", NO_THINKING), "<|im_end|>", IM, eos="<|im_end|>", extends=False),
    "qwen3-thinking": Template(
        QWEN3.replace("PROMPT", r"{{- '<think>\n' }}"),
        "<|im_end|>",
        IM,
        eos="<|im_end|>",
        began="<think>\n",
        extends=False,
    ),
    "smollm2": Template(
        chatml(default_system("You are a helpful AI assistant named SmolLM, trained by Hugging Face")),
        "<|im_end|>",
        IM + " <|endoftext|>",
        eos="<|im_end|>",
    ),
    "chatml-in-plain-text": Template(chatml(), None, markers="<|im_start|>\n<|im_end|>"),
    "llama-2": Template(LLAMA2, "</s>", markers="[INST]\n[/INST]\n<<SYS>>\n<</SYS>>", extends=False),
    "llama-3": Template(LLAMA3, "<|eot_id|>", HEADERS, eos="<|eot_id|>", bos="<|begin_of_text|>"),
    "llama-3.2": Template(LLAMA32, "<|eot_id|>", HEADERS, eos="<|eot_id|>", bos="<|begin_of_text|>"),
    "mistral-v0.1": Template(MISTRAL1, "</s>", markers="[INST]\n[/INST]"),
    "mistral-v0.3": Template(MISTRAL3, "</s>", "[INST] [/INST]", extends=False),
    "zephyr": Template(
        by_role(
            r"'<|user|>\n' + c + eos_token + '\n'",
            r"'<|assistant|>\n' + c + eos_token + '\n'",
            r"'<|system|>\n' + c + eos_token + '\n'",
            prompt=r"'<|assistant|>\n'",
        ),
        "</s>",
        markers="<|user|>\n<|assistant|>\n<|system|>",
    ),
    "gemma": Template(GEMMA, "<end_of_turn>", "<start_of_turn> <end_of_turn>", eos="<eos>", bos="<bos>"),
    "phi-3": Template(
        by_role(
            r"'<|user|>\n' + c + '<|end|>\n'",
            r"'<|assistant|>\n' + c + '<|end|>\n'",
            r"'<|system|>\n' + c + '<|end|>\n'",
            prompt=r"'<|assistant|>\n'",
        ),
        "<|end|>",
        "<|user|> <|assistant|> <|system|> <|end|>",
        eos="<|endoftext|>",
    ),
    "phi-4": Template(
        by_role(
            "'<|im_start|>user<|im_sep|>' + c + '<|im_end|>'",
            "'<|im_start|>assistant<|im_sep|>' + c + '<|im_end|>'",
            "'<|im_start|>system<|im_sep|>' + c + '<|im_end|>'",
            prompt="'<|im_start|>assistant<|im_sep|>'",
        ),
        "<|im_end|>",
        IM + " <|im_sep|>",
        eos="<|endoftext|>",
    ),
    "deepseek-r1": Template(
        R1,
        "<｜end▁of▁sentence｜>",
        "<｜User｜> <｜Assistant｜>",
        eos="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        began="<think>\n",
        extends=False,
    ),
    "olmo-2": Template(
        by_role(
            r"'<|user|>\n' + c + '\n'",
            r"'<|assistant|>\n' + c + eos_token + ('' if loop.last else '\n')",
            r"'<|system|>\n' + c + '\n'",
            before="{{ bos_token }}",
            prompt=r"'<|assistant|>\n'",
        ),
        "<|endoftext|>",
        markers="<|user|>\n<|assistant|>\n<|system|>",
        eos="<|endoftext|>",
        bos="<|endoftext|>",
    ),
    "granite": Template(
        GRANITE, "<|end_of_text|>", "<|start_of_role|> <|end_of_role|>", eos="<|end_of_text|>", bos="<|end_of_text|>"
    ),
    "command-r": Template(
        by_role(
            f"'{TURN}<|USER_TOKEN|>' + c + '<|END_OF_TURN_TOKEN|>'",
            f"'{TURN}<|CHATBOT_TOKEN|>' + c + '<|END_OF_TURN_TOKEN|>'",
            f"'{TURN}<|SYSTEM_TOKEN|>' + c + '<|END_OF_TURN_TOKEN|>'",
            before="{{ bos_token }}",
            prompt=f"'{TURN}<|CHATBOT_TOKEN|>'",
        ),
        "<|END_OF_TURN_TOKEN|>",
        f"{TURN} {SPEAKERS}",
        eos="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
    ),
    "falcon": Template(
        by_role(
            r"'User: ' + c + '\n\n'",
            r"'Assistant: ' + c + '\n\n'",
            r"c + '\n\n'",
            prompt="'Assistant:'",
        ),
        None,
        markers="User:\nAssistant:",
        eos="<|endoftext|>",
        extends=False,
    ),
    "vicuna": Template(
        by_role(
            "'USER: ' + c + ' '",
            "'ASSISTANT: ' + c + eos_token",
            r"c + '\n\n'",
            before="{{ bos_token }}",
            prompt="'ASSISTANT: '",
        ),
        "</s>",
        markers="USER:\nASSISTANT:",
    ),
    "alpaca": Template(
        by_role(
            r"'### Instruction:\n' + c + '\n\n'",
            r"'### Response:\n' + c + eos_token + '\n\n'",
            r"c + '\n\n'",
            before="{{ bos_token }}",
            prompt=r"'### Response:\n'",
        ),
        "</s>",
        markers="### Instruction:\n### Response:",
    ),
    "openchat": Template(
        by_role(
            "'GPT4 Correct User: ' + c + '<|end_of_turn|>'",
            "'GPT4 Correct Assistant: ' + c + '<|end_of_turn|>'",
            "c + '<|end_of_turn|>'",
            before="{{ bos_token }}",
            prompt="'GPT4 Correct Assistant:'",
        ),
        "<|end_of_turn|>",
        "<|end_of_turn|>",
        markers="GPT4 Correct User:\nGPT4 Correct Assistant:",
        extends=False,
    ),
    "glm-4": Template(  # what ends a turn is what begins the next one, and the model's own list of ends has it
        by_role(
            r"'<|user|>\n' + c",
            r"'<|assistant|>\n' + c",
            r"'<|system|>\n' + c",
            before="[gMASK]<sop>",
            prompt="'<|assistant|>'",
        ),
        None,
        "[gMASK] <sop> <|user|> <|assistant|> <|system|>",
        eos="<|endoftext|>",
        extends=False,
    ),
}
