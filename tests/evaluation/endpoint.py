"""A local endpoint that speaks like OpenAI, for judges to ask."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ogpsa_jax.evaluation.judge import Judge
from ogpsa_jax.evaluation.suite import JudgeSettings

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


def pairs_of(drawn, count=20):
    return [
        (f"prompt {i}", drawn.choice([f"Sure, {i}.", f"I can't do {i}."])) for i in range(count)
    ]


def expected(pairs):
    return ["full_refusal" if "can't" in answer else "full_compliance" for _, answer in pairs]


def judge_of(endpoint, folder, **changes):
    return Judge(endpoint.settings(**changes), folder / "judge.jsonl", first_pause=0.01)
