"""lm/writers.py: local models, a function of the user's, an OpenAI-compatible endpoint."""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from lm import writers
from lm.encoder import Encoder
from lm.obstacles import Mendable
from lm.writers import import_writer, model_writer, openai_writer, that_may_fail
from tests.settings import laptop

# --- a local model ---


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<end>", "<unk>", "user", "assistant", "one", "two", "{", "}"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ' ' + m.content + ' <end> ' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{{ '' if enable_thinking is false else ' one' }}{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("style", ["window", "chat"])
def test_model_writer_prompts_prefills_and_leaves_out_what_does_not_fit(style, tokenizer, monkeypatch):
    calls = []

    def generate(sampler, contexts):
        calls.append((contexts, sampler, model.training))
        return [[5, 1], [6, 8, 1]]

    monkeypatch.setattr(writers, "generate", generate)
    monkeypatch.setattr(writers, "Sampler", lambda model, tokenizer, **options: options)
    model = torch.nn.Linear(1, 1)
    write = model_writer(
        model,
        Encoder(tokenizer, style),
        max_new_tokens=4,
        temperature=0.5,
        context_limit=11,
        prefill="{ ",
        rollout_budget=99,
    )
    answers = write(["one", "one two one two", "two two two"])
    # user one <end> assistant {      user two two two <end> assistant {      4 new tokens: 11 fit, 12 do not
    assert calls == [
        (
            [[3, 5, 1, 4, 7], [3, 6, 6, 6, 1, 4, 7]],
            {"max_new_tokens": 4, "temperature": 0.5, "reuse_cache": False, "rollout_budget": 99, "token_budget": None},
            False,
        )
    ]
    assert answers == ["{ one", None, "{ two }"]
    assert model.training  # as it was


def test_model_writer_with_a_real_tiny_model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=9, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=1, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    write = model_writer(
        LlamaForCausalLM(config),
        Encoder(tokenizer, "window"),
        max_new_tokens=6,
        temperature=1.0,
        context_limit=30,
        prefill='{"a": "',
        rollout_budget=4096,
    )
    answers = write(["one", "one two two", "two " * 40])
    assert answers[0].startswith('{"a": "') and answers[1].startswith('{"a": "') and answers[2] is None
    assert write(["two " * 40]) == [None]


# --- an OpenAI-compatible endpoint ---


@contextmanager
def server(answer):
    """`answer(request body, its number) -> (status, body, *headers)` on a free port of localhost; yields its URL."""
    lock, count = threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            nonlocal count
            with lock:
                count += 1
                number = count
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request |= {"path": self.path, "key": self.headers["Authorization"]}
            status, body, *headers = answer(request, number)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.handle_error = lambda *args: None  # a client that gave up waiting is part of a test
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()


def completion(text):
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")


OPTIONS = {"max_new_tokens": 7, "temperature": 0.5, "timeout": 5.0}


def test_ctrl_c_does_not_wait_for_requests_under_way(key):
    held, answered = threading.Event(), []

    def answer(request, number):
        os.kill(os.getpid(), signal.SIGINT)
        held.wait(2)
        answered.append(number)
        return completion("late")

    with server(answer) as url:
        with pytest.raises(KeyboardInterrupt):
            openai_writer("m", base_url=url, **OPTIONS)(["p"])
        assert not answered
        held.set()


def test_openai_writer_answers_in_order(key):
    requests = []

    def answer(request, number):
        requests.append(request)
        prompt = request["messages"][0]["content"]
        time.sleep(0.1 if prompt == "p0" else 0)  # the first to be asked is the last to be answered
        return completion(None if prompt == "p2" else f"answer to {prompt}")

    with server(answer) as url:
        answers = openai_writer("m", base_url=url, **OPTIONS)(["p0", "p1", "p2", "p3"])
    assert answers == ["answer to p0", "answer to p1", "", "answer to p3"]
    first = next(r for r in requests if r["messages"][0]["content"] == "p0")
    assert first == {
        "messages": [{"role": "user", "content": "p0"}],
        "model": "m",
        "max_tokens": 7,
        "temperature": 0.5,
        "path": "/v1/chat/completions",
        "key": "Bearer secret",
    }


def test_openai_writer_works_on_after_a_failure(key):
    with server(lambda request, number: completion("ok") if number > 1 else (503, {})) as url:
        assert openai_writer("m", base_url=url, retries=1, **OPTIONS)(["p"]) == ["ok"]


REFUSALS = {  # what servers answer to one prompt that they do not take
    "OpenAI": (400, "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000."),
    "OpenAI's code": (400, "", "context_length_exceeded"),
    "vLLM": (
        400,
        "'max_tokens' or 'max_completion_tokens' is too large: 512. This model's maximum context length is 9.",
    ),
    "vLLM, old": (400, "max_tokens must be at least 1, got -1203."),
    "Anthropic": (400, "prompt is too long: 215000 tokens > 200000 maximum"),
    "llama.cpp": (400, "the request exceeds the available context size (4096 tokens), try increasing it"),
    "a rate limit below one prompt": (
        429,
        "Request too large for m on tokens per min (TPM): Limit 30000, Requested 41000",
    ),
    "a proxy": (413, "Payload Too Large"),
    "Azure": (400, "The response was filtered due to the prompt triggering Azure OpenAI's content management policy."),
    "Azure's code": (400, "", "content_filter"),
    "OpenRouter": (403, "Your chosen model requires moderation and your input was flagged"),
    "in words of its own": (400, "cannot do that"),
    "TGI": (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_prompt_that_the_endpoint_refuses_is_one_failed_answer(name, key, caplog):
    status, message, *code = REFUSALS[name]
    refusal = (status, {"error": {"message": message, "code": code[0] if code else None}})

    def answer(request, number):
        return refusal if request["messages"][0]["content"] == "bad" else completion("ok")

    with server(answer) as url:
        assert openai_writer("m", base_url=url, retries=0, **OPTIONS)(["p", "bad", "p"]) == ["ok", None, "ok"]
    (line,) = [record.getMessage() for record in caplog.records if record.name == "lm.writers"]
    assert "refused 1 of 3 prompts" in line and url in line and (message or code[0]) in line


@pytest.mark.parametrize("name", [name for name in REFUSALS if name not in ("a proxy", "in words of its own", "TGI")])
def test_every_prompt_may_be_refused_where_the_words_say_why(name, key):
    status, message, *code = REFUSALS[name]
    refusal = (status, {"error": {"message": message, "code": code[0] if code else None}})
    with server(lambda request, number: refusal) as url:
        assert openai_writer("m", base_url=url, retries=0, **OPTIONS)(["p", "p"]) == [None, None]


def test_a_refusal_of_every_prompt_that_has_nothing_to_do_with_them_stops_the_run(key):
    error = {"error": {"message": "'temperature' does not support 0.5\nwith this model. " + "x" * 5000}}
    with server(lambda request, number: (400, error)) as url, pytest.raises(RuntimeError) as raised:
        openai_writer("m", base_url=url, **OPTIONS)(["p", "p"])
    line = str(raised.value)
    assert line.startswith(f"{url}/ refuses every prompt: BadRequestError: ") and "'temperature' does not" in line
    assert "\n" not in line and len(line) < 600


def test_an_endpoint_that_has_answered_before_may_refuse_a_whole_batch(key):
    error = {"error": {"message": "cannot do that"}}
    with server(lambda request, number: completion("ok") if number == 1 else (400, error)) as url:
        write = openai_writer("m", base_url=url, **OPTIONS)
        assert [write(["p"]), write(["retry"])] == [["ok"], [None]]


def test_a_model_that_wants_max_completion_tokens_is_asked_so_from_then_on(key):
    text = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    names = []

    def answer(request, number):
        names.append({"max_tokens", "max_completion_tokens"} & request.keys())
        assert 7 in (request.get("max_tokens"), request.get("max_completion_tokens"))
        return completion("ok") if "max_completion_tokens" in request else (400, {"error": {"message": text}})

    with server(answer) as url:
        write = openai_writer("m", base_url=url, concurrency=1, **OPTIONS)
        assert [write(["p", "p"]), write(["p"])] == [["ok", "ok"], ["ok"]]
    assert names == [{"max_tokens"}, *[{"max_completion_tokens"}] * 3]
    refused = lambda request, number: (400, {"error": {"message": text}})  # whatever it is asked: twice, not for ever
    with server(refused) as url, pytest.raises(RuntimeError, match="refuses every prompt"):
        openai_writer("m", base_url=url, **OPTIONS)(["p"])


@pytest.mark.parametrize(
    "reply",
    [
        (500, {}),
        (401, {"error": {"message": "bad key"}}),
        (404, {"error": {"message": "The model `m` does not exist"}}),
        (400, {"error": {"message": "unknown parameter"}}),
        (429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}),
        (200, {}),
        (200, {"choices": []}),
        (200, b"not json"),
    ],
)
def test_openai_writer_says_which_server_is_broken(key, reply):
    with server(lambda request, number: reply) as url, pytest.raises(RuntimeError, match=url):
        openai_writer("m", base_url=url, retries=0, **OPTIONS)(["p", "p"])


PARTS = {  # what an answer's content may be -> its text
    "nothing": (None, ""),
    "no part": ([], ""),
    "parts": ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "a b"),
    "thoughts before it": (
        [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "a"}],
        "a",
    ),
    "parts of another API": ([{"type": "output_text", "text": "a"}], "a"),
    "parts without a type": ([{"text": "a"}, "b"], "ab"),
}


@pytest.mark.parametrize("name", PARTS)
def test_content_in_parts_is_read(name, key):
    content, text = PARTS[name]
    with server(lambda request, number: completion(content)) as url:
        assert openai_writer("m", base_url=url, **OPTIONS)(["p", "p"]) == [text, text]


@pytest.mark.parametrize("content", [7, {"text": "a"}, [7], [{"type": "text", "text": None}], [None], True])
def test_content_that_is_no_text_is_refused_clearly(content, key):
    with server(lambda request, number: completion(content)) as url, pytest.raises(RuntimeError) as raised:
        openai_writer("m", base_url=url, **OPTIONS)(["p", "p"])
    assert str(raised.value).startswith(f"no usable answer from {url}/: ValueError: its content is no text: ")


@pytest.mark.parametrize("reply", [(200, {"error": {"message": "overloaded"}}), (200, {"choices": []})])
def test_an_answer_that_is_no_completion_is_shown(reply, key):
    with server(lambda request, number: reply) as url, pytest.raises(Mendable, match="no chat completion") as raised:
        openai_writer("m", base_url=url, retries=0, **OPTIONS)(["p"])
    assert "\n" not in str(raised.value) and ("overloaded" in str(raised.value)) == ("overloaded" in str(reply))


def test_a_writer_that_may_fail_costs_its_batch_the_skills(key, caplog):
    answers = {1: completion("a"), 3: completion("b")}
    with server(lambda request, number: answers.get(number, (401, {"error": {"message": "gone"}}))) as url:
        write = that_may_fail(openai_writer("m", base_url=url, retries=0, concurrency=1, **OPTIONS))
        assert [write(["p"]), write(["p", "p"]), write(["p"])] == [["a"], [None, None], ["b"]]
    assert f"no skills for 2 episodes: no usable answer from {url}/: AuthenticationError" in caplog.text
    with pytest.raises(ValueError, match="--skills-may-fail is for --skill-writer openai"):
        laptop(skills_may_fail=True)
    with pytest.raises(ZeroDivisionError):  # a bug is none of its business
        that_may_fail(lambda prompts: 1 / 0)(["p"])


BUSY = {"error": {"message": "Rate limit reached for m", "code": "rate_limit_exceeded"}}


@pytest.mark.parametrize("header", [("Retry-After", "0.05"), ("retry-after-ms", "50")])
def test_a_busy_server_is_asked_again_when_it_says_so(header, key, caplog):
    """However often: retries are for what is broken."""
    answer = lambda request, number: (429, BUSY, header) if number % 4 else completion("ok")
    with server(answer) as url:
        assert openai_writer("m", base_url=url, retries=0, **OPTIONS)(["p"] * 6) == ["ok"] * 6
    first, last = [record.getMessage() for record in caplog.records if record.name == "lm.writers"]
    assert first == f"{url}/ answers 429 (too many requests): waiting 0.05 s"
    assert last == f"{url}/ answered 429 (too many requests) 18 times: 1 s of waiting"


def test_what_a_busy_server_asks_for():
    def asked(**headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return writers._asked_pause(SimpleNamespace(response=SimpleNamespace(headers=headers)))

    assert asked(retry_after="90") == 90 and asked(retry_after_ms="1500") == 1.5
    assert 50 < asked(retry_after=formatdate(time.time() + 60, usegmt=True)) <= 61
    for unreadable in ("soon", "-1", "0", "nan", "inf", "", "1e999", formatdate(0)):
        assert asked(retry_after=unreadable) is None
    assert asked() is None


def test_minutes_of_waiting_are_borne_and_no_more(key, monkeypatch):
    pauses = []
    event = lambda: SimpleNamespace(
        clear=lambda: None, set=lambda: None, is_set=lambda: False, wait=lambda seconds: pauses.append(seconds)
    )
    monkeypatch.setattr(writers, "threading", SimpleNamespace(Event=event, Lock=threading.Lock))
    busy = lambda request, number: (429, BUSY, ("Retry-After", "100"))
    write = lambda url, **options: openai_writer("m", base_url=url, concurrency=1, **OPTIONS, **options)
    monkeypatch.setattr(writers, "ThreadPoolExecutor", InLine)
    with server(busy) as url, pytest.raises(RuntimeError, match=f"{url}.*RateLimitError.*Rate limit reached"):
        write(url)(["p"])
    assert pauses == [100] * 6
    pauses.clear()
    with server(lambda request, number: (429, BUSY)) as url, pytest.raises(RuntimeError, match="RateLimitError"):
        write(url, patience=200)(["p"])  # without a word of how long: longer each time
    assert pauses == [2, 4, 8, 16, 32, 60, 60]


class InLine:
    """An executor without threads."""

    def __init__(self, workers):
        self.map = map

    def shutdown(self, **options):
        pass


def test_who_waits_does_not_outlive_a_batch_that_has_failed(key):
    def answer(request, number):
        bad = request["messages"][0]["content"] == "bad"
        return (401, {"error": {"message": "bad key"}}) if bad else (429, BUSY, ("Retry-After", "300"))

    began = time.monotonic()
    with server(answer) as url, pytest.raises(RuntimeError, match=r"AuthenticationError.*bad key"):
        openai_writer("m", base_url=url, **OPTIONS)(["p", "p", "bad"])
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_no_proxy_is_asked_for_a_server_on_this_machine(name, key, monkeypatch):
    for other in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    with server(lambda request, number: completion("ok")) as url:
        for host in ("127.0.0.1", "localhost"):
            there = url.replace("127.0.0.1", host)
            assert openai_writer("m", base_url=there, retries=0, **OPTIONS)(["p"]) == ["ok"]
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        assert openai_writer("m", base_url=None, retries=0, **OPTIONS)(["p"]) == ["ok"]


def test_openai_writer_on_a_dead_server(key):
    with server(lambda request, number: completion("ok")) as url:
        pass  # its port is closed now
    with pytest.raises(RuntimeError, match=url):
        openai_writer("m", base_url=url, retries=0, **OPTIONS)(["what did it teach?"])


def test_openai_writer_times_out(key):
    def slow(request, number):
        time.sleep(0.5)
        return completion("late")

    with server(slow) as url, pytest.raises(RuntimeError, match=f"{url}.*Timeout"):
        openai_writer("m", base_url=url, retries=0, **OPTIONS | {"timeout": 0.1})(["p"])


def test_openai_writer_wants_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        openai_writer("m", base_url="http://127.0.0.1:9/v1", **OPTIONS)


def test_openai_is_not_imported_unless_asked_for():
    assert not hasattr(writers, "openai")


# --- a function of the user's ---


def mine(prompts):
    return [f"about {prompt}" for prompt in prompts]


def too_few(prompts):
    return prompts[1:]


def numbers(prompts):
    return [1 for _ in prompts]


NOT_CALLABLE = "text"


def test_a_function_of_the_users_writes():
    assert import_writer(f"{__name__}:mine")(["a", "b"]) == ["about a", "about b"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:write", "no_such_module"),
        (f"{__name__}:nothing", "nothing"),
        (f"{__name__}:NOT_CALLABLE", "is no function"),
    ],
)
def test_a_writer_that_is_not_there_is_named(name, message):
    with pytest.raises(ValueError, match=f"--skill-writer {name}.*{message}"):
        import_writer(name)


@pytest.mark.parametrize(("function", "message"), [("too_few", "a list of 2 answers"), ("numbers", "not int")])
def test_a_writer_that_returns_something_else_is_told_so(function, message):
    with pytest.raises(ValueError, match=message):
        import_writer(f"{__name__}:{function}")(["a", "b"])
