"""Inputs damaged at random, with fixed seeds: each is read, or rejected in a sentence. A failure
names its seed."""

import io
import json
import random
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from comfyui_l2p.l2p_core import images
from comfyui_l2p.l2p_core.cli import make_parser
from comfyui_l2p.l2p_core.files.content import printable
from comfyui_l2p.l2p_core.images import mask_levels, read_image
from comfyui_l2p.l2p_core.outputs import output_files
from comfyui_l2p.l2p_core.remote import queue as queue_module
from comfyui_l2p.l2p_core.remote.server import Away, Rejected, Server, explain, failure
from comfyui_l2p.l2p_core.settings import FIELDS, checked
from comfyui_l2p.l2p_core.tables import read_rows
from comfyui_l2p.l2p_core.train.config import TrainConfig, read_config
from PIL import Image

MUTATIONS = 12_000  # of images, of which 4,000 are of formats that are read
TEXTS = 1_500  # of prompt files, and as many of TOML
ANSWERS = 600
SIZE = (24, 16)
JUNK = (
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    10**30,
    "",
    "x",
    "\0",
    "\ud83d",
    [],
    {},
    [[]],
    {"a": 1},
)


def damage(content: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four things wrong: changed, cut, lost, doubled or zeroed."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if not content:
            break
        at = rng.randrange(len(content))
        end = at + rng.randint(1, 16)
        match rng.randrange(6):
            case 0:
                content[at] = rng.randrange(256)
            case 1:
                content[at] ^= 1 << rng.randrange(8)
            case 2:
                del content[at:]
            case 3:
                del content[at:end]
            case 4:
                content[at:at] = content[at:end]
            case 5:
                content[at:end] = bytes(len(content[at:end]))
    return bytes(content)


def saved_in_every_format() -> dict[str, bytes]:
    """One small image in each format and mode that Pillow can save, with EXIF where it has any."""
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    found = {}
    Image.init()
    for kind in sorted(Image.SAVE):
        for mode in ("RGBA", "RGB", "L", "P", "1", "I;16", "F"):
            image = Image.fromarray(noise).convert("RGBA" if mode == "RGBA" else "RGB")
            if mode in ("L", "1", "P"):
                image = image.convert(mode)
            elif mode == "I;16":
                image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
            elif mode == "F":
                image = Image.fromarray((noise[..., 0] / 255).astype(np.float32))
            stream = io.BytesIO()
            try:
                image.save(stream, kind, **({"exif": exif} if mode == "RGB" else {}))
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                continue
            found[f"{kind} {mode}"] = stream.getvalue()
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_damaged_image_ends_in_anything_but_a_sentence(monkeypatch):
    monkeypatch.setattr(images, "MAX_DECODED_BYTES", 20_000_000)  # a test needs no more
    sources = saved_in_every_format()
    assert len({name.split()[0] for name in sources}) >= 26
    read = 0
    for seed in range(MUTATIONS):
        name = list(sources)[seed % len(sources)]
        content = damage(sources[name], random.Random(seed))
        try:
            image = read_image(io.BytesIO(content), None, name="x.png")
            mask_levels(image)
            read += 1
        except ValueError as error:
            said = str(error)
            assert said.startswith(("x.png is not a readable image: ", "the inpaint_mask")), seed
            assert len(said) < 600, (seed, said)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {name}: {error!r}") from error
        else:
            assert image.mode in ("L", "LA", "RGB", "RGBA"), seed
    assert 0.05 < read / MUTATIONS < 0.9, "the cases no longer reach both ends"


PROMPT_FILES = {
    ".csv": (
        b'file_name,prompt,seed,width,cfg_scale\r\na/b.png,"a red, small circle",1,96,2.0\r\n'
        b"c,a star,42.0,,\r\n"
    ),
    ".txt": "a red circle\r\nein grüner Stern\n\na cross 🎈\n".encode(),
    ".json": json.dumps(
        [{"prompt": "a 🎈", "seed": 1, "file_name": "x"}, {"text": "b", "width": 96.0}, "c"]
    ).encode(),
    ".jsonl": (
        b'{"prompt": "a", "seed": 7, "stages": 1}\n{"prompt": "b\\ud83d", "cfg_scale": NaN}\n'
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_damaged_prompt_file_ends_in_anything_but_a_sentence(tmp_path):
    """Read, every setting checked and every output named, as before the first image."""
    planned = 0
    for seed in range(TEXTS):
        rng = random.Random(seed)
        suffix = list(PROMPT_FILES)[seed % len(PROMPT_FILES)]
        content = PROMPT_FILES[suffix]
        if rng.random() < 0.2:
            content = content.decode().encode(rng.choice(["utf-16", "utf-8-sig", "utf-16-le"]))
        if suffix in (".json", ".jsonl") and rng.random() < 0.3:
            rows = [{rng.choice([*FIELDS, "file_name"]): rng.choice(JUNK), "prompt": "a"}]
            content = json.dumps(rows).encode()
        file = tmp_path / f"p{suffix}"
        file.write_bytes(damage(content, rng))
        try:
            for any_column in (True, False):
                rows = read_rows(file, any_column)
            for row in rows:
                for name, value in row.items():
                    if name in FIELDS and value is not None:
                        checked(name, value)
            output_files(rows, 2, tmp_path / "out")
            planned += 1
        except ValueError as error:
            printable(error).encode(errors="backslashreplace")
        except Exception as error:
            raise AssertionError(f"seed {seed}, {suffix}: {error!r}") from error
    assert 0.1 < planned / TEXTS < 0.95


@pytest.mark.slow
def test_no_damaged_settings_file_ends_in_anything_but_a_sentence(tmp_path):
    whole = (
        'checkpoint = "a"\ndata = "b"\noutput = "c"\nsteps = 10\nbatch = 2\nfreeze = "1:-1"\n'
        'learning_rate = 1e-4\nsample_prompts = ["x", "y"]\ncheckpointing = true\nseed = 3\n'
        'background = "#ffffff"\nschedule = "linear"\nwarmup = 1\n'
    )
    names = list(TrainConfig.__dataclass_fields__)
    file, read = tmp_path / "c.toml", 0
    values = [
        "-1",
        "1e400",
        "nan",
        "[]",
        "{}",
        '""',
        "9" * 5000,
        "1.5",
        "true",
        "[1]",
        "1979-05-27",
    ]
    for seed in range(TEXTS):
        rng = random.Random(seed)
        content = whole
        if rng.random() < 0.6:
            name = rng.choice(names)
            lines = [line for line in whole.splitlines() if not line.startswith(f"{name} =")]
            content = "\n".join([*lines, f"{name} = {rng.choice(values)}"])
        encoded = content.encode()
        file.write_bytes(damage(encoded, rng) if rng.random() < 0.7 else encoded)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_config(file, {})
            read += 1
        except ValueError:
            pass
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
    assert 0.05 < read / TEXTS < 0.9


GRAPH = {
    "3": {"class_type": "L2PKSampler", "inputs": {"seed": 7, "prompt": "a"}},
    "6": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "x"}},
}


def answers(job) -> dict[str, object]:
    """What a ComfyUI answers, by path."""
    return {
        "/queue": {"queue_running": [[0, "another", {}]], "queue_pending": []},
        "/history": {
            job.id: {
                "status": {"status_str": "success", "messages": [["execution_start", {}]]},
                "outputs": {
                    "6": {"images": [{"filename": "a", "subfolder": "", "type": "output"}]}
                },
            }
        },
        "/upload/image": {"name": "x.png"},
        "/prompt": {
            "error": {"type": "t", "message": "m", "details": "d", "extra_info": {"node_id": "3"}},
            "node_errors": {
                "3": {
                    "class_type": "L2PKSampler",
                    "errors": [
                        {
                            "type": "value_not_in_list",
                            "message": "m",
                            "details": "d",
                            "extra_info": {
                                "input_name": "seed",
                                "input_config": ["INT", {"min": 0, "max": 1}],
                                "received_value": 7,
                            },
                        }
                    ],
                }
            },
        },
        "socket": {"type": "progress", "data": {"node": "3", "value": 1, "prompt_id": job.id}},
        "failure": {
            "status": {
                "status_str": "error",
                "messages": [
                    [
                        "execution_error",
                        {"node_id": "3", "exception_message": "m", "node_type": "t"},
                    ]
                ],
            }
        },
    }


def places_in(value: object) -> list[tuple[object, object]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in items if isinstance(value, (dict, list)) else ():
        found.append((value, key))
        if isinstance(inner, (dict, list)):
            found += places_in(inner)
    return found


def test_no_damaged_answer_of_a_server_ends_in_anything_but_a_sentence(tmp_path, monkeypatch):
    """One to three values of what ComfyUI answers are replaced, or bytes of it damaged."""
    (job,) = queue_module.plan(GRAPH, [{}], [], 1, tmp_path / "out.png")
    (tmp_path / "x.png").write_bytes(b"")
    stream = io.BytesIO()
    Image.new("RGB", SIZE, "red").save(stream, "PNG")
    server, done = Server("127.0.0.1:1"), 0
    for seed in range(ANSWERS):
        rng = random.Random(seed)
        said = answers(job)
        for _ in range(rng.randint(1, 3)):
            container, key = rng.choice(places_in(said))
            container[key] = deepcopy(rng.choice(JUNK))

        def ask(path, *_, **__):
            path = next((each for each in said if path.startswith(each)), "/view")
            if path == "/view":
                return damage(stream.getvalue(), rng) if rng.random() < 0.5 else stream.getvalue()
            encoded = json.dumps(said[path]).encode()
            return damage(encoded, rng) if rng.random() < 0.2 else encoded

        monkeypatch.setattr(server, "ask", ask)
        for use in (
            lambda: server.find(job),
            lambda: server.fetch(server.find(job) or {}, job),
            lambda: server.upload("x.png", tmp_path / "x.png"),
            lambda: server.send(job),
            lambda: server.tell(said["socket"], job, lambda text: text.encode(errors="replace")),
            lambda: failure(said["failure"] if isinstance(said["failure"], dict) else {}, GRAPH),
            lambda: explain(said["/prompt"] if isinstance(said["/prompt"], dict) else {}, GRAPH),
        ):
            try:
                use()
                done += 1
            except (Rejected, Away, ValueError) as error:
                printable(error).encode(errors="backslashreplace")
            except Exception as error:
                raise AssertionError(f"seed {seed}: {error!r}") from error
    assert 0.3 < done / ANSWERS / 7 < 0.95


def test_numbers_on_the_command_line_are_not_taken_for_more_than_they_are():
    """The flags of the settings keep what was typed, so that the one set of bounds judges it."""
    typed = make_parser().parse_args(["generate", "a", "--seed", "9" * 5000])
    with pytest.raises(ValueError, match="seed is"):
        checked("seed", typed.seed)
    assert Path(typed.output) == Path("out.png")
