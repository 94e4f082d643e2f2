"""A workflow and prompts → ComfyUI servers → image files: `l2p queue`."""

import json
import math
import uuid
import zlib
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from copy import deepcopy
from functools import cache
from pathlib import Path
from threading import Event, Lock
from urllib.parse import urlsplit

from tqdm import tqdm

from ..batch import is_generated, lock_outputs
from ..files.atomic import atomic_write
from ..files.content import printable
from ..files.header import hash_files
from ..images import PNG_KEY, read_image
from ..outputs import output_files
from ..settings import checked
from ..tables import read_rows
from .server import Away, Job, Rejected, Server
from .workflow import fill, places, read_workflow

IMAGE_SETTINGS = ("input_image", "inpaint_mask")  # files of ours, uploaded
PATIENCE = 2  # jobs that a server may fail before it has generated one


def queue(
    workflow: Path,
    output: Path,
    servers: list[str],
    prompts: Path | None,
    settings: dict,
    assignments: list[str],
    count: int = 1,
    timeout: float = 600,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Generate every row of the prompt file on whichever server is free, and write the images.

    settings: see `PLACES`, None for the workflow's own; assignments: NODE.INPUT=VALUE. A row's
    value comes before both. count: images for each row, with seeds one apart. timeout: seconds to
    wait for a server that went away. Raises ValueError, before anything is sent, where a value
    finds no place, and at the end where images are missing."""
    try:
        import requests  # noqa: F401
        import websocket  # noqa: F401
    except ImportError:
        raise ImportError(
            "l2p queue needs requests and websocket-client: pip install 'requests>=2.31'"
            " 'websocket-client>=1.6'"
        ) from None
    if not 0 <= timeout < math.inf:
        raise ValueError(f"--timeout is {timeout}; expected a number of seconds, 0 or more")
    values = [(name, value) for name, value in settings.items() if value is not None]
    for assignment in assignments:
        name, found, value = assignment.partition("=")
        if not found:
            raise ValueError(f"--set {assignment}: expected NODE.INPUT=VALUE, such as 3.steps=20")
        values.append((name, value))
    jobs = plan(
        read_workflow(workflow),
        read_rows(prompts, any_column=True) if prompts else [{}],
        values,
        count,
        output,
        overwrite,
    )
    with lock_outputs([job.output for job in jobs]):
        missing = [
            job
            for job in jobs
            if overwrite or not job.output.exists() or not is_generated(job.output, job.record)
        ]
        if len(missing) < len(jobs):
            print(f"{len(jobs) - len(missing)} of {len(jobs)} images exist already")
        if missing:
            generate(
                missing,
                [Server(url, len(servers) > 1) for url in dict.fromkeys(servers)],
                timeout,
                progress,
            )


def plan(
    graph: dict,
    rows: list[dict],
    values: list[tuple[str, object]],
    count: int,
    output: Path,
    overwrite: bool = False,
) -> list[Job]:
    """Return every image to generate, files named as by `l2p generate`. values: (name, value), for
    what a row leaves out. Raises ValueError where a value finds no place or the output makes no
    sense."""
    seeds = places(graph, "seed")
    if count > 1 and not seeds:
        raise ValueError(
            f"--count is {count}, but the workflow has no seed that would tell the images apart"
        )
    jobs = []

    @cache
    def name_on_server(
        file: Path,
    ) -> str:  # by content: the graph is the same on every server, and no file there is lost
        read_image(file)
        return f"l2p-{hash_files([file])[:16]}{file.suffix.lower()}"

    for number, (row, files) in enumerate(zip(rows, output_files(rows, count, output))):
        row = {
            "prompt" if name == "text" else name: value
            for name, value in row.items()
            if value is not None and name != "file_name"
        }
        try:
            filled, uploads = deepcopy(graph), {}
            for name, value in [*values, *row.items()]:
                if name in IMAGE_SETTINGS:
                    file = Path(str(value))
                    value = name_on_server(file)
                    uploads[value] = file
                fill(filled, graph, name, value)
        except ValueError as error:
            raise ValueError(
                f"prompt {number + 1}: {error}" if len(rows) > 1 else str(error)
            ) from None
        for copy, target in enumerate(files):
            numbered = deepcopy(filled)
            for node, name in seeds:
                if copy:
                    seed = int(checked("seed", numbered[node]["inputs"][name]))
                    numbered[node]["inputs"][name] = seed + copy
            key = (
                uuid.uuid4()
                if overwrite
                else uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([str(target.resolve()), numbered]))
            )
            jobs.append(Job(target, numbered, uploads, str(key)))
    return jobs


def generate(jobs: list[Job], servers: list[Server], timeout: float, progress: bool = True) -> None:
    """Give every server the next job whenever it is free, and write the images, each file
    whole or not at all.

    A server that is away for timeout seconds, or has generated nothing and fails two jobs, gets no
    more. A job goes to another server where one is away or rejects it, and where one fails it that
    has generated nothing. Raises ValueError, once nothing more can be done, where images are
    missing."""
    # Each with the servers that have failed it.
    todo: list[tuple[Job, set[Server]]] = [(job, set()) for job in jobs]
    busy: set[Server] = set()
    picking = Lock()  # held while a job goes from `todo` to a busy server

    done: list[Job] = []
    reasons: list[str] = []
    states: dict[str, str] = {}
    stop = Event()

    def work(server: Server) -> None:
        def say(text: str) -> None:
            text = printable(text).replace("\n", " ")
            states[server.url] = (
                text if len(servers) == 1 else f"{urlsplit(server.url).netloc} {text}"
            )
            bar.set_postfix_str(", ".join(states.values()))

        has_generated, fails = False, 0
        while not stop.is_set() and fails < PATIENCE:
            with picking:
                place = next(
                    (place for place, (_, without) in enumerate(todo) if server not in without),
                    None,
                )
                if place is not None:
                    job, without = todo.pop(place)
                    busy.add(server)
                elif not busy:
                    return
            if place is None:
                stop.wait(Server.poll)  # another server may give its job back
                continue
            try:
                if images := server.generate(job, stop, timeout, say):
                    write(images, job)
                    has_generated = True
                    done.append(job)
                    bar.update()
            except Away as error:
                reasons.append(f"{job.output.name}: {error}")
                todo.append((job, without))
                break
            except ValueError as error:
                reasons.append(f"{job.output.name}: {error}")
                if isinstance(error, Rejected) or not has_generated:
                    todo.append((job, without | {server}))
                fails += not has_generated
            finally:
                with picking:
                    busy.discard(server)
        say("left")

    with (
        tqdm(total=len(jobs), unit="image", disable=not progress) as bar,
        ThreadPoolExecutor(len(servers)) as threads,
        ExitStack() as at_end,
    ):
        at_end.callback(stop.set)
        running = {threads.submit(work, server) for server in servers}
        while running:  # by bits, as Windows takes no Ctrl-C inside a long wait
            ended, running = wait(running, 0.2, FIRST_EXCEPTION)
            for thread in ended:
                thread.result()
    if len(done) < len(jobs):
        raise ValueError(
            f"{len(done)} of {len(jobs)} images were generated. The same command resumes with the"
            " rest. What went wrong:\n  " + "\n  ".join(dict.fromkeys(reasons))
        )


def write(images: list[bytes], job: Job) -> None:
    """Write the job's images, the second as NAME_2.png, and the first last: where it is, all
    are."""
    job.output.parent.mkdir(parents=True, exist_ok=True)
    settings = (
        b"iTXt" + PNG_KEY.encode() + bytes(5) + json.dumps(job.record).encode()
    )  # neither compressed nor translated
    chunk = (
        (len(settings) - 4).to_bytes(4, "big") + settings + zlib.crc32(settings).to_bytes(4, "big")
    )
    for number, image in reversed(list(enumerate(images, 1))):
        output = job.output if number == 1 else job.output.with_stem(f"{job.output.stem}_{number}")
        with atomic_write(output) as stream:
            stream.write(image[:33] + chunk + image[33:])  # behind the header, which is 33 bytes
