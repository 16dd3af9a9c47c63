"""Contexts under the chat templates of well-known models: equal text, the right end of a turn, no forged speaker."""

import datetime
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lm.encoder import Encoder
from lm.sampler import end_of_turn_ids
from tests.templates import TEMPLATES, Template, by_role, byte_tokenizer

DATE = "2025-01-31"
MESSAGES = ["go to desk 1", "You see an apple: red.", "nothing happens"]
ANSWERS = ["<think>where?</think><action>look</action>", "open it"]
MODEL = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))  # names no end of its own


def turns(messages, answers):
    conversation = [{"role": "user", "content": messages[0]}]
    for answer, message in zip(answers, messages[1:], strict=True):
        conversation += [{"role": "assistant", "content": answer}, {"role": "user", "content": message}]
    return conversation


class Clock(datetime.datetime):
    """Of a machine on which it is DATE."""

    @classmethod
    def now(cls, *_):
        return datetime.datetime.fromisoformat(DATE)


def by_transformers(tokenizer, conversation):
    return tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


@pytest.fixture(params=TEMPLATES)
def template(request):
    return TEMPLATES[request.param]


@pytest.mark.parametrize("cut_off", [False, True])
@pytest.mark.parametrize("style", ["chat", "window"])
def test_the_text_of_a_context_is_what_the_template_makes(template, style, cut_off):
    tokenizer = byte_tokenizer(template)
    encoder = Encoder(tokenizer, style, DATE)
    end = [] if cut_off or not template.closing else [tokenizer.convert_tokens_to_ids(template.closing)]
    responses = [tokenizer.encode(answer, add_special_tokens=False) + end for answer in ANSWERS]
    for count in range(3):
        context = encoder.context(MESSAGES[: count + 1], responses[:count])
        shown = turns(MESSAGES[: count + 1], [template.began + answer for answer in ANSWERS[:count]])
        shown = shown if style == "chat" else shown[-1:]
        assert tokenizer.decode(context) == by_transformers(tokenizer, shown)


ENDED = ["qwen2.5-instruct", "qwen2.5-base", "smollm2", "chatml", "gemma", "phi-4"]


@pytest.mark.parametrize("name", ENDED)
def test_a_response_that_ends_with_another_end_of_turn_gets_no_second_one(name):
    """The models' own lists of ends hold <|endoftext|>, too. What was sampled stays, and is extended."""
    template = TEMPLATES[name]
    tokenizer = byte_tokenizer(replace(template, special=template.special + " <|endoftext|>"))
    other, closing = tokenizer.convert_tokens_to_ids(["<|endoftext|>", template.closing])
    encoder = Encoder(tokenizer, "chat", DATE, ends=[other, closing])
    spoken = tokenizer.encode(ANSWERS[0], add_special_tokens=False)
    contexts = [encoder.context(MESSAGES[:1], [])]
    contexts += [encoder.context(MESSAGES[:2], [[*spoken, end]]) for end in (closing, other)]
    first, usual, ended = contexts
    assert ended[: len(first) + len(spoken) + 1] == first + spoken + [other]
    assert ended[len(first) + len(spoken) + 1 :] == usual[len(first) + len(spoken) + 1 :]
    cut_off = encoder.context(MESSAGES[:2], [spoken])
    assert cut_off == usual  # the template's own end where there is none


def test_a_template_without_an_end_of_turn_keeps_the_next_speakers_token():
    """GLM: a response may end with <|user|>, which begins the next turn, or with <|endoftext|>, which does not."""
    source = by_role("'<|user|>' + c", "'<|assistant|>' + c", prompt="'<|assistant|>'")
    tokenizer = byte_tokenizer(Template(source, None, "<|user|> <|assistant|>", eos="<|endoftext|>"))
    user, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|endoftext|>"])
    encoder = Encoder(tokenizer, "chat", DATE, ends=[user, end])
    texts = [tokenizer.decode(encoder.context(["a", "b"], [[*tokenizer.encode("x"), last]])) for last in (user, end)]
    opened = "<|user|>a<|assistant|>x"
    assert texts == [opened + "<|user|>b<|assistant|>", opened + "<|endoftext|><|user|>b<|assistant|>"]


def test_what_is_read_off_a_template(template):
    tokenizer = byte_tokenizer(template)
    encoder = Encoder(tokenizer, "chat", DATE)
    assert encoder.began == template.began
    assert encoder.extends == template.extends
    assert encoder._role_markers() == set(template.markers.split("\n")) - {""}
    ends = {template.eos} | ({template.closing} if template.closing else set())
    assert tokenizer.convert_ids_to_tokens(end_of_turn_ids(MODEL, tokenizer)) == sorted(
        ends, key=tokenizer.convert_tokens_to_ids
    )


@pytest.mark.parametrize("style", ["chat", "window"])
def test_no_text_from_outside_becomes_a_control_token_or_says_who_speaks(template, style):
    tokenizer = byte_tokenizer(template)
    encoder = Encoder(tokenizer, style, DATE)
    special = [*template.special.split(), template.bos, template.eos]
    markers = [marker for marker in template.markers.split("\n") if marker]
    forged = [*special, *markers, "".join(special), by_transformers(tokenizer, turns(MESSAGES, ANSWERS))]
    forged += [f"{token[:2]}{token}{token[2:]}" for token in (*special, *markers)]

    def said(text):
        """How often each control token and each marker is in a conversation with `text` in its messages."""
        answer = tokenizer.encode("look", add_special_tokens=False)
        context = encoder.context([f"see {text} now", f"{text} bed"], [answer])
        control = tokenizer.convert_tokens_to_ids(special)
        whole = tokenizer.decode(context)
        return [context.count(token) for token in control], [whole.count(marker) for marker in markers]

    for text in forged:
        assert said(text) == said("bed"), text


def test_tokens_for_tools_that_the_template_writes_are_not_forged_either():
    tokenizer = byte_tokenizer(TEMPLATES["qwen2.5-instruct"])
    tokenizer.add_tokens(["<tool_call>", "</think>", "<other>"])
    tokenizer.chat_template += "{% if tools %}{{ '<tool_call></think>' }}{% endif %}"
    text = tokenizer.decode(Encoder(tokenizer, "chat", DATE).context(["a <tool_call> b </think> c <other>"], []))
    assert "a < tool_call> b </think> c <other>" in text


def test_all_prompts_of_a_run_have_one_date():
    for name, printed in (("llama-3.2", "Today Date: 31 Jan 2025"), ("granite", "Today's Date: January 31, 2025")):
        tokenizer = byte_tokenizer(TEMPLATES[name])
        text = tokenizer.decode(Encoder(tokenizer, "chat", DATE).context(["look"], []))
        assert printed in text
        other = tokenizer.decode(Encoder(tokenizer, "chat", "2024-12-24").context(["look"], []))
        assert "31" not in other and "24" in other  # whatever the clock says
        today = Encoder(tokenizer, "chat")
        assert today.date == datetime.date.today().isoformat()
        assert today.context(["look"], []) == Encoder(tokenizer, "chat", today.date).context(["look"], [])


def test_a_template_that_rewrites_a_turn_because_of_a_message_is_an_error_not_a_cut():
    tokenizer = byte_tokenizer(TEMPLATES["chatml"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' and 'again' in messages[-1]['content'] %}{{ '<again>' }}"
        "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    encoder = Encoder(tokenizer, "chat", DATE)
    assert encoder.extends
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encoder.context(["look", "again"], [[5]])


# ---- tags that count as special tokens, and channels -----------------------------------------------------------------

TAGS = "<think> </think> <action> </action>"


def tagged(template):
    """The same template of a fine-tuned model that has tags among its special tokens."""
    return byte_tokenizer(replace(template, special=f"{template.special} {TAGS}"))


def test_tags_stay_in_prompts_and_answers_though_they_are_special_tokens(template):
    tokenizer = tagged(template)
    encoder = Encoder(tokenizer, "chat", DATE)
    prompt = "answer as <think>...</think><action>...</action>"
    assert prompt in tokenizer.decode(encoder.context([prompt], []))
    answer = "<think>there</think><action>go to cabinet 1</action>"
    ids = tokenizer.encode(answer, add_special_tokens=False)
    end = [tokenizer.convert_tokens_to_ids(template.closing)] if template.closing else []
    assert encoder.decode([*ids, *end]) == answer
    assert encoder.began == Encoder(byte_tokenizer(template), "chat", DATE).began


CHANNELS = "<|start|> <|end|> <|message|> <|channel|> <|return|>"


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("<|channel|>analysis<|message|><action>a</action><|end|><|start|>assistant"
         "<|channel|>final<|message|><action>b</action><|return|>", "<action>b</action>"),
        ("<|channel|>analysis<|message|><action>a</action>", ""),  # cut off before its answer
        ("<action>b</action><|return|>", "<action>b</action>"),
    ],
)  # fmt: skip
def test_of_channels_the_final_one_alone_is_the_answer(written, text):
    source = "{% for m in messages %}<|start|>{{ m.role }}<|channel|>final<|message|>{{ m.content }}<|end|>{% endfor %}"
    tokenizer = byte_tokenizer(Template(source + "<|start|>assistant", "<|end|>", special=CHANNELS, eos="<|return|>"))
    ids = tokenizer.encode(written, add_special_tokens=False)
    assert Encoder(tokenizer, "window", DATE).decode(ids) == text


def test_variables_of_a_template_can_be_given():
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ effort }}{% if enable_thinking %}<think>{% endif %}"
    tokenizer = byte_tokenizer(Template(source, None))
    assert tokenizer.decode(Encoder(tokenizer, "window", DATE).context(["x"], [])) == "x"
    encoder = Encoder(tokenizer, "window", DATE, {"effort": "low", "enable_thinking": "true"})
    assert tokenizer.decode(encoder.context(["x"], [])) == "xlow<think>" and encoder.began == "<think>"


@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "add_generation_prompt", "tokenize"])
def test_a_variable_that_no_template_reads_is_refused(name):
    with pytest.raises(ValueError, match=f"the chat template of this model has no variable '{name}' to set"):
        Encoder(byte_tokenizer(TEMPLATES["qwen3"]), "chat", options={name: "true"})
