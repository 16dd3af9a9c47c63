"""lm/writers.py: local models, a function of the user's, an OpenAI-compatible endpoint."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from lm import writers
from lm.writers import import_writer, model_writer, openai_writer

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


def test_model_writer_prompts_prefills_and_leaves_out_what_does_not_fit(tokenizer, monkeypatch):
    calls = []

    def generate(model, tokenizer, contexts, **options):
        calls.append((contexts, options, model.training))
        return [[5, 1], [6, 8, 1]]

    monkeypatch.setattr(writers, "generate", generate)
    model = torch.nn.Linear(1, 1)
    write = model_writer(
        model, tokenizer, max_new_tokens=4, temperature=0.5, context_limit=11, prefill="{ ", batch_tokens=99
    )
    answers = write(["one", "one two one two", "two two two"])
    # user one <end> assistant {      user two two two <end> assistant {      4 new tokens: 11 fit, 12 do not
    assert calls == [
        (
            [[3, 5, 1, 4, 7], [3, 6, 6, 6, 1, 4, 7]],
            {"max_new_tokens": 4, "temperature": 0.5, "token_budget": 99},
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
        tokenizer,
        max_new_tokens=6,
        temperature=1.0,
        context_limit=30,
        prefill='{"a": "',
        batch_tokens=4096,
    )
    answers = write(["one", "one two two", "two " * 40])
    assert answers[0].startswith('{"a": "') and answers[1].startswith('{"a": "') and answers[2] is None
    assert write(["two " * 40]) == [None]


# --- an OpenAI-compatible endpoint ---


@contextmanager
def server(answer):
    """`answer(request body, number of the request) -> (status, body)` on a free port of localhost; yields its URL."""
    lock, count = threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            nonlocal count
            with lock:
                count += 1
                number = count
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request |= {"path": self.path, "key": self.headers["Authorization"]}
            status, body = answer(request, number)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
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
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


OPTIONS = {"max_new_tokens": 7, "temperature": 0.5, "timeout": 5.0}


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


def test_openai_writer_counts_a_prompt_too_long_for_the_server(key):
    error = {"error": {"message": "This model's maximum context length is 8 tokens.", "code": None}}
    with server(lambda request, number: (400, error)) as url:
        assert openai_writer("m", base_url=url, **OPTIONS)(["p"]) == [None]


@pytest.mark.parametrize(
    "reply",
    [
        (500, {}),
        (401, {"error": {"message": "bad key"}}),
        (400, {"error": {"message": "unknown parameter"}}),
        (200, {}),
        (200, {"choices": []}),
        (200, b"not json"),
    ],
)
def test_openai_writer_says_which_server_is_broken(key, reply):
    with server(lambda request, number: reply) as url, pytest.raises(RuntimeError, match=url):
        openai_writer("m", base_url=url, retries=0, **OPTIONS)(["p", "p"])


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
