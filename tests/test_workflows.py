"""The shipped workflows: whole on paper, run by a real ComfyUI with the small model, and opened in
its page."""

import copy
import io
import json
import re
from pathlib import Path
from urllib.parse import quote

import comfyui_browser
import pytest
from comfyui_l2p.l2p_core.remote.workflow import fill
from comfyui_l2p.l2p_core.train.dataset import read_examples
from PIL import Image
from workflow_variants import (
    BUNDLED,
    DOWNLOADS,
    INPUT_IMAGE,
    NAMES,
    TITLES,
    WORKFLOWS,
    api,
    canvas,
    input_image,
    notes,
    small,
    write_models,
)

ROOT = WORKFLOWS.parent
THUMBNAIL_BYTES = 60_000
CANVAS_ONLY = {"MarkdownNote"}
CHINESE = re.compile("[一-鿿]")
OLD = Path(__file__).with_name("old_workflows")  # as they were before L2P Stages
MODEL_FILE = re.compile(r"[\w.-]+\.(safetensors|png)")
FRONTEND_VALUES = {
    "fixed",
    "increment",
    "decrement",
    "randomize",
}  # of the widget below a seed, which the server doesn't know


def links_of(graph: dict) -> dict[tuple[str, str], tuple[str, int]]:
    """(node, input) → (node, output) of a canvas form. Both ends of every link are looked at."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    found = {}
    for link, source, output, target, place, _ in graph["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][place]["link"] == link
        found[str(target), nodes[target]["inputs"][place]["name"]] = str(source), output
    ends = [
        slot["link"]
        for node in graph["nodes"]
        for slot in node["inputs"]
        if slot["link"] is not None
    ]
    assert sorted(ends) == sorted(link[0] for link in graph["links"])
    return found


def test_the_docs_list_every_workflow_and_each_has_both_forms_and_a_note():
    """ComfyUI lists all files of workflows/ as templates, by their names, so these are in order."""
    table = (ROOT / "docs" / "comfyui.md").read_text().split("## Workflows")[1].split("##")[0]
    listed = re.findall(r"^\| (.+?) \| `(\w+)` \|", table, re.MULTILINE)
    assert [(title, name) for name, title in TITLES.items()] == listed == sorted(listed)
    assert len(listed) >= 12
    assert {path.stem for path in (WORKFLOWS / "api").glob("*.json")} == set(TITLES)
    for ending in ("json", "jpg"):
        assert {path.stem for path in WORKFLOWS.glob(f"*.{ending}")} == set(TITLES.values())
    headings = re.findall(r"^## (.+)$", (WORKFLOWS / "README.md").read_text(), re.MULTILINE)
    assert headings == list(TITLES.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_canvas_form_is_the_api_form(name):
    """If this fails after a change of workflows/api or workflows/README.md: python .ci/workflows.py
    canvas"""
    graph, page = api(name), canvas(name)
    nodes = {str(node["id"]): node for node in page["nodes"] if node["type"] not in CANVAS_ONLY}
    assert {key: node["type"] for key, node in nodes.items()} == {
        key: node["class_type"] for key, node in graph.items()
    }
    expected = {
        (key, name): tuple(value)
        for key, node in graph.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }
    assert links_of(page) == expected
    for key, node in graph.items():
        values = [value for value in node["inputs"].values() if not isinstance(value, list)]
        missing = [value for value in values if value not in nodes[key]["widgets_values"]]
        assert not missing, (node["class_type"], missing)
        texts = {value for value in nodes[key].get("widgets_values", []) if " " in str(value)}
        assert texts <= set(values)  # a prompt of another graph
    shown = [node for node in page["nodes"] if node["type"] in CANVAS_ONLY]
    assert [node["widgets_values"][0] for node in shown] == notes()[name]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_page_does_not_translate_is_in_both_languages(name):
    """Titles of groups, titles that nodes have of their own, and notes. ComfyUI translates a
    node's title only where the workflow gives none."""
    english, chinese = notes()[name]
    assert not CHINESE.search(english) and CHINESE.search(chinese)
    files = [re.findall(r"`[\w.-]+\.safetensors`", text) for text in (english, chinese)]
    assert files[0] == files[1]
    page = canvas(name)
    titles = [each["title"] for each in (*page["groups"], *page["nodes"]) if "title" in each]
    assert len(page["groups"]) >= 3
    assert [title for title in titles if not CHINESE.search(title)] == ["About"]


@pytest.mark.parametrize("name", NAMES)
def test_nodes_are_equally_wide(name):
    assert len({node["size"][0] for node in canvas(name)["nodes"]}) == 1


def test_the_demo_gives_the_same_image_again():
    (sampler,) = (node for node in canvas("demo")["nodes"] if node["type"] == "L2PKSampler")
    assert "fixed" in sampler["widgets_values"]


@pytest.mark.parametrize("name, node", [("text_to_image", "4"), ("upscale_to_4k", "4")])
def test_the_queue_sets_stages_in_either_node(name, node):
    """In L2P Stages where it is connected, whatever older inputs L2P KSampler has beside it."""
    graph = api(name)
    (sampler,) = (each for each in graph.values() if each["class_type"] == "L2PKSampler")
    sampler["inputs"].setdefault("stages", 1)  # as ComfyUI exports it
    filled = copy.deepcopy(graph)
    fill(filled, graph, "stages", 5)
    changed = {key for key in graph if filled[key] != graph[key]}
    assert changed == {node} and filled[node]["inputs"]["stages"] == 5


@pytest.mark.parametrize("name", NAMES)
def test_nodes_do_not_overlap(name):
    boxes = [
        (
            node["pos"][0],
            node["pos"][1] - 30,
            node["pos"][0] + node["size"][0],
            node["pos"][1] + node["size"][1],
        )
        for node in canvas(name)["nodes"]
    ]
    for index, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:index]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top, (
                boxes[index],
                other,
            )


@pytest.mark.parametrize("name", NAMES)
def test_files_are_named_without_folders(name):
    for form in (WORKFLOWS / f"{TITLES[name]}.json", WORKFLOWS / "api" / f"{name}.json"):
        assert not re.search(r'"(/|[A-Za-z]:\\|~)|/home/|/root/|/tmp/', form.read_text())
    for node in api(name).values():
        for value in node["inputs"].values():
            if isinstance(value, str) and value.endswith((".safetensors", ".png")):
                assert MODEL_FILE.fullmatch(value)
                assert value == "example.png" or value in notes()[name][0]


@pytest.mark.parametrize("name", NAMES)
def test_every_loader_says_where_its_files_are_downloaded(name):
    """ComfyUI's page offers a Download button for what `properties.models` lists. A LoRA is the
    user's own."""
    for node in canvas(name)["nodes"]:
        values = [value for value in node.get("widgets_values", ()) if isinstance(value, str)]
        files = [value for value in values if MODEL_FILE.fullmatch(value)]
        files = [value for value in files if value.endswith(".safetensors")]
        if node["type"] == "LoraLoaderModelOnly":
            continue
        listed = node["properties"].get("models", [])
        assert [each["name"] for each in listed] == files
        for each in listed:
            assert (each["url"], each["directory"]) == DOWNLOADS[each["name"]]
            assert each["url"].startswith("https://huggingface.co/")
            assert each["url"].endswith("/" + each["name"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_thumbnails(name):
    path = WORKFLOWS / f"{TITLES[name]}.jpg"
    assert path.stat().st_size <= THUMBNAIL_BYTES
    with Image.open(path) as image:
        assert image.format == "JPEG" and image.size == (512, 512)
        assert any(low < high - 50 for low, high in image.getextrema())


@pytest.fixture(scope="session")
def server(comfyui_server):
    """With the files that `workflow_variants.small` names."""
    write_models(comfyui_server.models)
    comfyui_server.upload(
        INPUT_IMAGE, input_image(Image.effect_mandelbrot((96, 96), (-2, -1, 1, 1), 50))
    )
    return comfyui_server


@pytest.fixture(scope="session")
def object_info(server):
    return server.get("/object_info")


def options(info: dict, name: str) -> list | None:
    """What a combo offers, or None where the input is none."""
    for inputs in info["input"].values():
        if name in inputs:
            kind, *more = inputs[name]
            return (
                kind if isinstance(kind, list) else more[0]["options"] if kind == "COMBO" else None
            )
    raise AssertionError(f"{info['name']} has no input {name}")


@pytest.mark.parametrize("name", NAMES)
def test_every_node_and_choice_is_known_to_comfyui(object_info, name):
    for node in canvas(name)["nodes"]:
        if node["type"] in CANVAS_ONLY:
            continue
        info = object_info[node["type"]]
        widgets = [slot["name"] for slot in node["inputs"] if "widget" in slot]
        combos = {
            each: known
            for each in widgets
            if each != "upload" and (known := options(info, each)) is not None
        }
        offered = {choice for known in combos.values() for choice in known}
        inputs = api(name)[str(node["id"])]["inputs"]
        free = [value for each, value in inputs.items() if options(info, each) is None]
        for value in node["widgets_values"] if combos and "widgets_values" in node else ():
            if isinstance(value, str) and value not in FRONTEND_VALUES and value != "image":
                assert value in offered or MODEL_FILE.fullmatch(value) or value in free, (
                    node["type"],
                    value,
                )
    for key, node in api(name).items():
        info = object_info[node["class_type"]]
        known = {each for inputs in info["input"].values() for each in inputs}
        required = set(info["input"].get("required", {}))
        assert required <= set(node["inputs"]) <= known, (key, node["class_type"])


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_runs_with_the_small_model(server, name):
    two = "a red circle on a blue background\na green star on a white background"
    listed = name in ("batch_of_prompts", "train_lora", "training_images")
    files = server.run(small(name, prompt=two if listed else "a red circle"))
    images = [Image.open(io.BytesIO(file)) for file in files]
    sides = {"demo": 384, "upscale_to_4k": 384, "small_cards": 192, "4k_checkpoint": 128}
    side = sides.get(name, 96)
    assert len(images) == (2 if listed else 1)  # of training: the samples and the curve, and one
    assert images[-1].size == (side, side)
    assert any(low < high for low, high in images[-1].convert("RGB").getextrema())


def pixels(server, graph: dict) -> bytes:
    """The image that a graph saves, without the graph that ComfyUI writes into its file."""
    (file,) = server.run(graph)
    return Image.open(io.BytesIO(file)).tobytes()


def test_stages_of_an_older_workflow_give_the_same_image(server):
    """When L2P KSampler had the inputs that L2P Stages has now, and other words for redraw."""
    old = json.loads((OLD / "api" / "upscale_to_4k.json").read_text())
    assert old["4"]["inputs"]["redraw"] == "squeezed"
    assert pixels(server, small(old)) == pixels(server, small("upscale_to_4k"))


def test_training_reads_the_images_that_a_workflow_made(server):
    prompts = "a red circle\n\na green star on a white background"
    server.run(small("training_images", prompt=prompts))
    folder = server.base / "output" / "l2p_dataset"
    examples = read_examples(folder, None, 96**2, 16)
    captions = {example.file.name: example.captions for example in examples}
    assert captions == {
        "image_00000.png": ("a red circle",),
        "image_00001.png": ("a green star on a white background",),
    }
    info = server.get("/object_info/L2PTrainLoRA")["L2PTrainLoRA"]
    assert "l2p_dataset [output]" in options(info, "dataset")


def test_inpainting_keeps_what_is_not_masked(server):
    (file,) = server.run(small("inpaint"))
    before = Image.open(
        io.BytesIO(server.get("/view", filename=INPUT_IMAGE, type="input"))
    ).convert("RGB")
    kept = (0, 0, 46, 96)  # the mask begins at 48; it is resized, and so may be soft at its edge
    assert (
        Image.open(io.BytesIO(file)).convert("RGB").crop(kept).tobytes()
        == before.crop(kept).tobytes()
    )


def test_the_lora_changes_the_image(server):
    assert pixels(server, small("lora")) != pixels(server, small("text_to_image"))


def test_templates_are_listed_with_images(server):
    ((pack, names),) = server.get("/workflow_templates").items()
    assert sorted(names) == list(TITLES.values())
    for name in map(quote, names):
        assert server.get(f"/api/workflow_templates/{pack}/{name}.json")["nodes"]
        assert server.get(f"/api/workflow_templates/{pack}/{name}.jpg")[:2] == b"\xff\xd8"


@pytest.fixture(scope="module")
def browser(server):
    """A `comfyui_browser.Browser`; tests that ask for it are skipped where there is none."""
    found = comfyui_browser.find()
    if isinstance(found, str):
        pytest.skip(found)
    browser = comfyui_browser.Browser(*found, server.url)
    yield browser
    browser.close()


# The graph on the page: how many nodes, those of unknown type, and links without an end.
ON_PAGE = """() => {
  const nodes = app.graph.nodes, ids = new Set(nodes.map(node => String(node.id)))
  return {nodes: nodes.length,
          missing: nodes.map(node => node.type)
            .filter(type => !LiteGraph.registered_node_types[type]),
          links: [...app.graph.links.values()].length,
          broken: [...app.graph.links.values()].filter(
            link => !ids.has(String(link.origin_id)) || !ids.has(String(link.target_id))).length}
}"""


VISIBLE = """() => app.graph.nodes.find(node => node.type === 'L2PKSampler')
  .widgets.filter(widget => !widget.hidden).map(widget => widget.name)"""


@pytest.mark.parametrize("name", NAMES)
def test_opens_in_the_page(browser, name):
    graph = canvas(name)
    browser.open(graph, name)
    assert browser.call(ON_PAGE) == {
        "nodes": len(graph["nodes"]),
        "missing": [],
        "links": len(graph["links"]),
        "broken": 0,
    }
    again = browser.call("async () => (await app.graphToPrompt()).output")
    expected = {key: (node["class_type"], node["inputs"]) for key, node in api(name).items()}
    assert {
        key: (node["class_type"], {each: node["inputs"].get(each) for each in expected[key][1]})
        for key, node in again.items()
    } == expected
    assert not browser.errors


def test_an_older_workflow_opens_as_it_was(browser):
    """Values of widgets are stored by their place, so those of stages remain, unseen."""
    browser.open(json.loads((OLD / "upscale_to_4k.json").read_text()), "old")
    old = json.loads((OLD / "api" / "upscale_to_4k.json").read_text())
    found = browser.call("async () => (await app.graphToPrompt()).output")
    newer = {key: node["inputs"].pop("latent_model", None) for key, node in found.items()}
    assert set(newer.values()) == {None, "Z-Image"}
    assert {key: node["inputs"] for key, node in found.items()} == {
        key: node["inputs"] for key, node in old.items()
    }
    assert browser.call(VISIBLE) == [
        *("width", "height", "batch_size", "seed", "control_after_generate", "steps", "cfg"),
        *("sampler_name", "scheduler", "shift", "denoise"),
    ]


def test_the_demo_runs_from_the_template_browser(browser):
    browser.clear()
    browser.open_template("ComfyUI-L2P", TITLES["demo"])
    assert (
        browser.call("() => app.graph.nodes.filter(node => node.has_errors).map(node => node.type)")
        == []
    )
    assert (
        browser.call(
            "() => app.graph.nodes.find(node => node.type ==="
            " 'L2PCheckpointLoader').widgets[0].value"
        )
        == BUNDLED
    )
    browser.run()
    assert browser.call(
        f"() => {{ const image = {comfyui_browser.SAVED}; return [image.naturalWidth,"
        " image.naturalHeight] }"
    ) == [384, 384]
    assert not browser.errors
