"""Many prompts → image files, by the actors of a Ray cluster: `l2p generate --ray`."""

from contextlib import closing
from dataclasses import dataclass, replace

from PIL import Image
from tqdm import tqdm

from ..batch import (
    Job,
    Records,
    batches,
    check_batch,
    generate_batch,
    input_images,
    largest_of,
    lock_outputs,
    missing_jobs,
)
from ..options import PipelineOptions
from ..pipeline import L2PPipeline
from .connect import connected
from .files import keep, write_or_pack
from .pool import Pool
from .slots import Slot, find_slot, loaded_bytes


@dataclass(frozen=True)
class Made:
    """What an actor tells of an image. png: the file, where it did not write it itself."""

    record: dict
    png: bytes | None


class ImageWorker:
    """An actor that generates images.

    collect: send files back, in place of writing them."""

    def __init__(self, options: PipelineOptions, slot: Slot, collect: bool):
        self._options, self._slot, self._collect = options, slot, collect

    def start(self) -> None:
        """Load the model."""
        self._pipe = self._options.load(self._slot.device())
        self._records = Records(self._pipe, self._options.batch)

    def run(
        self, group: list[Job], files: dict[str, Image.Image], hashes: dict[str, str]
    ) -> list[Made]:
        """Generate a batch. files, hashes: of its input images, which may not be on this
        machine."""
        pipe = self._pipe
        images = generate_batch(group, pipe, pipe.encode_prompt, files, lambda *_: None)
        return [self._make(job, image, hashes) for job, image in zip(group, images, strict=True)]

    def _make(self, job: Job, image: Image.Image, hashes: dict[str, str]) -> Made:
        record = self._records.of(job, hashes)
        return Made(record, write_or_pack(image, job.output, record, self._collect))


def generate(
    jobs: list[Job],
    pipe: L2PPipeline,
    options: PipelineOptions,
    address: str,
    device: str | None = None,
    collect: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Generate and write the images that do not exist yet, as `batch.generate` does, over a Ray
    cluster.

    pipe: the checkpoint, opened on the CPU; it generates nothing here. options: what each actor
    loads, the same checkpoint. address: see `connected`. device: "cpu" where GPUs are not to be
    used. collect: write all files here; otherwise each actor writes to the folder, which all
    machines share. Raises ValueError where that does not hold, too."""
    check_batch(options.batch)
    if not jobs:
        return
    jobs = [replace(job, output=job.output.absolute()) for job in jobs]
    with lock_outputs([job.output for job in jobs]), connected(address):
        slot = find_slot(device, loaded_bytes(pipe))
        if options.arguments["torch_dtype"] is None:
            pipe.dtype = slot.dtype(pipe)
        with closing(Records(pipe, options.batch)) as records:
            missing = missing_jobs(jobs, records, overwrite)
            if not missing:
                return
            options = replace(
                options.for_another_machine(pipe.dtype),
                threads=slot.threads,
                largest=largest_of(missing),
            )
            pool: Pool[list[Job]] = Pool(
                slot,
                ImageWorker,
                (options, slot, collect),
                lambda group: (group, input_images(group), records.input_hashes(group[0])),
            )
            with closing(pool), tqdm(total=len(missing), unit="image", disable=not progress) as bar:
                for group, made in pool.run(list(batches(missing, options.batch))):
                    for job, each in zip(group, made, strict=True):
                        check_record(each.record, records.of(job))
                        keep(job.output, each.png)
                        bar.update()


def check_record(found: dict, expected: dict) -> None:
    """Raise ValueError where an actor generated with other files than those of this machine."""
    for name in expected:
        if found.get(name) != expected[name]:
            raise ValueError(
                f"a machine of the cluster has another checkpoint than this one ({name}"
                f" {found.get(name)!r}, here {expected[name]!r}). Copy the same files to all of"
                " them"
            )
