"""A ComfyUI workflow in API form, {node id: {class_type, inputs}}, and where in it a prompt, a seed
or a size goes."""

import json
import math
from pathlib import Path

from ..settings import FIELDS, checked, checked_text, graph_inputs
from ..tables import read_text

TEXTS = graph_inputs("prompt")
PLACES = {  # what a flag or a column is called → the inputs that it fills, INPUT or CLASS.INPUT
    **{name: inputs for name in FIELDS if (inputs := graph_inputs(name))},
    "model": ("checkpoint", "ckpt_name", "unet_name"),
    "text_encoder": ("text_encoder", "clip_name"),
}


def read_workflow(file: Path) -> dict:
    """The graph {node id: {class_type, inputs}}. Raises ValueError where the file holds something
    else."""
    try:
        graph = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from None
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise ValueError(
            f"{file.name} is a workflow for ComfyUI's canvas; expected one in API format. Use"
            " the file of that name in workflows/api/, or in ComfyUI: Workflow > Export (API)"
        )
    if (
        not isinstance(graph, dict)
        or not graph
        or not all(
            isinstance(node, dict)
            and isinstance(node.get("inputs"), dict)
            and isinstance(node.get("class_type"), str)
            and isinstance(node.get("_meta", {}), dict)
            for node in graph.values()
        )
    ):
        raise ValueError(
            f"{file.name} is not a workflow in API format, {{id: {{class_type, inputs}}}}. In"
            " ComfyUI, export it by Workflow > Export (API)"
        )
    return graph


def fill(filled: dict, graph: dict, name: str, value: object) -> None:
    """Write the value into the places of `filled` that its name stands for in `graph`: one, or
    several that say the same there, such as a latent's width and a sampler's. Raises ValueError
    where there is none, or which one is not clear."""
    found = places(graph, name)
    if len({json.dumps(graph[node]["inputs"][key]) for node, key in found}) != 1:
        inputs = found or [
            (node, key)
            for node in graph
            for key, old in graph[node]["inputs"].items()
            if not is_link(old)
        ]
        listed = ", ".join(f"{node}.{key} ({title(graph, node)})" for node, key in inputs)
        raise ValueError(
            f"{name} could go to several inputs: {listed}. Say which: --set NODE.INPUT=VALUE"
            if found
            else (
                f"the workflow has no input for {name}. It has: {listed}. Inputs that are linked to"
                " another node are not filled"
            )
        )
    for node, key in found:
        old = graph[node]["inputs"][key]
        if name in FIELDS:
            value = checked(name, value)
        filled[node]["inputs"][key] = like(old, value, f"{name} ({node}.{key})")
        if (
            key in ("width", "height")
            and graph[node]["class_type"] == "EmptyL2PLatentImage"
            and "size" in graph[node]["inputs"]
        ):
            filled[node]["inputs"]["size"] = "custom"  # else a usual size takes their place


def places(graph: dict, name: str) -> list[tuple[str, str]]:
    """(node, input) of all literal inputs that a name of `PLACES` stands for, or INPUT, or
    NODE.INPUT with the node's id, title or class."""

    def literal(*names: str) -> list[tuple[str, str]]:
        return [
            (node, key)
            for node, settings in graph.items()
            for key, value in settings["inputs"].items()
            if not is_link(value)
            and not is_replaced(settings, key)
            and {
                key,
                f"{node}.{key}",
                f"{settings['class_type']}.{key}",
                f"{title(graph, node)}.{key}",
            }
            & set(names)
        ]

    if name in (
        "prompt",
        "negative_prompt",
    ):  # the same input on two nodes, told apart by where they are wired to
        positive, negative = (
            upstream(graph, "positive", "negative"),
            upstream(graph, "negative", "positive"),
        )
        texts = literal(*TEXTS)
        if name == "prompt":
            return [place for place in texts if place[0] in positive] or [
                place for place in texts if place[0] not in negative
            ]
        return literal(*PLACES[name]) or [
            place for place in texts if place[0] in negative - positive
        ]
    return literal(*PLACES.get(name, [name]))


def upstream(graph: dict, side: str, other: str) -> set[str]:
    """Ids of the nodes that feed any input called `side`, but for what goes through one called
    `other`."""
    todo = [settings["inputs"][side] for settings in graph.values() if side in settings["inputs"]]
    found = set()
    while todo:
        link = todo.pop()
        if not is_link(link) or not link or not isinstance(link[0], str):
            continue
        node = link[0]
        if node in graph and node not in found:
            found.add(node)
            todo += [value for key, value in graph[node]["inputs"].items() if key != other]
    return found


def is_replaced(settings: dict, key: str) -> bool:
    """Whether an input has no effect, because L2P Stages is connected to its node."""
    return "stage_options" in settings["inputs"] and key in ("stages", "stage_denoise", "redraw")


def is_link(value: object) -> bool:
    """Whether an input is wired to another node."""
    return isinstance(value, list)


def title(graph: dict, node: str) -> str:
    """A node's title, or its class."""
    return str(graph[node].get("_meta", {}).get("title") or graph[node]["class_type"])


def like(old: object, value: object, name: str) -> object:
    """Return the value in the type that the input has; ComfyUI saves 2.0 as 2, so a whole number
    may stand for a fraction.

    Raises ValueError where it is no such thing."""
    if isinstance(old, str):
        return checked_text(name, value)
    try:
        new = json.loads(str(value).lower() if isinstance(old, bool) else str(value))
        number = isinstance(new, (int, float)) and math.isfinite(new)
        if not number or isinstance(new, bool) != isinstance(old, bool):
            raise ValueError
        return new
    except ValueError:
        kind = "true or false" if isinstance(old, bool) else "a number"
        raise ValueError(f"{name} is {value!r}; expected {kind}") from None
