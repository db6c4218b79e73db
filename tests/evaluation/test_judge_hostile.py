"""A judge behind a server that hangs, drips, floods and lies: one sentence, within bounds."""

import contextlib
import gzip
import json
import socket
import threading
import zlib

import pytest

from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation import judge as judging
from ogpsa_jax.evaluation.judge import Judge
from ogpsa_jax.evaluation.suite import JudgeSettings


class Server:
    """Answers every request by `behave(connection, stopped)` on a bare socket."""

    def __init__(self, behave):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.stopped, self.requests = threading.Event(), 0
        self.sent, self.threads = 0, []

        def serve(connection):
            with connection:
                connection.recv(1 << 16)
                with contextlib.suppress(OSError):  # the other side hangs up, as it should
                    behave(connection, self)

        def accept():
            while not self.stopped.is_set():
                try:
                    connection, _ = self.listener.accept()
                except OSError:
                    return
                self.requests += 1
                self.threads.append(threading.Thread(target=serve, args=(connection,), daemon=True))
                self.threads[-1].start()

        self.thread = threading.Thread(target=accept, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stopped.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def ask(self, folder, **changes):
        given = {
            "base_url": f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1",
            "model": "judge",
            "api_key_env": None,
            "timeout": 0.3,
            "attempts": 1,
            **changes,
        }
        judge = Judge(JudgeSettings(**given), folder / "judge.jsonl", first_pause=0.001)
        return judge.classify([("prompt", "answer")])


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _head(*lines, status="200 OK"):
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def _reply(text="full_refusal", **choice):
    message = {"message": {"content": text}, "finish_reason": "stop", **choice}
    return json.dumps({"choices": [message]}).encode()


def _whole(body, *lines, status="200 OK"):
    return lambda connection, server: connection.sendall(
        _head(f"Content-Length: {len(body)}", *lines, status=status) + body
    )


def _hang(connection, server):
    server.stopped.wait()


def _drip(first):
    def behave(connection, server):
        connection.sendall(first)
        while not server.stopped.wait(0.02):
            connection.sendall(b"x")

    return behave


def _flood(*lines, part=b" " * (1 << 16), status="200 OK"):
    def behave(connection, server):
        connection.sendall(_head(*lines, status=status))
        while not server.stopped.is_set():
            connection.sendall(part)
            server.sent += len(part)

    return behave


def test_a_sound_reply_is_read(tmp_path):
    with Server(_whole(_reply())) as server:
        assert server.ask(tmp_path, timeout=30) == ["full_refusal"]
    packed = gzip.compress(_reply())
    with Server(_whole(packed, "Content-Encoding: gzip")) as server:
        assert server.ask(tmp_path / "packed", timeout=30) == ["full_refusal"]


@pytest.mark.parametrize(
    "behave",
    [
        _hang,
        _drip(b"HTTP/1.1 200 OK\r\nX-Slow: "),
        _drip(_head("Content-Length: 100000")),
        _drip(_head("Content-Length: 100000", status="500 Broken")),
    ],
    ids=["hangs", "drips its headers", "drips its reply", "drips an error"],
)
def test_a_request_ends_with_its_time(behave, tmp_path):
    # Without the bound it would not end before the test's own time does.
    with Server(behave) as server, pytest.raises(InputError, match=r"no whole reply within 0\.3 s"):
        server.ask(tmp_path, attempts=2)
    assert server.requests == 2


@pytest.mark.parametrize("status", ["200 OK", "500 Broken", "400 Bad"])
def test_a_reply_is_read_up_to_a_length(status, tmp_path):
    too_long = pytest.raises(InputError, match="a reply of more than 10 MiB")
    with Server(_flood(status=status)) as server, too_long:
        server.ask(tmp_path, timeout=60)
    assert server.sent < 64 * 2**20  # what the system's buffers take comes on top


def test_a_small_reply_that_unpacks_to_a_large_one_is_not_unpacked(tmp_path, monkeypatch):
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()
    assert len(bomb) < 2**20
    too_long = pytest.raises(InputError, match="a reply of more than 10 MiB")
    with Server(_whole(bomb, "Content-Encoding: gzip")) as server, too_long:
        server.ask(tmp_path, timeout=60)


_LIES = {
    "no JSON": _whole(b"hello"),
    "nothing": _whole(b""),
    "no choice": _whole(b'{"choices": []}'),
    "numbers for objects": _whole(b'{"choices": [7]}'),
    "a list": _whole(b"[]"),
    "a text for a message": _whole(b'{"choices": [{"message": "full_refusal"}]}'),
    "a class that it denies": _whole(_reply(text="This is not a full_refusal.")),
    "another class than it names": _whole(_reply(text="anything rather than full_compliance")),
    "a class within another word": _whole(_reply(text="not_full_refusal")),
    "no text": _whole(_reply(text=None)),
    "parts for a text": _whole(_reply(text=[{"text": "full_refusal"}])),
    "deep": _whole(b"[" * 200_000),
    "not finished": _whole(_reply(finish_reason="length")),
    "an unknown end": _whole(_reply(finish_reason="?")),
    "a number for an end": _whole(_reply(finish_reason=1)),
    "no UTF-8": _whole(b'{"choices": "\xff\xfe"}'),
    "an unknown charset": _whole(b"\xff", "Content-Type: application/json; charset=nonsense"),
    "a charset that is none of text": _whole(b"zz", "Content-Type: text/html; charset=hex"),
    "broken gzip": _whole(b"not packed", "Content-Encoding: gzip"),
    "an unknown packing": _whole(_reply()[::-1], "Content-Encoding: secret"),
    "an error in an unknown charset": _whole(
        b"\xff", "Content-Type: text/html; charset=hex", status="500 Broken"
    ),
    "a refusal in a broken packing": _whole(b"x", "Content-Encoding: gzip", status="401 No"),
    "a redirection": _whole(b"", "Location: http://127.0.0.1:1/", status="307 Away"),
    "no HTTP": lambda connection, server: connection.sendall(b"\x16\x03\x01nonsense\r\n\r\n"),
    "a cut reply": lambda connection, server: connection.sendall(
        _head("Content-Length: 5000") + b"{"
    ),
    "a length that is none": lambda connection, server: connection.sendall(
        _head("Content-Length: many") + b"{}"
    ),
}


@pytest.mark.parametrize("lie", _LIES)
def test_a_reply_that_is_none_is_told_in_one_sentence(lie, tmp_path):
    with Server(_LIES[lie]) as server, pytest.raises(InputError, match=r"^judge: ") as caught:
        server.ask(tmp_path, timeout=30)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "judge.jsonl").exists()


def test_a_host_that_is_not_there_and_a_broken_proxy_are_told(tmp_path, monkeypatch):
    settings = JudgeSettings(
        base_url="http://127.0.0.1:9/v1", model="m", api_key_env=None, attempts=1, timeout=20
    )
    with pytest.raises(InputError, match="gave no verdict"):
        Judge(settings, tmp_path / "j.jsonl").classify([("p", "a")])
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:port")
    monkeypatch.delenv("NO_PROXY")
    with pytest.raises(InputError, match="proxy"):
        Judge(settings, tmp_path / "j.jsonl").classify([("p", "a")])


def test_half_a_surrogate_pair_in_an_answer_is_no_obstacle(tmp_path):
    with Server(_whole(_reply())) as server:
        judge = Judge(
            JudgeSettings(
                base_url=f"http://127.0.0.1:{server.listener.getsockname()[1]}/v1",
                model="m",
                api_key_env=None,
            ),
            tmp_path / "j.jsonl",
        )
        assert judge.classify([("p", "bad \ud800 half")]) == ["full_refusal"]


def test_the_bound_is_the_one_that_is_documented():
    assert judging._LARGEST_REPLY == 10 * 2**20
