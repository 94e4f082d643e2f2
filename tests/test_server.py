"""What the queue's client makes of proxies, gateways, error pages and junk."""

import io
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.remote import server as server_module
from comfyui_l2p.l2p_core.remote.queue import plan
from comfyui_l2p.l2p_core.remote.server import Away, Rejected, Server, is_near
from PIL import Image

GRAPH = {"6": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "seed": 1}}}
NEVER_AGAIN = "http://127.0.0.1:9"  # nothing listens there
PAGE = b"<!DOCTYPE html><html>Sign in</html>"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(Server, "poll", 0.02)
    monkeypatch.setattr(server_module, "GATEWAY_PATIENCE", 0.1)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def job(tmp_path):
    (tmp_path / "g.json").write_text(json.dumps(GRAPH))
    return plan(GRAPH, [{}], [], 1, tmp_path / "out.png")[0]


@pytest.fixture
def serve():
    """serve({path: (status, body, headers)}, otherwise) → (address, paths that were asked)."""
    started = []

    def start(answers, otherwise=(404, b"", {})):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                asked.append(self.path)
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                found = [path for path in answers if self.path.startswith(path)]
                status, body, headers = answers[found[0]] if found else otherwise
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def run(tmp_path, address):
    return main(["queue", str(tmp_path / "g.json"), "--server", address, "-o", str(tmp_path / "o")])


@pytest.mark.parametrize(
    "host, near",
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("10.1.2.3", True),
        ("192.168.0.7", True),
        ("172.16.0.1", True),
        ("169.254.1.1", True),
        ("fd00::1", True),
        ("fe80::1%eth0", True),
        ("gpu1", True),
        ("gpu1.local", True),
        ("8.8.8.8", False),
        ("example.com", False),
        ("2001:4860:4860::8888", False),
    ],
)
def test_near_servers_are_told_from_far_ones(host, near):
    assert is_near(host) is near


def test_no_proxy_takes_a_near_server(serve, job, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, NEVER_AGAIN)
    address, asked = serve({"/queue": (200, b"{}", {}), "/history": (200, b"{}", {})})
    assert Server(address).find(job) is None and len(asked) == 2


def test_a_far_server_is_asked_through_the_proxy_which_is_named(serve, job, monkeypatch):
    proxy, asked = serve({}, (200, b"{}", {}))
    monkeypatch.setenv("http_proxy", proxy)
    assert Server("http://gpu.example.com").find(job) is None
    assert asked[0].startswith("http://gpu.example.com/queue")
    monkeypatch.setenv("http_proxy", NEVER_AGAIN)
    with pytest.raises(Away, match="through the proxy of http_proxy .*Add the server to no_proxy"):
        Server("http://gpu.example.com").find(job)


def test_the_socket_takes_no_proxy_either(monkeypatch, job):
    import websocket

    given = {}

    def connect(url, **options):
        given.update(options)
        raise OSError

    monkeypatch.setattr(websocket, "create_connection", connect)
    Server("127.0.0.1:1").listen(job, lambda text: None)
    assert given["http_no_proxy"] == ["*"]


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_gateway_that_reaches_no_server_is_given_up_soon(serve, job, tmp_path, capsys, status):
    """Of 600 seconds, by default, only those of `GATEWAY_PATIENCE` are waited."""
    address, _ = serve({}, (status, PAGE, {}))
    assert run(tmp_path, address) == 1
    said = capsys.readouterr().err
    assert f"answers {status} " in said and "the proxy in front of it can't reach it" in said
    assert "waiting up to 0.1 s" in said


@pytest.mark.parametrize(
    "answer, said",
    [
        ((200, PAGE, {}), "answers a web page (HTML); is it a ComfyUI server?"),
        ((404, PAGE, {}), "/queue answers 404 Not Found; is it a ComfyUI server?"),
        ((500, b"", {}), "/queue answers 500"),
        ((401, b"", {}), "answers 401 Unauthorized: it asks for a login"),
        ((403, PAGE, {}), "answers 403 Forbidden: it asks for a login"),
        ((302, b"", {"Location": "http://x/login"}), "redirects to http://x/login"),
        ((200, b"", {}), "answers b''; is it a ComfyUI server?"),
        ((200, b"null", {}), "is it a ComfyUI server?"),
        ((200, b'{"queue_running": 3}', {}), "/queue answers '3'; is it a ComfyUI server?"),
        ((200, b"\xff\xfe\x1b[31m", {}), "is it a ComfyUI server?"),
        ((200, b"[" * 100_000, {}), "is it a ComfyUI server?"),
    ],
)
def test_what_is_no_comfyui_is_given_up_at_once(serve, job, tmp_path, capsys, answer, said):
    address, _ = serve({}, answer)
    assert run(tmp_path, address) == 1
    error = capsys.readouterr().err
    assert said in error and "waiting" not in error and not (tmp_path / "o").exists()


@pytest.mark.parametrize("content", [b"junk\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b"", b"\0" * 99])
def test_what_speaks_no_http_is_a_sentence(job, content):
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.recv(9999)
            connection.sendall(content)
            connection.close()

    threading.Thread(target=answer, daemon=True).start()
    with pytest.raises(Away, match="does not answer|can't be read"):
        Server(f"127.0.0.1:{listener.getsockname()[1]}").find(job)
    listener.close()


def test_an_answer_that_is_cut_off_is_a_sentence(serve, job):
    address, _ = serve({}, (200, b"{}", {"Content-Length": "999", "Connection": "close"}))
    with pytest.raises(Away, match="does not answer|can't be read"):
        Server(address).find(job)


def test_an_endless_answer_is_not_read(serve, job, monkeypatch):
    monkeypatch.setattr(server_module.Server.ask, "__defaults__", (None, None, None, None, 1000))
    address, _ = serve({}, (200, b" " * 5000, {}))
    with pytest.raises(Rejected, match="answers more than"):
        Server(address).find(job)


def png():
    stream = io.BytesIO()
    levels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(levels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    "content, said",
    [
        (png()[:-40], "sent only a part of a.png"),
        (png()[:-40] + bytes(40), "sent only a part of a.png"),
        (png()[:400] + b"xx" + png()[402:], "sent only a part of a.png"),
        (PAGE, "made a.png, which is a web page (HTML), not PNG"),
        (b"\xff\xd8\xff\xe0", "made a.png, which is a JPEG image, not PNG"),
        (b"", "made a.png, which is not PNG"),
    ],
)
def test_an_image_is_looked_at_before_it_is_kept(serve, job, content, said):
    outputs = {"6": {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]}}
    address, _ = serve({"/view": (200, content, {})})
    with pytest.raises(ValueError) as rejected:
        Server(address).fetch({"outputs": outputs}, job)
    assert said in str(rejected.value)
    address, _ = serve({"/view": (200, png(), {})})
    assert Server(address).fetch({"outputs": outputs}, job) == [png()]


def test_an_upload_that_gets_another_name_is_rejected(serve, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    address, _ = serve({"/upload": (200, b'{"name": "a (1).png"}', {})})
    with pytest.raises(Rejected, match="/upload/image answers"):
        Server(address).upload("a.png", tmp_path / "a.png")


@pytest.mark.parametrize("address", ["http://[::1", "http://x:99999", "ftp://x", "http://", "x:0"])
def test_addresses_that_are_none_are_rejected(job, tmp_path, capsys, address):
    assert run(tmp_path, address) == 1
    assert f"--server is {address}; expected an address" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["nan", "-1", "inf"])
def test_a_time_that_is_none_is_rejected(job, tmp_path, capsys, seconds):
    assert main(["queue", str(tmp_path / "g.json"), "--timeout", seconds]) == 1
    assert "--timeout is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "graph",
    [
        {"1": {"class_type": 5, "inputs": {}}},
        {"1": {"class_type": "A", "inputs": {}, "_meta": []}},
        {"1": {"class_type": "A", "inputs": []}},
    ],
)
def test_a_workflow_of_other_types_is_rejected(tmp_path, capsys, graph):
    (tmp_path / "g.json").write_text(json.dumps(graph))
    assert main(["queue", str(tmp_path / "g.json"), "-o", str(tmp_path / "o")]) == 1
    assert "is not a workflow in API format" in capsys.readouterr().err


@pytest.mark.parametrize("link", [[], [[]], [{}, 0], [None], ["9", 0]])
def test_odd_links_do_no_harm(tmp_path, link):
    graph = {
        "1": {"class_type": "A", "inputs": {"text": "a", "positive": link, "negative": link}},
        "2": {"class_type": "B", "inputs": {"positive": ["1", 0]}},
    }
    (made,) = plan(graph, [{"prompt": "b"}], [], 1, tmp_path / "out.png")
    assert made.graph["1"]["inputs"]["text"] == "b"


def test_a_seed_that_is_no_number_can_not_be_counted_up(tmp_path):
    graph = {"1": {"class_type": "A", "inputs": {"seed": "many"}}}
    with pytest.raises(ValueError, match="seed is 'many'"):
        plan(graph, [{}], [], 2, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), "a \ud83d", ["a"], True])
def test_values_of_rows_are_judged_as_by_generate(tmp_path, value):
    graph = {"1": {"class_type": "A", "inputs": {"prompt": "a", "other": "b"}}}
    for name in ("prompt", "other"):
        with pytest.raises(ValueError, match="prompt 2: .* is "):
            plan(graph, [{}, {name: value}], [], 1, tmp_path / "out")
