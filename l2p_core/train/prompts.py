"""Prompts for training images: a category of a taxonomy, described by a language model or by
templates.

The paper's first data step (arXiv 2605.12013, appendix): four classes, 17 sub-classes and over
1,000 categories; prompts of 200 to 350 characters, filtered and deduplicated."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from ..devices import default_dtype
from ..files.atomic import WAIT, append, atomic_write, locked
from ..files.header import hash_files
from ..pipeline import usable_device
from ..tables import read_text
from ..text import TextEncoder, encoder_files, find_encoder
from .language_model import answer

TAXONOMY = Path(__file__).with_name("taxonomy.txt")
SHORTEST, LONGEST = 200, 350  # characters of a prompt
ATTEMPTS = 8  # at a prompt, before the language model's is replaced by a template's
SIMILAR = 0.5  # share of common word trigrams from which two prompts are the same

# What prompts vary beside the category: hints for a language model, sentences of a template.
MEDIA = (
    *("A photograph",) * 6,
    "A close-up photograph",
    "A black-and-white photograph",
    "A photograph on colour film",
    "A wide photograph",
    "An oil painting",
    "A watercolour",
    "A pencil drawing",
    "A digital illustration",
    "A 3D render",
    "A print in flat colours",
)
VIEWS = (
    "seen from eye level",
    "seen from a low angle",
    "seen from above",
    "seen from the side",
    "seen from behind",
    "seen from far away",
    "filling the frame",
    "in the left third of the frame",
    "in the right third of the frame",
    "in the centre, with much empty space around",
    "framed by a doorway",
    "seen through a window",
    "reflected in still water",
    "in a strictly symmetric composition",
)
LIGHTS = (
    "Soft light from an overcast sky falls evenly on everything",
    "Low evening sun draws long shadows",
    "Early morning light comes in from the left",
    "Harsh noon light gives short, dark shadows",
    "A single lamp lights the scene from the right",
    "Light from behind outlines the edges",
    "Candlelight leaves the corners dark",
    "Moonlight makes the scene pale and blue",
    "Coloured neon light falls from both sides",
    "Light breaks through leaves in bright spots",
    "Fog scatters the light, and what is far away fades",
    "After the rain the light is clear, and surfaces gleam",
    "Firelight flickers over the nearest surfaces",
    "The light of a large window falls softly from one side",
)
COLOURS = (
    "The colours are muted greens and greys",
    "Warm browns and ochres prevail",
    "Deep blue stands against bright orange",
    "The palette is pale, almost white",
    "Strong reds catch the eye against dull surroundings",
    "Yellow and violet meet at the edges",
    "Everything is in shades of one blue",
    "The colours are saturated and cheerful",
    "Black, white and one accent of red make up the image",
    "Pastel pink and mint set a gentle tone",
    "Rusty reds and cold greys alternate",
    "Turquoise and sand colours lie side by side",
    "The colours are faded, as on old paper",
    "Dark tones dominate, with a few bright highlights",
)
PLACES = (
    "The background is plain and out of focus",
    "In the background there is a row of old houses",
    "A wide landscape opens behind it",
    "The ground is covered with fallen leaves",
    "A wooden table stands in the foreground",
    "A brick wall closes off the background",
    "Far off there are mountains under a few clouds",
    "The ground is wet, and small puddles mirror the sky",
    "Tall grass stands in the foreground, slightly blurred",
    "A patterned carpet covers the floor",
    "Dust hangs in the air",
    "A few people pass by at a distance",
    "The sea lies behind it, quite calm",
    "A curtain hangs at one side, half drawn",
    "Snow lies on everything that is level",
    "Old posters peel off a wall behind it",
)
DETAILS = (
    "Fine texture shows on every surface",
    "Scratches and worn edges tell of long use",
    "Small drops of water cling to the surfaces",
    "The outlines are crisp, the shadows soft",
    "Thin lines of light mark the contours",
    "Two small objects lie beside it, half hidden",
    "Visible brush marks and grain run through the image",
    "The materials are easy to tell apart: wood, metal, cloth and glass",
    "A slight motion blur gives a sense of speed",
    "Everything is quiet, nothing moves",
    "A little handwritten sign stands at the edge",
    "The nearest parts are sharp, the rest is blurred",
    "Threads, hairs and fibres can be counted",
    "Cracks run through the ground in front",
)

INSTRUCTION = """Write a prompt for an image generator.
Subject: {category} ({subclass}).
Where it suits the subject: {medium}, {view}; {light}; {colour}.
Describe the subject and its details, its surroundings, the light and the colours. Be concrete: name
what can be seen, and nothing else. Write one paragraph of plain English in 40 to 55 words. Answer
with the paragraph alone."""

# What a language model says in place of a description, or about it.
NO_DESCRIPTION = re.compile(
    r"\b(?:as an ai|i(?:'m| am) (?:sorry|unable)|i can(?:'|no)t|here(?:'s| is) (?:a|the|your)"
    r"|prompt|paragraph|characters|image generator|let me|sure)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Category:
    """What a prompt is about."""

    name: str
    subclass: str
    main_class: str


@dataclass(frozen=True)
class Task:
    """One attempt at a prompt: its category, and the number that its draws follow from."""

    category: Category
    seed: int

    def instruction(self) -> str:
        """Return what a language model is asked."""
        rng = random.Random(self.seed)
        medium, view, light, colour = (rng.choice(each) for each in (MEDIA, VIEWS, LIGHTS, COLOURS))
        return INSTRUCTION.format(
            category=self.category.name,
            subclass=self.category.subclass,
            medium=medium.lower(),
            view=view,
            light=light.lower(),
            colour=colour.lower(),
        ).replace("\n", " ")

    def template(self) -> str:
        """Return a description made of sentences that suit any subject."""
        rng = random.Random(self.seed)
        text = f"{rng.choice(MEDIA)} of {self.category.name}, {rng.choice(VIEWS)}."
        sentences = [rng.choice(each) for each in (LIGHTS, COLOURS, PLACES, DETAILS)]
        rng.shuffle(sentences)
        for sentence in sentences:
            if len(text) < SHORTEST:
                text += f" {sentence}."
        return text


Writer = Callable[[Sequence[Task]], list[str]]


def by_templates(tasks: Sequence[Task]) -> list[str]:
    """Return a template's prompt for each task: the writer without a language model."""
    return [task.template() for task in tasks]


def read_taxonomy(file: Path = TAXONOMY) -> list[Category]:
    """Return the categories of a text file, each once.

    `# class` and `## sub-class` are headings, categories are separated by semicolons or lines.
    Raises ValueError."""
    main_class = subclass = ""
    found: dict[str, Category] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if line.startswith("##"):
            subclass = line.lstrip("#").strip()
        elif line.startswith("#"):
            main_class, subclass = line.lstrip("#").strip(), ""
        elif line.strip() and not subclass:
            raise ValueError(
                f"{file.name}, line {number}: categories stand under no sub-class; expected a line"
                " such as '## birds' before them"
            )
        else:
            for name in filter(None, (" ".join(each.split()) for each in line.split(";"))):
                found.setdefault(name.lower(), Category(name, subclass, main_class))
    if not found:
        raise ValueError(
            f"{file.name} holds no categories; expected headings '# class' and '## sub-class', and"
            " categories separated by semicolons"
        )
    return list(found.values())


def in_turn(categories: list[Category], seed: int, number: int) -> Category:
    """Return the category of prompt `number`: all of them in random order, then all again."""
    turn, place = divmod(number, len(categories))
    return categories[order_of_turn(len(categories), seed, turn)[place]]


@lru_cache(maxsize=4)
def order_of_turn(count: int, seed: int, turn: int) -> list[int]:
    """Return the numbers below `count` in the random order of a turn."""
    order = list(range(count))
    random.Random(f"{seed} order {turn}").shuffle(order)
    return order


def tidy(answer: str) -> str:
    """Return a language model's answer as one line, without quotes around it."""
    text = " ".join(answer.split())
    return text[1:-1].strip() if len(text) > 1 and text[0] in "\"'“" else text


def fault_of(prompt: str) -> str | None:
    """Return why a prompt is rejected; None where it is one."""
    if not SHORTEST <= len(prompt) <= LONGEST:
        return f"{len(prompt)} characters, expected {SHORTEST} to {LONGEST}"
    if prompt[-1] not in ".!":
        return "it does not end with a sentence"
    if not prompt.isprintable() or any(
        letter.isalpha() and ord(letter) > 0x24F for letter in prompt
    ):
        return "it is not in Latin letters"
    if found := NO_DESCRIPTION.search(prompt):
        return f"it says {found[0]!r}"
    words = prompt.lower().split()
    if 2 * len(set(words)) < len(words):
        return "it repeats itself"
    return None


def trigrams(prompt: str) -> set[tuple[str, ...]]:
    """Return the sequences of three words in a prompt."""
    words = re.findall(r"\w+", prompt.lower())
    return set(zip(words, words[1:], words[2:]))


def similar(one: str, other: str) -> bool:
    """Return whether two prompts have at least half of their word trigrams in common (Jaccard)."""
    first, second = trigrams(one), trigrams(other)
    return len(first & second) >= SIMILAR * max(len(first | second), 1)


class Prompts:
    """The prompts so far, by category."""

    def __init__(self, categories: list[Category], seed: int, texts: Sequence[str] = ()):
        self.categories, self.seed = categories, seed
        self.texts: list[str] = []
        self.known: set[str] = set()
        self.by_category: dict[Category, list[str]] = {}
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Take the next prompt."""
        category = in_turn(self.categories, self.seed, len(self.texts))
        self.by_category.setdefault(category, []).append(text)
        self.known.add(text.lower())
        self.texts.append(text)

    def is_new(self, category: Category, text: str) -> bool:
        """Return whether no prompt of the category is similar, and none is the same."""
        others = self.by_category.get(category, ())
        return text.lower() not in self.known and not any(similar(text, each) for each in others)

    def task(self, number: int, attempt: int) -> Task:
        """Return what is asked for at one attempt at prompt `number`."""
        digest = hashlib.sha256(f"{self.seed} {number} {attempt}".encode()).digest()
        category = in_turn(self.categories, self.seed, number)
        return Task(category, int.from_bytes(digest[:7], "big"))

    def template(self, number: int) -> str:
        """Return a new prompt by template. Raises ValueError where there is none."""
        for attempt in range(ATTEMPTS * 4):
            task = self.task(number, -1 - attempt)
            text = task.template()
            if fault_of(text) is None and self.is_new(task.category, text):
                return text
        raise ValueError(
            f"the templates make no further prompt about {task.category.name}:"
            f" {len(self.texts)} are written. Ask for fewer, or use a language model or a taxonomy"
            " with more categories"
        )

    def next(self, count: int, writer: Writer) -> tuple[list[str], int]:
        """Add the next prompts, at most `count`, and return them and how many are templates'.

        They never go beyond the last category of a turn, so none of them is compared with another:
        the same prompts come out for any `count`."""
        first = len(self.texts)
        last = min(first + count, (first // len(self.categories) + 1) * len(self.categories))
        found: dict[int, str] = {}
        for attempt in range(ATTEMPTS):
            missing = [number for number in range(first, last) if number not in found]
            if not missing:
                break
            tasks = [self.task(number, attempt) for number in missing]
            for number, task, given in zip(missing, tasks, writer(tasks), strict=True):
                text = tidy(given)
                if fault_of(text) is None and self.is_new(task.category, text):
                    found[number] = text
        replaced = 0
        for number in range(first, last):
            text = found.get(number, "")
            if not text or text.lower() in self.known:
                text = self.template(number)
                replaced += 1
            self.add(text)
        return self.texts[first:], replaced


@dataclass(frozen=True)
class WritingModel:
    """The language model that writes, not loaded yet."""

    encoder: str | Path
    tokenizer: str | Path | None = None
    device: str = "cpu"

    def digest(self) -> str:
        """Return the SHA-256 of its weights."""
        return hash_files(encoder_files(find_encoder(self.encoder)))

    def load(self) -> Writer:
        """Return what writes prompts by it. Raises CheckpointError."""
        device = usable_device(self.device)
        encoder = TextEncoder.load(self.encoder, self.tokenizer, device, default_dtype(device))

        def write(tasks: Sequence[Task]) -> list[str]:
            instructions = [task.instruction() for task in tasks]
            return answer(encoder, instructions, [task.seed for task in tasks])

        return write


def write_prompts(
    file: Path,
    count: int,
    seed: int = 0,
    taxonomy: Path = TAXONOMY,
    model: WritingModel | None = None,
    batch: int = 16,
    progress: bool = True,
) -> int:
    """Write `count` prompts, one a line, or add those that are missing. Returns how many of the new
    ones are templates' because the model gave none that passed.

    model: None for templates. batch: prompts that it writes at once. FILE.json records what the
    prompts follow from. Raises ValueError where the file is of other settings, CheckpointError for
    the model, AlreadyRunning where another run still writes the file."""
    if file.suffix != ".txt":
        raise ValueError(f"{file.name} ends in {file.suffix or 'nothing'}; expected .txt")
    categories = read_taxonomy(taxonomy)
    record = {
        "seed": seed,
        "taxonomy": hashlib.sha256(repr(categories).encode()).hexdigest(),
        "language model": model.digest() if model else None,
    }
    busy = f"another run is writing {file}. Wait for it to finish, or give another file"
    with locked(file, busy, WAIT):
        prompts = Prompts(categories, seed, written_before(file, record))
        if len(prompts.texts) >= count:
            return 0
        writer = model.load() if model else by_templates
        replaced = 0
        with tqdm(
            total=count, initial=len(prompts.texts), unit="prompt", disable=not progress
        ) as bar:
            while len(prompts.texts) < count:
                texts, others = prompts.next(min(batch, count - len(prompts.texts)), writer)
                with append(file) as stream:
                    stream.write("".join(f"{text}\n" for text in texts).encode())
                replaced += others
                bar.update(len(texts))
    return replaced


def written_before(file: Path, record: dict[str, object]) -> list[str]:
    """Return the prompts of an interrupted run, and make the file ready for more.

    A line that a killed run left unfinished is removed. Raises ValueError where something else is
    there."""
    about = file.with_name(f"{file.name}.json")
    if not file.exists():
        with atomic_write(about) as stream:
            stream.write(json.dumps(record, indent=1).encode())
        return []
    try:
        before = json.loads(read_text(about))
    except ValueError:
        raise ValueError(
            f"{file} exists, and {about.name} beside it does not say how it was written; give"
            " another file"
        ) from None
    for name, value in record.items():
        if not isinstance(before, dict) or before.get(name) != value:
            raise ValueError(
                f"{file} was written with another {name}; give what it was written with, or another"
                " file"
            )
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with atomic_write(file) as stream:
            stream.write(whole)
    return whole.decode().splitlines()
