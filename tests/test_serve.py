"""The API of `l2p serve`: a real server on the bundled model, and OpenAI's own client."""

import base64
import http.client
import json
import os
import signal
import threading
import time
from urllib.parse import urlsplit

import comfyui_browser
import numpy as np
import pytest
from comfyui_l2p.l2p_core.batch import generate, is_generated, plan
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.pipeline import L2PPipeline
from helpers import apart
from PIL import Image
from serving import MISSING, damaged_requests, form, image_of, png, serving

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} come with the extra serve")

PROMPT = "a large red circle on a blue background, left"
STEPS = 4
CHROMIUM = comfyui_browser.find()
KEY = "a-key-of-enough-characters"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with a key and two workers, each of which generates four images at a time."""
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(KEY + "\n")
    flags = ("--host", "0.0.0.0", "--workers", "2", "--batch", "4", "--api-key-file", str(file))
    with serving(*flags) as started:
        started.url = started.url.replace("0.0.0.0", "127.0.0.1")
        yield started


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def pipe():
    return L2PPipeline.from_pretrained(device="cpu", torch_dtype=None)


def generated(pipe, folder, count=1, **settings):
    """What `l2p generate` writes for these settings."""
    settings = {"num_inference_steps": STEPS, **settings}
    rows = [{"prompt": settings.pop("prompt", PROMPT)}]
    output = folder / ("out" if count > 1 else "out.png")
    jobs = plan(rows, settings, count, output, pipe)
    generate(jobs, pipe, progress=False)
    return jobs


@pytest.mark.slow
def test_images_equal_those_of_generate_and_carry_their_settings(client, pipe, tmp_path):
    answer = client.images.generate(
        prompt=PROMPT, n=2, extra_body={"seed": 7, "num_inference_steps": STEPS}
    )
    jobs = generated(pipe, tmp_path, 2, seed=7)

    for number, (job, image) in enumerate(zip(jobs, answer.data, strict=True)):
        served = image_of(image.b64_json)
        with Image.open(job.output) as wanted:
            assert (np.asarray(served) == np.asarray(wanted)).all()
            assert json.loads(served.info["l2p"]) == json.loads(wanted.info["l2p"])
        assert image.seed == 7 + number and image.revised_prompt == job.prompt


def test_a_saved_answer_resumes_a_run_of_generate(server, pipe, tmp_path):
    answer = server.generate(prompt=PROMPT, seed=7, num_inference_steps=STEPS)
    job = plan(
        [{"prompt": PROMPT}], {"seed": 7, "num_inference_steps": STEPS}, 1, tmp_path / "a.png", pipe
    )[0]
    job.output.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    wanted = json.loads(Image.open(job.output).info["l2p"])
    assert wanted["seed"] == 7 and is_generated(job.output, wanted)


@pytest.mark.slow
def test_batched_images_are_within_rounding(guarded, pipe, tmp_path):
    images = ask_guarded(guarded, prompt=PROMPT, n=4, seed=7, num_inference_steps=STEPS)
    for job, image in zip(generated(pipe, tmp_path, 4, seed=7), images, strict=True):
        with Image.open(job.output) as wanted:
            assert apart(image, wanted) <= 1
    assert [json.loads(image.info["l2p"])["batch"] for image in images] == [4] * 4


def test_without_a_seed_each_image_is_another(server):
    seeds = {server.generate(prompt=PROMPT, num_inference_steps=1)["data"][0]["seed"] for _ in "ab"}
    assert len(seeds) == 2


def test_other_formats(server):
    for format, found in (("jpeg", "JPEG"), ("webp", "WEBP")):
        answer = server.generate(
            prompt=PROMPT, num_inference_steps=1, output_format=format, response_format="url"
        )
        head, _, data = answer["data"][0]["url"].partition(",")
        assert head == f"data:image/{format};base64" and image_of(data).format == found


@pytest.mark.slow
def test_the_client_streams_previews_that_come_nearer(client):
    stream = client.images.generate(
        prompt=PROMPT,
        stream=True,
        partial_images=3,
        extra_body={"seed": 7, "num_inference_steps": 8},
    )
    events = list(stream)
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 3,
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    shown = [np.asarray(image_of(event.b64_json).convert("RGB"), float) for event in events]
    away = [np.abs(each - shown[-1]).mean() for each in shown[:3]]
    assert away[0] > away[1] > away[2] > 0


@pytest.mark.slow
def test_the_client_edits_with_a_mask(client, pipe, tmp_path):
    source = Image.new("RGB", (96, 96), (0, 0, 200))
    mask = Image.new("RGBA", (96, 96), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (16, 16, 80, 80))  # transparent there: generated
    answer = client.images.edit(
        image=("a.png", png(source)),
        mask=("m.png", png(mask)),
        prompt=PROMPT,
        extra_body={"seed": 3, "num_inference_steps": STEPS},
    )
    edited = image_of(answer.data[0].b64_json)

    source.save(tmp_path / "image.png")
    hole = Image.new("L", (96, 96), 0)
    hole.paste(255, (16, 16, 80, 80))
    hole.save(tmp_path / "mask.png")
    files = {"input_image": str(tmp_path / "image.png"), "inpaint_mask": str(tmp_path / "mask.png")}
    job = generated(pipe, tmp_path, seed=3, **files)[0]
    with Image.open(job.output) as wanted:
        assert apart(edited, wanted) <= 1
    outside = np.asarray(hole) == 0
    assert (np.asarray(edited)[outside] == np.asarray(source)[outside]).all()
    assert (np.asarray(edited)[~outside] != np.asarray(source)[~outside]).any()


def test_an_edit_without_a_mask_starts_from_the_image(client, pipe, tmp_path):
    source = Image.new("RGB", (96, 96), (0, 0, 200))
    answer = client.images.edit(
        image=[("a.png", png(source))],
        prompt=PROMPT,
        extra_body={"seed": 3, "num_inference_steps": STEPS, "denoising_strength": 0.5},
    )
    source.save(tmp_path / "image.png")
    settings = {"input_image": str(tmp_path / "image.png"), "denoising_strength": 0.5}
    job = generated(pipe, tmp_path, seed=3, **settings)[0]
    with Image.open(job.output) as wanted:
        assert apart(image_of(answer.data[0].b64_json), wanted) <= 1


def test_an_edit_without_a_mask_generates_where_the_image_is_transparent(client):
    source = Image.new("RGBA", (96, 96), (0, 0, 200, 255))
    source.paste((9, 9, 9, 0), (16, 16, 80, 80))
    answer = client.images.edit(
        image=("a.png", png(source)), prompt=PROMPT, extra_body={"num_inference_steps": 1}
    )
    assert image_of(answer.data[0].b64_json).getpixel((2, 2)) == (0, 0, 200)


def test_models_health_metrics_and_documentation(server, client):
    assert [model.id for model in client.models.list()] == ["bundled"]
    assert client.models.retrieve("bundled").id == "bundled"
    assert server.ask("/v1/models/other")[0] == 404
    assert json.loads(server.ask("/health")[2])["status"] == "ok"
    before = server.metric("l2p_image_seconds_count")
    server.generate(prompt=PROMPT, num_inference_steps=1)
    assert server.metric("l2p_image_seconds_count") == before + 1
    described = json.loads(server.ask("/openapi.json")[2])
    fields = described["components"]["schemas"]["ImageRequest"]["properties"]
    assert {"prompt", "n", "size", "cfg_scale", "sampler"} <= fields.keys()
    assert not {"input_image", "inpaint_mask", "rand_device"} & fields.keys()
    page = server.ask("/docs")[2].decode()
    assert "swagger-ui" in page and "https://" not in page


def test_the_page_is_told_the_checkpoints_sizes_and_defaults(server, pipe):
    told = json.loads(server.ask("/settings")[2])
    assert told["presets"][0] == [96, 96] and [112, 80] in told["presets"]  # 4 : 3 in 16ths
    for width, height in told["presets"]:
        pipe.check_size(height, width)
        assert 0.85 < width * height / 96**2 < 1.15
    defaults = {each["name"]: each["default"] for each in told["settings"]}
    assert defaults["num_inference_steps"] == 30 and defaults["cfg_scale"] == 2


BAD = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["a"]}, "prompt"),
    ({"prompt": "a" * 10_001}, "prompt"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": 11}, "n"),
    ({"prompt": "a", "size": "big"}, "size"),
    ({"prompt": "a", "size": "97x96"}, "width"),
    ({"prompt": "a", "size": "1024x1024"}, "size"),
    ({"prompt": "a", "size": "-96x96"}, "size"),
    ({"prompt": "a", "num_inference_steps": 101}, "num_inference_steps"),
    ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps"),
    ({"prompt": "a", "cfg_scale": -1}, "cfg_scale"),
    ({"prompt": "a", "cfg_scale": "x"}, "cfg_scale"),
    ({"prompt": "a", "sampler": "magic"}, "sampler"),
    ({"prompt": "a", "seed": -1}, "seed"),
    ({"prompt": "a", "seed": 2**64 - 1, "n": 2}, "seed"),
    ({"prompt": "a", "input_image": "/etc/passwd"}, "input_image"),
    ({"prompt": "a", "inpaint_mask": "/etc/passwd"}, "inpaint_mask"),
    ({"prompt": "a", "rand_device": "meta"}, "rand_device"),
    ({"prompt": "a", "output": "/tmp/x.png"}, "output"),
    ({"prompt": "a", "response_format": "file"}, "response_format"),
    ({"prompt": "a", "partial_images": 99}, "partial_images"),
    ({"prompt": "\ud800"}, "prompt"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=lambda value: str(value)[:40])
def test_bad_requests_name_the_field(server, body, param):
    status, _, answer = server.ask("/v1/images/generations", body)
    error = json.loads(answer)["error"]
    assert status == 400 and error["param"] == param and error["message"]


def edit(server, *parts):
    kind = "multipart/form-data; boundary=X"
    status, _, body = server.ask("/v1/images/edits", form(parts), content_type=kind)
    return status, json.loads(body)


IMAGE = png(Image.new("RGB", (96, 96)))
BOMB = png(Image.new("1", (30_000, 1_000)))  # 30 million pixels in a few kilobytes


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([("prompt", "a")], "image"),
        ([("image", IMAGE)], "prompt"),
        ([("prompt", "a"), ("image", "text")], "image"),
        ([("prompt", "a"), ("image", b"GIF89a")], "image"),
        ([("prompt", "a"), ("image", IMAGE[:-40])], "image"),
        ([("prompt", "a"), ("image", b"%!PS-Adobe-3.0 EPSF-3.0\n")], "image"),
        ([("prompt", "a"), ("image", BOMB)], "image"),
        ([("prompt", "a"), ("image", IMAGE), ("image", IMAGE)], "image"),
        ([("prompt", "a"), ("image", IMAGE), ("mask", IMAGE)], "mask"),
        ([("prompt", "a"), ("image", IMAGE), ("mask", png(Image.new("RGBA", (9, 9))))], "mask"),
        ([("prompt", "a"), ("image", IMAGE), ("input_image", "/etc/passwd")], "input_image"),
    ],
    ids=str,
)
def test_bad_edits_name_the_field(server, parts, param):
    status, answer = edit(server, *parts)
    assert status == 400 and answer["error"]["param"] == param, answer
    assert "BytesIO" not in answer["error"]["message"]


def test_damaged_requests_each_get_a_4xx(server):
    for path, body, kind in damaged_requests(100):
        status, _, answer = server.ask(path, body, content_type=kind)
        assert 400 <= status < 500, (status, body[:300], answer[:300])
        assert json.loads(answer)["error"]["message"]
    assert server.generate(prompt=PROMPT, num_inference_steps=1)


def test_a_large_upload_is_turned_away_with_and_without_its_length(server):
    assert server.ask("/v1/images/generations", b" " * 1_100_000)[0] == 413
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    chunks = (b" " * 100_000 for _ in range(30))
    headers = {"content-type": "application/json"}
    try:
        connection.request("POST", "/v1/images/generations", chunks, headers, encode_chunked=True)
    except OSError:
        pass  # it closed the connection while we were sending
    try:
        assert connection.getresponse().status == 413
    except (OSError, http.client.HTTPException):
        pass
    assert json.loads(server.ask("/health")[2])["status"] == "ok"


def hanging(server, **body):
    """A connection with a request under way."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    data = json.dumps({"prompt": PROMPT, **body})
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/images/generations", data, headers)
    return connection


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_cancels_its_images(server, stream):
    cancelled = server.metric("l2p_cancelled_total")
    finished = server.metric("l2p_image_seconds_count")
    connection = hanging(server, n=3, num_inference_steps=100, stream=stream)
    wait_for(lambda: server.metric("l2p_images_running") == 1)
    connection.close()
    wait_for(lambda: server.metric("l2p_cancelled_total") == cancelled + 3)
    assert server.metric("l2p_images_running") == server.metric("l2p_queue_length") == 0
    assert server.metric("l2p_image_seconds_count") == finished


def test_a_full_queue_turns_requests_away(server):
    connections = [hanging(server, n=10, num_inference_steps=100) for _ in range(2)]
    wait_for(lambda: server.metric("l2p_queue_length") == 19)
    status, headers, answer = server.ask("/v1/images/generations", {"prompt": "a", "n": 2})
    assert status == 429 and headers["retry-after"] and "queue is full" in answer.decode()
    for connection in connections:
        connection.close()
    wait_for(lambda: server.metric("l2p_queue_length") == server.metric("l2p_images_running") == 0)


def test_an_upload_is_never_written_to_a_file(server):
    """One of 800 kB, which the form parser would put into a temporary file by itself."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    image = png(Image.fromarray(noise))
    with open(f"/proc/{server.process.pid}/io") as file:
        before = written(file.read())
    status, _ = edit(
        server,
        ("prompt", "a"),
        ("size", "96x96"),
        ("num_inference_steps", "1"),
        ("image", image),
    )
    with open(f"/proc/{server.process.pid}/io") as file:
        after = written(file.read())
    assert status == 200 and not [file for file in server.temporary.rglob("*") if file.is_file()]
    assert after - before < len(image)


def written(io):
    """Bytes that a process handed to file systems that store them."""
    return int(io.split("write_bytes: ")[1].split()[0])


def test_a_key_guards_everything_but_health(guarded):
    assert guarded.ask("/health")[0] == 200
    for path in ("/", "/docs", "/openapi.json", "/metrics", "/v1/models", "/nothing"):
        assert guarded.ask(path)[0] == 401
        assert guarded.ask(path, authorization=f"Bearer {KEY}x")[0] == 401
        assert guarded.ask(path, cookie="l2p_session=1")[0] == 401
    assert guarded.ask("/v1/images/generations", {"prompt": "a"})[0] == 401
    assert guarded.ask("/v1/models", authorization=f"Bearer {KEY}")[0] == 200

    assert b"API key" in guarded.ask("/", accept="text/html")[2]
    assert guarded.ask("/login", b"key=wrong")[0] == 401
    status, headers, _ = guarded.ask("/login", f"key={KEY}".encode())
    assert status == 303 and "HttpOnly" in headers["set-cookie"]
    cookie = headers["set-cookie"].split(";")[0]
    assert KEY not in cookie and guarded.ask("/v1/models", cookie=cookie)[0] == 200


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(isinstance(CHROMIUM, str), reason=str(CHROMIUM))
def test_a_browser_asks_for_the_key_and_then_shows_the_page(guarded):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM[0], args=comfyui_browser.FLAGS
        )
        page = browser.new_page()
        page.goto(guarded.url)
        for key in ("wrong", KEY):
            page.fill("[name=key]", key)
            page.click("button")
        page.wait_for_selector("body[data-ready]")
        browser.close()


def test_other_web_sites_are_kept_out(server):
    body = {"prompt": "a", "num_inference_steps": 1}
    path = "/v1/images/generations"
    assert server.ask(path, body, origin="http://evil.example")[0] == 403
    assert server.ask(path, body, host="evil.example")[0] == 403  # a name that points to 127.0.0.1
    assert server.ask(path, body, origin=server.url)[0] == 200
    _, headers, _ = server.ask("/v1/models", origin="http://evil.example")
    assert "access-control-allow-origin" not in headers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--api-key", "short"], "at least 16"),
        (["--gpus", "0,x"], "--gpus"),
        (["--gpus", "99"], "--gpus names 99"),
        (["--workers", "0"], "--workers"),
        (["--port", "99999"], "port"),
        (["--checkpoint", "/nothing/here.safetensors"], "here.safetensors"),
        (["--checkpoint", __file__], "test_serve.py"),
    ],
)
def test_what_can_not_start_says_why(flags, told, capsys, monkeypatch):
    monkeypatch.delenv("L2P_API_KEY", raising=False)
    assert main(["serve", *flags]) == 1
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


def test_a_port_in_use_shows_before_the_model_is_loaded(server, capsys):
    assert main(["serve", "--port", str(urlsplit(server.url).port)]) == 1
    assert "Give another --port" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["serve"]) == 1
    assert "comfyui-l2p[serve]" in capsys.readouterr().err


def ask_guarded(server, **body):
    """The images of an answer of the guarded server."""
    status, _, answer = server.ask("/v1/images/generations", body, authorization=f"Bearer {KEY}")
    assert status == 200, answer
    return [image_of(each["b64_json"]) for each in json.loads(answer)["data"]]


@pytest.mark.slow
def test_the_images_of_a_killed_worker_are_generated_by_another(guarded, pipe, tmp_path):
    def metric(name):
        return guarded.metric(name, authorization=f"Bearer {KEY}")

    answers = [[], []]
    body = {"prompt": PROMPT, "size": "48x48", "cfg_scale": 1, "num_inference_steps": 40}
    clients = [
        threading.Thread(
            target=lambda answer=answer, seed=seed: answer.extend(
                ask_guarded(guarded, seed=seed, n=4, **body)
            )
        )
        for answer, seed in zip(answers, (5, 50))
    ]
    for client in clients:
        client.start()
    wait_for(lambda: metric("l2p_images_running") == 8)  # both workers have a batch
    os.kill(guarded.workers()[0], signal.SIGKILL)
    for client in clients:
        client.join()

    assert list(map(len, answers)) == [4, 4]
    assert metric("l2p_worker_restarts_total") == 1 and metric("l2p_failures_total") == 0
    small = {"height": 48, "width": 48, "cfg_scale": 1.0, "num_inference_steps": 40}
    job = generated(pipe, tmp_path, seed=5, **small)[0]
    with Image.open(job.output) as wanted:
        assert apart(answers[0][0], wanted) <= 1
    wait_for(lambda: metric("l2p_workers_available") == 2)


@pytest.mark.slow
def test_the_workers_of_a_killed_server_end(guarded):
    """Ends the guarded server: no test may use it after this one."""
    workers = guarded.workers()
    assert len(workers) == 2
    guarded.process.kill()
    wait_for(lambda: all(is_gone(worker) for worker in workers))


def is_gone(process):
    """Whether a process has ended; one that nobody waited for counts."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")")[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
