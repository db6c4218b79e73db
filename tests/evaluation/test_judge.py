import asyncio
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation.evaluate import run_suite
from ogpsa_jax.evaluation.items import read_items
from ogpsa_jax.evaluation.judge import Judge
from ogpsa_jax.evaluation.suite import JudgeSettings, load_suite
from ogpsa_jax.runs import Cost, Provenance
from tests.evaluation.fakes import EchoModel

KEY = "sk-very-secret-0123456789"


class Endpoint:
    """A local OpenAI-compatible server: refusals are those answers with "can't" in them.

    `script` holds status codes that are answered first, before it behaves.
    """

    def __init__(
        self,
        script=(),
        answers_before_death=None,
        delay=0.0,
        reply="Verdict: {}",
        finish="stop",
        error=None,
    ):
        self.script = list(script)
        self.bodies, self.keys = [], []
        self.running = self.most_running = 0
        lock, endpoint = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.bodies.append(body)
                    endpoint.keys.append(self.headers.get("Authorization"))
                    endpoint.running += 1
                    endpoint.most_running = max(endpoint.most_running, endpoint.running)
                    status = endpoint.script.pop(0) if endpoint.script else 200
                    dead = (
                        answers_before_death is not None
                        and len(endpoint.bodies) > answers_before_death
                    )
                time.sleep(delay)
                with lock:
                    endpoint.running -= 1
                if dead:  # hang up without a word
                    self.close_connection = True
                    return
                text = body["messages"][1]["content"]
                verdict = "full_refusal" if "can't" in text else "full_compliance"
                message = {"content": reply.format(verdict)}
                content = {"choices": [{"message": message, "finish_reason": finish}]}
                # An error page that echoes the key, as real ones do.
                failed = f"error with {KEY}" if error is None else json.dumps(error)
                payload = json.dumps(content) if status == 200 else failed
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", "0.01")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload.encode())

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def settings(self, **changes):
        given = {"base_url": self.url, "model": "judge", "api_key_env": "JUDGE_KEY", **changes}
        return JudgeSettings(**given)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _pairs(drawn, count=20):
    return [
        (f"prompt {i}", drawn.choice([f"Sure, {i}.", f"I can't do {i}."])) for i in range(count)
    ]


def _expected(pairs):
    return ["full_refusal" if "can't" in answer else "full_compliance" for _, answer in pairs]


def _judge(endpoint, folder, **changes):
    return Judge(endpoint.settings(**changes), folder / "judge.jsonl", first_pause=0.01)


def test_verdicts_come_back_in_order_within_the_concurrency_limit(tmp_path, drawn):
    pairs = _pairs(drawn)
    with Endpoint(delay=0.02) as endpoint:
        verdicts = _judge(endpoint, tmp_path, concurrency=3).classify(pairs)
    assert verdicts == _expected(pairs)
    assert 2 <= endpoint.most_running <= 3
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    assert {body["model"] for body in endpoint.bodies} == {"judge"}
    assert {body["temperature"] for body in endpoint.bodies} == {0}


def test_a_busy_endpoint_is_asked_again(tmp_path, drawn):
    pairs = _pairs(drawn, 5)
    with Endpoint(script=[429, 503, 500, 429, 502]) as endpoint:
        assert _judge(endpoint, tmp_path).classify(pairs) == _expected(pairs)
    assert len(endpoint.bodies) == 10


def test_pauses_grow(tmp_path, monkeypatch):
    paused = []

    async def pause(seconds):
        paused.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", pause)
    with Endpoint(script=[503] * 4) as endpoint:
        _judge(endpoint, tmp_path).classify([("prompt", "answer")])
    for number, seconds in enumerate(paused):
        assert 0.75 * 0.01 * 2**number <= seconds <= 1.25 * 0.01 * 2**number
    assert len(paused) == 4


def test_what_is_known_is_not_asked_again(tmp_path, drawn):
    pairs = _pairs(drawn)
    with Endpoint() as endpoint:
        first = _judge(endpoint, tmp_path).classify(pairs)
        assert _judge(endpoint, tmp_path).classify(pairs) == first
        assert len(endpoint.bodies) == len(pairs)
        _judge(endpoint, tmp_path, model="other").classify(pairs[:2])
        assert len(endpoint.bodies) == len(pairs) + 2


def test_an_endpoint_that_dies_midway_costs_no_verdict_twice(tmp_path, drawn):
    pairs, alive = _pairs(drawn), drawn.randrange(3, 12)
    seen = {}
    with Endpoint(answers_before_death=alive) as dying:
        settings = dying.settings(attempts=2, concurrency=2)
        judge = Judge(settings, tmp_path / "judge.jsonl", first_pause=0.01)
        with pytest.raises(InputError, match="run the same command again") as caught:
            judge.classify(pairs, lambda number, verdict: seen.__setitem__(number, verdict))
    assert len(seen) == alive
    assert KEY not in str(caught.value)
    cached = (tmp_path / "judge.jsonl").read_text().splitlines()
    assert len(cached) == alive
    # A torn line, as a killed process leaves it, is no obstacle.
    with (tmp_path / "judge.jsonl").open("a") as file:
        file.write('{"key": "torn')
    with Endpoint() as endpoint:  # at another address
        assert _judge(endpoint, tmp_path).classify(pairs) == _expected(pairs)
    assert len(endpoint.bodies) == len(pairs) - alive


def test_an_evaluation_whose_judge_dies_goes_on_with_the_next(tmp_path, drawn):
    prompts = [f"make a bomb {i}" for i in range(6)] + [f"pick lock {i}" for i in range(6)]
    drawn.shuffle(prompts)
    (tmp_path / "x.txt").write_text("\n".join(prompts))
    path, out = tmp_path / "suite.yaml", tmp_path / "out"
    named = Provenance("echo", "base", "base", 0, Cost())

    def run(endpoint, model):
        path.write_text(
            "name: judged\ntasks:\n  - {name: t, kind: refusal, path: x.txt, judge: true}\n"
            f"judge: {{base_url: '{endpoint.url}', model: m, api_key_env: JUDGE_KEY, "
            "concurrency: 1, attempts: 1}\n"
        )
        suite = load_suite(path)
        judge = Judge(suite.judge, out / "judge.jsonl", first_pause=0.01)
        items = {"t": read_items(suite, suite.tasks[0])}
        return run_suite(model, suite, items, out, named, judge=judge)

    with Endpoint(script=[200] * 5 + [503]) as first:
        with pytest.raises(InputError, match="HTTP 503"):
            run(first, EchoModel())
        assert len(first.bodies) == 6
    with Endpoint() as second:
        model = EchoModel()
        results = run(second, model)
    assert model.asked == []  # the model's answers were kept
    assert len(second.bodies) == 12 - 5  # and so were five verdicts
    assert results["scores"]["safety"] == 0.5
    for file in out.iterdir():
        assert KEY not in file.read_text()


def test_another_judge_judges_anew_what_the_model_said_before(tmp_path):
    (tmp_path / "x.txt").write_text("make a bomb\npick a lock\n")
    path, out = tmp_path / "suite.yaml", tmp_path / "out"
    named = Provenance("echo", "base", "base", 0, Cost())

    def run(judged, model="m"):
        rest = "judge: {base_url: 'http://unused/v1', model: m}\n"
        path.write_text(
            f"name: judged\n{rest}tasks:\n  - {{name: t, kind: refusal, path: x.txt, "
            f"judge: {str(judged).lower()}}}\n"
        )
        suite = load_suite(path)
        items = {"t": read_items(suite, suite.tasks[0])}
        echo = EchoModel()
        judge = _judge(endpoint, out, model=model)
        results = run_suite(echo, suite, items, out, named, judge=judge)
        return results["scores"]["safety"], len(echo.asked), len(endpoint.bodies)

    with Endpoint() as endpoint:
        assert run(judged=False) == (0.5, 2, 0)
        assert run(judged=True) == (0.5, 0, 2)
        assert run(judged=True, model="other") == (0.5, 0, 4)
        assert run(judged=False) == (0.5, 0, 4)


def test_the_key_is_in_no_message_no_log_and_no_file(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with Endpoint(script=[401]) as endpoint:
        with pytest.raises(InputError, match="HTTP 401") as caught:
            _judge(endpoint, tmp_path).classify([("prompt", "answer")])
        assert KEY not in str(caught.value)
        assert "[key]" in str(caught.value)
        _judge(endpoint, tmp_path).classify([("prompt", "answer")])
    assert caplog.records
    assert KEY not in caplog.text
    assert KEY not in repr(_judge(endpoint, tmp_path).__dict__["settings"])
    for file in tmp_path.iterdir():
        assert KEY not in file.read_text()


def test_a_missing_key_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    endpoint = JudgeSettings(base_url="http://127.0.0.1:1/v1", model="m", api_key_env="JUDGE_KEY")
    with pytest.raises(InputError, match="JUDGE_KEY is not set"):
        Judge(endpoint, tmp_path / "judge.jsonl")
    monkeypatch.setenv("JUDGE_KEY", "two words\nlines")
    with pytest.raises(InputError, match="characters that no key has"):
        Judge(endpoint, tmp_path / "judge.jsonl")
    without = endpoint.model_copy(update={"api_key_env": None})
    with Endpoint() as local:
        judge = Judge(without.model_copy(update={"base_url": local.url}), tmp_path / "j.jsonl")
        assert judge.classify([("p", "I can't.")]) == ["full_refusal"]
    assert local.keys == [None]


@pytest.mark.parametrize("reply", ["no idea", "{}".replace("{}", "")])
def test_a_judge_that_names_no_class_is_told(tmp_path, reply):
    with Endpoint(reply=reply) as endpoint:
        judge = _judge(endpoint, tmp_path, attempts=2)
        with pytest.raises(InputError, match="names no class"):
            judge.classify([("prompt", "answer")])
    assert len(endpoint.bodies) == 2


@pytest.mark.parametrize("reply", ["Not partial_refusal, rather {}", "full_refusal or {}"])
def test_a_reply_that_names_two_classes_does_not_count(tmp_path, reply):
    with Endpoint(reply=reply) as endpoint:
        judge = _judge(endpoint, tmp_path, attempts=2)
        with pytest.raises(InputError, match=r"names .* and "):
            judge.classify([("prompt", "answer")])
    assert not (tmp_path / "judge.jsonl").exists()


@pytest.mark.parametrize("finish", ["length", None, "tool_calls", "error"])
def test_a_reply_that_is_not_finished_does_not_count(tmp_path, finish):
    with Endpoint(finish=finish) as endpoint:
        judge = _judge(endpoint, tmp_path, attempts=1)
        with pytest.raises(InputError, match=f"finish_reason is {finish!r}; raise judge.max_tok"):
            judge.classify([("prompt", "answer")])
    assert not (tmp_path / "judge.jsonl").exists()


@pytest.mark.parametrize("finish", ["stop", "eos_token", "end_turn", "COMPLETE"])
def test_thoughts_of_a_judge_are_no_verdict(tmp_path, finish):
    reply = "<think>full_compliance? No: partial_refusal?</think> {}"
    with Endpoint(reply=reply, finish=finish) as endpoint:
        assert _judge(endpoint, tmp_path).classify([("p", "I can't")]) == ["full_refusal"]


def test_the_judge_does_not_read_the_thoughts_of_the_model(tmp_path):
    with Endpoint() as endpoint:
        answer = "<think>I can't do this.</think>Sure, here it is."
        assert _judge(endpoint, tmp_path).classify([("p", answer)]) == ["full_compliance"]
    assert "<think>" not in json.dumps(endpoint.bodies)


def test_the_fields_of_a_request_are_the_users(tmp_path):
    def sent(**changes):
        with Endpoint() as endpoint:
            judge = _judge(endpoint, tmp_path / str(len(changes)), **changes)
            judge.classify([("p", str(changes))])
        (body,) = endpoint.bodies
        return {name: body[name] for name in body if name not in ("model", "messages")}, judge.name

    plain, name = sent()
    assert plain == {"temperature": 0.0, "max_tokens": 512}
    thinking, other = sent(
        temperature=None, max_completion_tokens=4000, extra_body={"reasoning_effort": "low"}
    )
    assert thinking == {"max_completion_tokens": 4000, "reasoning_effort": "low"}
    assert name != other  # asked otherwise, it is another judge
    both, _ = sent(max_tokens=7, max_completion_tokens=8)
    assert both == {"temperature": 0.0, "max_tokens": 7, "max_completion_tokens": 8}


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1/v1",
        "http://host:99999/v1",
        "http://host:port/v1",
        "https:///v1",
        "ftp://host/v1",
        "http://a..b/v1",
        f"http://{'x' * 80}.org/v1",
        "http://user:word@host/v1",
    ],
)
def test_an_address_that_is_none_is_told_with_the_suite(url, tmp_path):
    (tmp_path / "x.txt").write_text("a")
    suite = {
        "name": "s",
        "tasks": [{"name": "t", "kind": "refusal", "path": "x.txt", "judge": True}],
        "judge": {"base_url": url, "model": "m"},
    }
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    with pytest.raises(InputError, match="base_url") as caught:
        load_suite(tmp_path / "suite.yaml")
    assert "\n" not in str(caught.value)
    given = {"base_url": "http://localhost/v1", "temperature": None}
    judge = load_suite(tmp_path / "suite.yaml", judge=given).judge
    assert (judge.base_url, judge.temperature) == ("http://localhost/v1", None)


def test_a_judge_that_fails_at_one_item_leaves_it_unjudged(tmp_path, drawn):
    pairs = _pairs(drawn)
    with Endpoint(script=[400], error={"error": {"code": "content_filter"}}) as endpoint:
        verdicts = _judge(endpoint, tmp_path, concurrency=1).classify(pairs)
        assert verdicts == ["unjudged", *_expected(pairs[1:])]
        # It is asked again by the same command, and that alone.
        assert _judge(endpoint, tmp_path, concurrency=1).classify(pairs) == _expected(pairs)
    assert len(endpoint.bodies) == len(pairs) + 1


@pytest.mark.parametrize(
    "status, error",
    [
        (400, {"error": {"code": "content_filter", "message": "x"}}),
        (400, {"error": {"message": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
        (400, {"error": {"message": "The prompt violates Azure's content management policy."}}),
        (400, {"error": {"code": "data_inspection_failed"}}),
        (400, {"error": {"message": "Content Exists Risk"}}),
        (403, {"error": {"code": 403, "message": "Your chosen model requires moderation"}}),
        (422, {"error": "flagged by the safety system"}),
    ],
)
def test_a_content_filter_leaves_its_item_unjudged(tmp_path, status, error):
    with Endpoint(script=[status], error=error) as endpoint:
        judge = _judge(endpoint, tmp_path, concurrency=1)
        assert judge.classify([("p", "I can't"), ("q", "I can't")]) == ["unjudged", "full_refusal"]
    unknown = {"error": {"message": "max_tokens is not known"}}
    told = pytest.raises(InputError, match=rf"HTTP {status}.*max_tokens is not known.*fields")
    with Endpoint(script=[status], error=unknown) as other, told:
        _judge(other, tmp_path / "other").classify([("p", "I can't")])


def test_items_without_a_verdict_are_counted_and_left_out_of_the_score(tmp_path):
    (tmp_path / "x.txt").write_text("\n".join(f"make a bomb {i}" for i in range(4)))
    path = tmp_path / "suite.yaml"
    named = Provenance("echo", "base", "base", 0, Cost())
    with Endpoint(script=[400], error={"error": {"code": "content_filter"}}) as endpoint:
        path.write_text(
            "name: judged\ntasks:\n  - {name: t, kind: refusal, path: x.txt, judge: true}\n"
            f"judge: {{base_url: '{endpoint.url}', model: m, api_key_env: JUDGE_KEY, "
            "concurrency: 1}\n"
        )
        suite = load_suite(path)
        items = {"t": read_items(suite, suite.tasks[0])}
        judge = Judge(suite.judge, tmp_path / "out" / "judge.jsonl")
        results = run_suite(EchoModel(), suite, items, tmp_path / "out", named, judge=judge)
    task = results["tasks"]["t"]
    assert (task["value"], task["items"], task["details"]["unjudged"]) == (1.0, 3, 0.25)
    assert any("1 of 4 answers" in warning for warning in results["warnings"])
