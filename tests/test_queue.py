"""The client of ComfyUI's prompt queue, against a small server that behaves like ComfyUI's where it
matters."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.files.atomic import locked
from comfyui_l2p.l2p_core.remote import server as server_module
from comfyui_l2p.l2p_core.remote.queue import plan
from comfyui_l2p.l2p_core.remote.workflow import fill, read_workflow
from PIL import Image, PngImagePlugin

GRAPH = {
    "1": {"class_type": "L2PCheckpointLoader", "inputs": {"checkpoint": "a.safetensors"}},
    "2": {"class_type": "L2PTextEncoderLoader", "inputs": {"text_encoder": "qwen.safetensors"}},
    "3": {
        "class_type": "L2PTextEncode",
        "inputs": {"text_encoder": ["2", 0], "prompt": "old", "negative_prompt": ""},
    },
    "4": {"class_type": "EmptyL2PLatentImage", "inputs": {"width": 64, "height": 32}},
    "5": {
        "class_type": "L2PKSampler",
        "_meta": {"title": "Sampler"},
        "inputs": {
            "model": ["1", 0],
            "positive": ["3", 0],
            "negative": ["3", 1],
            "seed": 7,
            "steps": 30,
            "cfg": 2,
            "width": 64,
            "height": 32,
        },
    },
    "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "l2p"}},
}
STOCK = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "a"}},
    "2": {"class_type": "CLIPLoader", "inputs": {"clip_name": "b"}},
    "3": {
        "class_type": "CLIPTextEncode",
        "_meta": {"title": "Bad"},
        "inputs": {"text": "", "clip": ["2", 0]},
    },
    "4": {
        "class_type": "CLIPTextEncode",
        "_meta": {"title": "Good"},
        "inputs": {"text": "", "clip": ["2", 0]},
    },
    "5": {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {"positive": ["4", 0], "negative": ["3", 0], "strength": 1.0},
    },
    "6": {
        "class_type": "KSampler",
        "inputs": {"positive": ["5", 0], "negative": ["5", 1], "seed": 1, "steps": 20, "cfg": 8.0},
    },
    "7": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
}


class FakeComfyUI:
    """Queue, history and images as ComfyUI's server has them, no websocket. hold: jobs run until
    it is cleared."""

    def __init__(self, port=0):
        self.running, self.history, self.uploads, self.asked = {}, {}, {}, []
        self.hold = False
        self.answer = None  # (status, body) to /prompt, instead of a job
        self.outcome = {"status_str": "success", "messages": []}
        self.images = 1
        self.on_prompt = lambda fake, job: None
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def reply(self, body, status=200):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                url = urlsplit(self.path)
                if url.path == "/queue":
                    fake.finish()
                    self.reply(
                        {
                            "queue_running": [
                                [0, key, graph] for key, graph in fake.running.items()
                            ],
                            "queue_pending": [],
                        }
                    )
                elif url.path.startswith("/history/"):
                    key = url.path.rpartition("/")[2]
                    self.reply({key: fake.history[key]} if key in fake.history else {})
                elif url.path == "/view":
                    key, number = parse_qs(url.query)["filename"][0].split()
                    self.reply(image(int(number), fake.history[key]["prompt"]))
                else:
                    self.reply({}, 404)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                path = urlsplit(self.path).path
                if path == "/upload/image":
                    name = re.search(rb'filename="([^"]+)"', body)[1].decode()
                    fake.uploads[name] = body.split(b"\r\n\r\n")[-1].rpartition(b"\r\n--")[0]
                    return self.reply({"name": name})
                body = json.loads(body)
                fake.asked.append((path, body))
                if path == "/prompt":
                    if fake.answer and fake.answer[0] != 200:
                        return self.reply(fake.answer[1], fake.answer[0])
                    fake.running[body["prompt_id"]] = body["prompt"]
                    fake.on_prompt(fake, body)
                    return self.reply(
                        {
                            "prompt_id": body["prompt_id"],
                            **(fake.answer[1] if fake.answer else {"node_errors": {}}),
                        }
                    )
                if path == "/interrupt":
                    fake.running.pop(body["prompt_id"], None)
                self.reply({})

        class HTTPServer(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

        self.server = HTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def finish(self):
        while self.running and not self.hold:
            key, graph = self.running.popitem()
            images = [
                {"filename": f"{key} {number}", "subfolder": "", "type": "output"}
                for number in range(self.images)
            ]
            self.history[key] = {
                "prompt": graph,
                "status": self.outcome,
                "outputs": {
                    "6": {"images": images},
                    "9": {"images": [{"filename": "x", "subfolder": "", "type": "temp"}]},
                },
            }

    def graphs(self):
        return [body["prompt"] for path, body in self.asked if path == "/prompt"]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def image(number, graph):
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps(graph))
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(out, "PNG", pnginfo=info)
    return out.getvalue()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(server_module.Server, "poll", 0.02)


@pytest.fixture
def fakes():
    started = []

    def start(port=0):
        started.append(FakeComfyUI(port))
        return started[-1]

    yield start
    for fake in started:
        fake.close()


@pytest.fixture
def workflow(tmp_path):
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(GRAPH))
    return str(path)


def filled(graph, name, value):
    copy = json.loads(json.dumps(graph))
    fill(copy, graph, name, value)
    return {
        f"{node}.{key}": new
        for node in graph
        for key, new in copy[node]["inputs"].items()
        if new != graph[node]["inputs"][key]
    }


@pytest.mark.parametrize(
    "graph, name, value, expected",
    [
        (GRAPH, "prompt", "new", {"3.prompt": "new"}),
        (GRAPH, "negative_prompt", "no", {"3.negative_prompt": "no"}),
        (GRAPH, "width", 128, {"4.width": 128, "5.width": 128}),
        (
            {
                "1": {
                    "class_type": "EmptyL2PLatentImage",
                    "inputs": {"size": "1K square (1024 x 1024)", "width": 1024, "height": 1024},
                }
            },
            "width",
            512,
            {"1.size": "custom", "1.width": 512},
        ),
        (GRAPH, "cfg_scale", 3.5, {"5.cfg": 3.5}),
        (GRAPH, "num_inference_steps", "4", {"5.steps": 4}),
        (GRAPH, "model", "b", {"1.checkpoint": "b"}),
        (GRAPH, "text_encoder", "q", {"2.text_encoder": "q"}),
        (GRAPH, "Sampler.seed", "18446744073709551615", {"5.seed": 2**64 - 1}),
        (GRAPH, "L2PKSampler.seed", 9, {"5.seed": 9}),
        (GRAPH, "4.width", "16", {"4.width": 16}),
        (GRAPH, "filename_prefix", 5, {"6.filename_prefix": "5"}),
        (STOCK, "prompt", "new", {"4.text": "new"}),
        (STOCK, "negative_prompt", "no", {"3.text": "no"}),
        (STOCK, "Bad.text", "x", {"3.text": "x"}),
        (STOCK, "model", "c", {"1.unet_name": "c"}),
        (STOCK, "text_encoder", "c", {"2.clip_name": "c"}),
        (STOCK, "input_image", "c", {"7.image": "c"}),
    ],
)
def test_a_value_finds_its_input(graph, name, value, expected):
    assert filled(graph, name, value) == expected


@pytest.mark.parametrize(
    "graph, name, value, said",
    [
        (
            GRAPH,
            "shift",
            3,
            r"no input for shift. It has: 1.checkpoint \(L2PCheckpointLoader\), 2.text_encoder",
        ),
        (GRAPH, "6.images", 3, "Inputs that are linked to another node are not filled"),
        (
            {**STOCK, "8": {"class_type": "KSampler", "inputs": {"seed": 2}}},
            "seed",
            3,
            r"seed could go to several inputs: 6.seed \(KSampler\), 8.seed \(KSampler\). Say which",
        ),
        (GRAPH, "num_inference_steps", "2.5", "steps.*is '2.5'; expected a whole number"),
        (GRAPH, "cfg_scale", "nan", "expected a number"),
        (GRAPH, "seed", "true", "expected a whole number"),
    ],
)
def test_a_value_without_one_clear_place_is_rejected(graph, name, value, said):
    with pytest.raises(ValueError, match=said):
        filled(graph, name, value)


def test_the_prompts_of_one_encoder_are_told_from_a_negative_that_is_zeroed_out():
    zeroed = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a"}},
        "2": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["1", 0]}},
        "3": {"class_type": "KSampler", "inputs": {"positive": ["1", 0], "negative": ["2", 0]}},
    }
    assert filled(zeroed, "prompt", "b") == {"1.text": "b"}
    with pytest.raises(ValueError, match="no input for negative_prompt"):
        filled(zeroed, "negative_prompt", "b")


def test_rows_come_before_flags(tmp_path, fakes, workflow):
    fake = fakes()
    with open(tmp_path / "p.csv", "w", newline="") as stream:
        csv.writer(stream).writerows(
            [
                ["text", "seed", "file_name", "Sampler.cfg", "num_inference_steps"],
                ["a", "", "x/y", "4.5", ""],
                ["b", "9", "z.png", "", "3"],
            ]
        )
    assert (
        main(
            [
                "queue",
                workflow,
                "--server",
                fake.url,
                "--prompts",
                str(tmp_path / "p.csv"),
                "-o",
                str(tmp_path / "out"),
                "--seed",
                "5",
                "--count",
                "2",
                "--steps",
                "8",
                "--set",
                "5.cfg=1",
                "--set",
                "6.filename_prefix=a=b",
            ]
        )
        == 0
    )
    inputs = [{**graph["3"]["inputs"], **graph["5"]["inputs"]} for graph in fake.graphs()]
    assert [(i["prompt"], i["seed"], i["steps"], i["cfg"]) for i in inputs] == [
        ("a", 5, 8, 4.5),
        ("a", 6, 8, 4.5),
        ("b", 9, 3, 1),
        ("b", 10, 3, 1),
    ]
    assert all(graph["6"]["inputs"]["filename_prefix"] == "a=b" for graph in fake.graphs())
    assert sorted(
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")
    ) == [os.path.join("x", "y-0.png"), os.path.join("x", "y-1.png"), "z-0.png", "z-1.png"]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("p.csv", "caption\na\n", "no input for caption"),
        ("p.csv", "prompt\na, b\n", "more columns"),
        ("p.json", "{", "is not JSON"),
        ("p.jsonl", "[1]\n", "not a table"),
        ("p.md", "a", "expected .txt"),
        ("p.csv", "file_name\n../x\n", "leads out of"),
        ("p.csv", "file_name,seed\nx,1\nx.png,2\n", "the same file_name"),
    ],
)
def test_prompt_files_that_make_no_sense_are_rejected_before_anything_is_sent(
    tmp_path, fakes, workflow, capsys, name, content, said
):
    fake = fakes()
    (tmp_path / name).write_text(content)
    assert (
        main(
            [
                "queue",
                workflow,
                "--server",
                fake.url,
                "--prompts",
                str(tmp_path / name),
                "-o",
                str(tmp_path / "out"),
            ]
        )
        == 1
    )
    assert said in capsys.readouterr().err and not fake.asked and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"nodes": [], "links": []}', "workflows/api/"),
        ("[", "is not JSON"),
        ('{"1": {"inputs": {}}}', "API format"),
        ("{}", "API format"),
    ],
)
def test_what_is_no_api_workflow_is_rejected_with_what_to_do(tmp_path, capsys, content, said):
    (tmp_path / "ui.json").write_text(content)
    assert main(["queue", str(tmp_path / "ui.json")]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["-o", "x.jpg"], "written as .png"),
        (["-o", "x.png", "--count", "2"], "give a folder"),
        (["--count", "0"], "expected 1 or more"),
        (["--server", "ftp://x"], "expected an address"),
        (["--set", "5.seed"], "expected NODE.INPUT=VALUE"),
        (["--input-image", __file__], "is not a readable image"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, workflow, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["queue", workflow, *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_images_tell_their_settings_and_are_not_drawn_again(tmp_path, fakes, workflow, capsys):
    fake = fakes()
    (tmp_path / "p.txt").write_text("a\nb\n")
    command = [
        "queue",
        workflow,
        "--server",
        fake.url,
        "--prompts",
        str(tmp_path / "p.txt"),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    with Image.open(tmp_path / "out" / "00001.png") as image:
        assert json.loads(image.info["l2p"])["3.prompt"] == "b"
        assert json.loads(image.info["prompt"]) == fake.graphs()[1], (
            "still opens on ComfyUI's canvas"
        )
        assert image.getpixel((0, 0)) == (0, 0, 0)
    (tmp_path / "out" / "00000.png").unlink()
    fake.history.clear()
    assert main(command) == 0
    assert "1 of 2 images exist already" in capsys.readouterr().out and len(fake.graphs()) == 3
    assert main([*command, "--steps", "4"]) == 1
    assert "generated with other settings (5.steps 30, now 4)" in capsys.readouterr().err
    assert main([*command, "--steps", "4", "--overwrite"]) == 0
    assert len(fake.graphs()) == 5 and sorted(os.listdir(tmp_path / "out")) == [
        "00000.png",
        "00001.png",
    ]


def test_a_job_the_server_still_knows_is_fetched_and_not_sent_again(tmp_path, fakes, workflow):
    fake = fakes()
    command = ["queue", workflow, "--server", fake.url, "-o", str(tmp_path / "out.png")]
    assert main(command) == 0
    (tmp_path / "out.png").unlink()
    assert main(command) == 0 and (tmp_path / "out.png").exists() and len(fake.graphs()) == 1


def test_several_images_of_one_job_get_numbers_and_previews_are_left(tmp_path, fakes, workflow):
    fake = fakes()
    fake.images = 3
    assert main(["queue", workflow, "--server", fake.url, "-o", str(tmp_path / "out")]) == 0
    names = ["00000.png", "00000_2.png", "00000_3.png"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert [Image.open(tmp_path / "out" / name).getpixel((0, 0))[0] for name in names] == [0, 1, 2]


def test_an_input_image_is_uploaded_under_a_name_of_its_content(tmp_path, fakes):
    fake = fakes()
    (tmp_path / "stock.json").write_text(json.dumps(STOCK))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "my photo.PNG")
    assert (
        main(
            [
                "queue",
                str(tmp_path / "stock.json"),
                "--server",
                fake.url,
                "-o",
                str(tmp_path / "out"),
                "--input-image",
                str(tmp_path / "my photo.PNG"),
            ]
        )
        == 0
    )
    ((name, content),) = fake.uploads.items()
    assert (
        fake.graphs()[0]["7"]["inputs"]["image"] == name
        and content == (tmp_path / "my photo.PNG").read_bytes()
    )
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "my photo.PNG")
    (changed,) = plan(
        STOCK, [{"input_image": str(tmp_path / "my photo.PNG")}], [], 1, tmp_path / "out"
    )
    assert list(changed.uploads) != [name]


def test_two_servers_share_the_work(tmp_path, fakes, workflow):
    one, two = fakes(), fakes()
    one.hold = True  # the first never gets done with its first job

    def release(fake, _):
        if len(two.graphs()) == 4:
            one.hold = False

    two.on_prompt = release
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\ne\n")
    assert (
        main(
            [
                "queue",
                workflow,
                "--server",
                one.url,
                "--server",
                two.url,
                "--prompts",
                str(tmp_path / "p.txt"),
                "-o",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert (len(one.graphs()), len(two.graphs())) == (1, 4)
    assert (
        one.graphs()[0]["6"]["inputs"]["filename_prefix"]
        != two.graphs()[0]["6"]["inputs"]["filename_prefix"]
    ), "in one folder they would write over each other's files"
    prompts = [
        json.loads(Image.open(tmp_path / "out" / f"0000{n}.png").info["prompt"])["3"]["inputs"][
            "prompt"
        ]
        for n in range(5)
    ]
    assert prompts == list("abcde")


VALIDATION = {
    "error": {
        "type": "prompt_outputs_failed_validation",
        "message": "Prompt outputs failed validation",
        "details": "",
    },
    "node_errors": {
        "5": {
            "class_type": "L2PKSampler",
            "dependent_outputs": ["6"],
            "errors": [
                {
                    "type": "value_smaller_than_min",
                    "message": "Value 0 smaller than min of 1",
                    "details": "steps",
                    "extra_info": {
                        "input_name": "steps",
                        "input_config": ["INT", {"min": 1, "max": 99}],
                        "received_value": 0,
                    },
                },
                {
                    "type": "required_input_missing",
                    "message": "Required input is missing",
                    "details": "latent",
                    "extra_info": {"input_name": "latent"},
                },
            ],
        },
        "1": {
            "class_type": "L2PCheckpointLoader",
            "dependent_outputs": ["6"],
            "errors": [
                {
                    "type": "value_not_in_list",
                    "message": "Value not in list",
                    "details": "",
                    "extra_info": {
                        "input_name": "checkpoint",
                        "input_config": config,
                        "received_value": "no.safetensors",
                    },
                }
                for config in (
                    [["a", "b"], {}],
                    ["COMBO", {"options": ["c"]}],
                    ["COMBO", {"options": []}],
                    None,
                )
            ],
        },
    },
}


def missing(kind):
    return {
        "error": {
            "type": "missing_node_type",
            "message": "Node not found",
            "details": "Node ID '#5'",
            "extra_info": {"node_id": "5", "class_type": kind, "node_title": kind},
        },
        "node_errors": {},
    }


@pytest.mark.parametrize(
    "status, body, said",
    [
        (
            400,
            VALIDATION,
            [
                "Sampler (node 5, L2PKSampler): steps is 0; expected 1 to 99",
                "lacks its input latent",
                (
                    "L2PCheckpointLoader (node 1): checkpoint is 'no.safetensors', which the server"
                    " does not have. It has a, b"
                ),
                "It has c",
                "It has none",
                "Its list is long",
            ],
        ),
        (200, VALIDATION, ["steps is 0"]),
        (
            400,
            missing("L2PKSampler"),
            ["does not know the node L2PKSampler (node 5): install ComfyUI-L2P into custom_nodes"],
        ),
        (400, missing("Fancy"), ["install the pack it comes from"]),
        (
            400,
            {
                "error": {"type": "prompt_no_outputs", "message": "m", "details": ""},
                "node_errors": [],
            },
            ["give it a Save Image node"],
        ),
        (
            400,
            {"error": {"type": "new", "message": "Something", "details": "else"}},
            ["Something: else"],
        ),
        (500, b"Internal", ["is it a ComfyUI server?"]),
    ],
)
def test_a_refusal_is_explained(tmp_path, fakes, workflow, capsys, status, body, said):
    fake = fakes()
    fake.answer, fake.hold = (status, body), True
    assert (
        main(["queue", workflow, "--server", fake.url, "-o", str(tmp_path / "out"), "--count", "3"])
        == 1
    )
    error = capsys.readouterr().err
    assert (
        not [text for text in said if text not in error] and "0 of 3 images were generated" in error
    )
    assert len(fake.graphs()) == 2 and not fake.running and not (tmp_path / "out").exists(), (
        "it is given up after two"
    )


def test_a_server_that_rejects_leaves_its_work_to_the_other(tmp_path, fakes, workflow):
    bad, good = fakes(), fakes()
    bad.answer = (400, missing("L2PKSampler"))
    assert (
        main(
            [
                "queue",
                workflow,
                "--server",
                bad.url,
                "--server",
                good.url,
                "-o",
                str(tmp_path / "out"),
                "--count",
                "4",
            ]
        )
        == 0
    )
    assert len(bad.graphs()) <= 2 and len(good.graphs()) == 4


def test_a_row_that_is_rejected_does_not_keep_the_others_from_being_drawn(
    tmp_path, fakes, workflow, capsys
):
    fake = fakes()

    def refuse_second(fake, body):
        second = body["prompt"]["5"]["inputs"]["seed"] == 8
        fake.answer = (200, VALIDATION) if second else None
        if second:
            fake.running.pop(body["prompt_id"])

    fake.on_prompt = refuse_second
    command = ["queue", workflow, "--server", fake.url, "-o", str(tmp_path / "out"), "--count", "4"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "3 of 4 images were generated" in error and error.count("steps is 0") == 1
    fake.on_prompt = lambda fake, body: None
    assert main(command) == 0 and len(fake.graphs()) == 5


def failed(message="boom\n"):
    return {
        "status_str": "error",
        "messages": [
            ["execution_start", {}],
            [
                "execution_error",
                {
                    "node_id": "5",
                    "node_type": "L2PKSampler",
                    "exception_type": "RuntimeError",
                    "exception_message": message,
                },
            ],
        ],
    }


def test_first_jobs_that_fail_end_the_run(tmp_path, fakes, workflow, capsys):
    fake = fakes()
    fake.outcome = failed()
    command = ["queue", workflow, "--server", fake.url, "-o", str(tmp_path / "out"), "--count", "3"]
    assert main(command) == 1
    assert (
        "Sampler (node 5) failed: RuntimeError: boom\n" in capsys.readouterr().err
        and len(fake.graphs()) == 2
    )
    fake.outcome = {"status_str": "success"}
    assert main(command) == 0 and len(fake.graphs()) == 5, "what failed is sent again"


def test_a_later_job_that_fails_is_told_at_the_end(tmp_path, fakes, workflow, capsys):
    fake = fakes()

    def fail_second(fake, body):
        fake.outcome = (
            failed() if body["prompt"]["5"]["inputs"]["seed"] == 8 else {"status_str": "success"}
        )

    fake.on_prompt = fail_second
    assert (
        main(["queue", workflow, "--server", fake.url, "-o", str(tmp_path / "out"), "--count", "3"])
        == 1
    )
    error = capsys.readouterr().err
    assert (
        "2 of 3 images were generated. The same command resumes" in error
        and "00000-1.png: http" in error
    )
    assert sorted(os.listdir(tmp_path / "out")) == ["00000-0.png", "00000-2.png"]


def test_a_server_that_restarts_and_forgets_gets_the_job_again(tmp_path, fakes, workflow, capsys):
    fake = fakes()
    replaced = []

    def crash(fake, body):
        fake.running.clear()

        def restart():
            fake.close()
            time.sleep(0.1)
            replaced.append(fakes(int(fake.url.rpartition(":")[2])))

        threading.Thread(target=restart).start()

    fake.hold, fake.on_prompt = True, crash
    assert (
        main(["queue", workflow, "--server", fake.url, "-o", str(tmp_path / "out"), "--count", "2"])
        == 0
    )
    assert "waiting up to 600 s" in capsys.readouterr().err
    assert [graph["5"]["inputs"]["seed"] for graph in replaced[0].graphs()] == [7, 8]


def test_a_server_that_loses_a_job_again_and_again_is_given_up(tmp_path, fakes, workflow, capsys):
    fake = fakes()
    fake.hold, fake.on_prompt = True, lambda fake, body: fake.running.clear()
    assert main(["queue", workflow, "--server", fake.url, "-o", str(tmp_path / "out.png")]) == 1
    assert "lost the job 3 times" in capsys.readouterr().err and len(fake.graphs()) == 3


def test_a_server_that_stays_away_leaves_its_job_to_the_other(tmp_path, fakes, workflow, capsys):
    gone, good = fakes(), fakes()
    gone.close()
    command = [
        "queue",
        workflow,
        "-o",
        str(tmp_path / "out"),
        "--count",
        "2",
        "--server",
        gone.url,
    ]
    assert main([*command, "--timeout", "0.1"]) == 1
    assert "0 of 2 images were generated" in capsys.readouterr().err
    patient = "--timeout", "2"  # the good one may be slow on a busy machine
    assert main([*command, *patient, "--server", good.url]) == 0 and len(good.graphs()) == 2


@pytest.mark.slow
def test_ctrl_c_takes_the_job_off_the_server_and_leaves_no_half_file(tmp_path, fakes, workflow):
    fake = fakes()
    fake.hold = True
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "comfyui_l2p.l2p_core.cli",
            "queue",
            workflow,
            "--server",
            fake.url,
            "-o",
            str(tmp_path / "out"),
            "--count",
            "3",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    until = time.monotonic() + 120
    while not fake.running:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 130
        and b"the same command resumes" in said
        and b"Traceback" not in said
    )
    key = fake.asked[0][1]["prompt_id"]
    assert fake.asked[1:] == [("/queue", {"delete": [key]}), ("/interrupt", {"prompt_id": key})]
    assert not fake.running and not (tmp_path / "out").exists()


def test_progress_is_read_off_the_socket_until_the_job_ends(tmp_path):
    (job,) = plan(GRAPH, [{}], [], 1, tmp_path / "out.png")

    class Socket:
        messages = [b"preview", ""] + [
            json.dumps({"type": kind, "data": data})
            for kind, data in (
                ("status", {}),
                ("executing", {"node": "1", "prompt_id": "another"}),
                ("executing", {"node": "5", "prompt_id": job.id}),
                ("progress", {"node": "5", "value": 2, "max": 9, "prompt_id": job.id}),
                ("executing", {"node": None, "prompt_id": job.id}),
                ("executing", {"node": "6", "prompt_id": job.id}),
            )
        ]

        def settimeout(self, seconds):
            assert 0 < seconds <= server_module.Server.poll

        def recv(self):
            return self.messages.pop(0)

    server, said = server_module.Server("127.0.0.1:1"), []
    server.socket = Socket()
    server_module.Server.poll = 60
    server.listen(job, said.append)
    assert said == ["Sampler", "Sampler 2/9"] and len(Socket.messages) == 1


def test_another_ones_job_is_not_interrupted(tmp_path, fakes, workflow):
    fake = fakes()
    (job,) = plan(read_workflow(tmp_path / "flow.json"), [{}], [], 1, tmp_path / "out.png")
    fake.hold, fake.running = True, {"somebody": {}}
    server_module.Server(fake.url).cancel(job)
    assert [path for path, _ in fake.asked] == ["/queue"] and fake.running


def test_a_failing_write_leaves_nothing(tmp_path, fakes, workflow, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert (
        main(["queue", workflow, "--server", fakes().url, "-o", str(tmp_path / "out" / "a.png")])
        == 1
    )
    assert (
        "is full, so a.png was not written" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )


def test_the_first_of_several_images_is_written_last(tmp_path, fakes, workflow):
    fake = fakes()
    fake.images = 2
    (tmp_path / "out" / "00000_2.png").mkdir(parents=True)  # can't be replaced by a file
    assert main(["queue", workflow, "--server", fake.url, "-o", str(tmp_path / "out")]) == 1
    assert os.listdir(tmp_path / "out") == ["00000_2.png"], (
        "where the first is, all are taken to be"
    )


def test_without_websocket_client_the_pip_command_is_told(workflow, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "websocket", None)
    assert main(["queue", workflow]) == 1
    assert "pip install" in capsys.readouterr().err


@pytest.mark.slow
def test_two_queues_into_one_folder_do_not_collide(tmp_path, fakes, workflow, monkeypatch, capsys):
    fake = fakes()
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\n")
    command = [
        "queue",
        workflow,
        "--server",
        fake.url,
        "--prompts",
        str(tmp_path / "p.txt"),
        "-o",
        str(tmp_path / "out"),
    ]
    with locked(tmp_path / "out", "busy", folder=True), monkeypatch.context() as patch:
        patch.setattr("comfyui_l2p.l2p_core.batch.WAIT", 0)
        assert main(command) == 1
    assert "another run is writing to" in capsys.readouterr().err and fake.graphs() == []
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "comfyui_l2p.l2p_core.cli", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(os.listdir(tmp_path / "out")) == [f"0000{number}.png" for number in range(4)]
    assert len(fake.graphs()) == 4, "no job was sent twice"


def test_a_servers_answer_of_deeply_nested_json_is_rejected():
    with pytest.raises(ValueError, match="is it a ComfyUI server"):
        server_module.read_json(b"[" * 100_000, "http://x")
