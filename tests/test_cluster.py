"""Ray: nodes of a cluster on this machine, of which some are killed."""

import http.client
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from subprocess import PIPE

import pytest
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.cluster import connect
from comfyui_l2p.l2p_core.cluster.files import keep
from comfyui_l2p.l2p_core.cluster.generate import check_record
from PIL import Image
from serving import MISSING, image_of, serving

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or sys.platform != "linux",
    reason="needs Linux and the extra ray",
)
pytestmark = pytest.mark.xdist_group("ray")  # one cluster for all
FEW = ["--steps", "2", "--height", "32", "--width", "32", "--device", "cpu"]
SECONDS = 120


class Cluster:
    """A head that computes nothing, and a node of one CPU. address: what --ray takes."""

    def __init__(self):
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_worker_niceness"] = "0"  # else other tests on this machine starve them
        connect.stay_local()
        from ray.cluster_utils import Cluster as LocalCluster

        self.local = LocalCluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.address = self.local.address
        self.add()

    def add(self):
        self.last = self.local.add_node(num_cpus=1)

    def kill(self):
        """Kill the node that was added last."""
        self.last.kill_raylet(check_alive=False)  # at once; what is below takes a while
        self.local.remove_node(self.last, allow_graceful=False)


@pytest.fixture(scope="module")
def cluster():
    made = Cluster()
    yield made
    made.local.shutdown()


def pixels(folder):
    return {file.name: Image.open(file).tobytes() for file in folder.iterdir()}


def wait_for(condition):
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@needs_ray
@pytest.mark.slow
def test_a_node_dies_and_the_images_are_those_of_a_run_without_ray(cluster, tmp_path):
    arguments = ["generate", "a red circle", "--count", "24", *FEW, "--steps", "8", "-o"]
    assert main([*arguments, str(tmp_path / "alone")]) == 0
    shared = tmp_path / "shared"
    shared.mkdir()
    for number in (3, 4):  # what is there already is kept
        shutil.copy(tmp_path / "alone" / f"00000-{number}.png", shared)
    there = (shared / "00000-3.png").stat().st_mtime_ns

    command = [sys.executable, "-m", "comfyui_l2p", *arguments, str(shared)]
    with subprocess.Popen(
        [*command, "--ray", cluster.address], stdout=PIPE, stderr=PIPE, text=True
    ) as process:
        wait_for(lambda: len(list(shared.glob("*.png"))) >= 6)
        cluster.kill()
        cluster.add()
        said, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, told
    assert "2 of 24 images exist already" in said and "a worker of the cluster died" in told
    assert pixels(shared) == pixels(tmp_path / "alone")
    assert (shared / "00000-3.png").stat().st_mtime_ns == there


@needs_ray
@pytest.mark.slow
def test_a_training_set_is_that_of_a_run_without_ray(cluster, tmp_path):
    pytest.importorskip("diffusers", minversion="0.36")
    from latent import make_latent

    make_latent(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")
    flags = ["--steps", "1", "--height", "64", "--width", "64", "--device", "cpu", "-o"]
    arguments = ["synthesize", str(prompts), "--model", str(tmp_path / "model"), *flags]
    alone, collected = tmp_path / "alone", tmp_path / "collected"
    assert main([*arguments, str(alone)]) == 0
    assert main([*arguments, str(collected), "--ray", cluster.address, "--collect"]) == 0
    assert pixels(collected / "images") == pixels(alone / "images")
    assert (collected / "metadata.csv").read_text() == (alone / "metadata.csv").read_text()


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} come with the extra serve")
def test_a_node_dies_and_every_request_is_answered_as_without_ray(cluster, tmp_path):
    count, flags = 16, {"num_inference_steps": 20, "height": 32, "width": 32}
    images = [tmp_path / f"00000-{seed}.png" for seed in range(count)]
    wanted = ["--seed", "0", "--count", str(count), *FEW, "--steps", "20"]
    assert main(["generate", "a red circle", *wanted, "-o", str(tmp_path)]) == 0
    cluster.add()
    with serving("--ray", cluster.address) as server, ThreadPoolExecutor(4) as clients:

        def ask(seed):
            return server.generate(prompt="a red circle", seed=seed, **flags)["data"]

        answers = [clients.submit(ask, seed) for seed in range(count)]
        answers[2].result()
        cluster.kill()
        for answer, file in zip(answers, images, strict=True):
            (image,) = answer.result()
            assert image_of(image["b64_json"]).tobytes() == Image.open(file).tobytes()
        assert server.metric("l2p_worker_restarts_total") and not server.metric(
            "l2p_failures_total"
        )

        connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        body = {"prompt": "a red circle", "num_inference_steps": 100}
        head = {"content-type": "application/json"}
        connection.request("POST", "/v1/images/generations", json.dumps(body), head)
        wait_for(lambda: server.metric("l2p_images_running") == 1)
        connection.close()
        wait_for(lambda: server.metric("l2p_cancelled_total") == 1)
        assert server.generate(prompt="a red circle", **flags)["data"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--ray", "a green star"], "A prompt goes before --ray"),
        (["--ray", "127.0.0.1:1"], "no Ray answers at 127.0.0.1:1"),
        (["--collect"], "--collect is for a Ray cluster"),
        (["--ray", "--free-text-encoder"], "--free-text-encoder cannot be combined with --ray"),
    ],
)
def test_flags_that_do_not_fit_get_a_sentence(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.setattr("comfyui_l2p.l2p_core.commands.arguments.require", lambda *_: None)
    assert main(["generate", "a circle", "-o", str(tmp_path / "out.png"), *FEW, *flags]) == 1
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["generate", "a circle", "-o", str(tmp_path / "out.png"), "--ray"]) == 1
    assert "pip install 'comfyui-l2p[ray]'" in capsys.readouterr().err


def test_a_folder_that_is_not_shared_and_another_checkpoint_are_found_out(tmp_path):
    with pytest.raises(ValueError, match="the folder is not shared. Give --collect"):
        keep(tmp_path / "out.png", None)
    check_record({"seed": 1, "checkpoint_sha256": "a"}, {"seed": 1, "checkpoint_sha256": "a"})
    with pytest.raises(ValueError, match="checkpoint_sha256 'b', here 'a'"):
        check_record({"checkpoint_sha256": "b"}, {"checkpoint_sha256": "a"})
