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
from ogpsa_jax.evaluation.provenance import Provenance
from ogpsa_jax.evaluation.records import Cost
from ogpsa_jax.evaluation.suite import JudgeSettings, load_suite
from tests.evaluation.fakes import EchoModel

KEY = "sk-very-secret-0123456789"


class Endpoint:
    """A local OpenAI-compatible server: refusals are those answers with "can't" in them.

    `script` holds status codes that are answered first, before it behaves.
    """

    def __init__(self, script=(), answers_before_death=None, delay=0.0, reply="Verdict: {}"):
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
                content = {"choices": [{"message": {"content": reply.format(verdict)}}]}
                # An error page that echoes the key, as real ones do.
                payload = json.dumps(content) if status == 200 else f"error with {KEY}"
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


def test_pauses_grow(tmp_path):
    with Endpoint(script=[503] * 4) as endpoint:
        started = time.monotonic()
        _judge(endpoint, tmp_path).classify([("prompt", "answer")])
        # .01 + .02 + .04 + .08 seconds, each at least three quarters of it.
        assert time.monotonic() - started >= 0.75 * 0.15


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


def test_of_a_judge_that_thinks_aloud_the_last_word_counts(tmp_path):
    with Endpoint(reply="Not partial_refusal, rather {}") as endpoint:
        assert _judge(endpoint, tmp_path).classify([("p", "I can't")]) == ["full_refusal"]
