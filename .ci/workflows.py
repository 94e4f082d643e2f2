"""Rebuilds what is made from workflows/api: canvas forms, thumbnails, and the screenshots in docs/.

    python .ci/workflows.py canvas        # after a change of a graph, a note (workflows/README.md) or a node's schema
    python .ci/workflows.py thumbnails    # after a change of the bundled model
    python .ci/workflows.py screenshots   # after either
    python .ci/workflows.py all

Names after the word limit it to those workflows. Runs the pack in a ComfyUI of its own
(tests/real_comfyui.py says where it is looked for) and, but for thumbnails, in a browser: pip
install -e ".[test,browser]", and chromium on PATH. Screenshots need a Chinese font, such as that of the package fonts-wqy-microhei."""

import io
import json
import re
import signal
import sys
import tempfile
import uuid
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import comfyui_browser  # noqa: E402
import real_comfyui  # noqa: E402
from workflow_variants import (
    BUNDLED,
    INPUT_IMAGE,
    NAMES,
    TITLES,
    WORKFLOWS,
    add_downloads,
    api,
    canvas,
    input_image,
    notes,
    small,
    write_models,
)  # noqa: E402

SIDE = 512
SHAPES = [
    "a large red circle on a blue background, center",
    "a large yellow diamond on a purple background, center",
    "a large green triangle on a white background, center",
    "a large orange square on a black background, center",
]
START = "a small red circle on a blue background, left"  # what is edited: it leaves half empty
PROMPTS = {
    "text_to_image": SHAPES[1],
    "int8": SHAPES[2],
    "4k_checkpoint": SHAPES[3],
    "lora": "a large purple square on a yellow background, center",
    "upscale_to_4k": "a large white diamond on a blue background, center",
    "small_cards": "a large blue diamond on a white background, center",
    "latent_draft": "a large orange circle on a purple background, center",
    "core_nodes": "a large yellow triangle on a blue background, center",
    "image_to_image": "a small yellow circle on a green background, left",
    "inpaint": "a small yellow diamond on a blue background, right",
}

# Whose seeds stay: the demo, and images that a run is trained on.
FIXED = ("demo", "train_lora")

# Opens an API form as ComfyUI itself does, then puts each of its groups into a column of its own,
# the notes under the first. All nodes are equally wide, and as high as what they show, previews
# included.
ARRANGE = """async (graph, notes, fixed) => {
  await app.loadApiJson(graph, 'workflow')
  const width = 340, top = 90, gap = 60
  const height = {L2PKSampler: 640, L2PTrainLoRA: 1060, L2PTextEncode: 260, CLIPTextEncode: 160, L2PPromptList: 180, LoadImage: 340, SaveImage: 400}
  const groups = {}
  for (const [id, node] of Object.entries(graph)) (groups[node._meta.group] ??= []).push(app.graph.getNodeById(+id))
  const texts = notes.map(([title, note, lines]) => {
    const text = LiteGraph.createNode('MarkdownNote')
    app.graph.add(text)
    text.title = title
    text.widgets[0].value = note
    text.lines = lines
    return text
  })
  for (const node of app.graph.nodes)
    for (const widget of node.widgets ?? []) {
      if (widget.name === 'control_after_generate') widget.value = fixed ? 'fixed' : 'randomize'
      // The page keeps, by the node's number, what this widget said in the graph before.
      const input = node.inputs.find(each => each.widget?.name === widget.name)
      if (input?.link != null && typeof widget.value === 'string') widget.value = ''
    }
  let x = 0
  for (const [title, nodes] of Object.entries(groups)) {
    let y = 0, bottom = 0
    for (const node of x ? nodes : [...nodes, ...texts]) {
      const least = node.lines ? 70 + 17 * node.lines : height[node.type] ?? 0
      node.setSize([width, Math.max(least, Math.ceil(node.computeSize()[1] / 10) * 10)])
      node.pos = [x, y + (node.lines ? 40 : 0)]
      if (!node.lines) bottom = y + node.size[1]
      y += node.size[1] + gap
    }
    const group = new LiteGraph.LGraphGroup(title)
    group.pos = [x - 20, -top]
    group.size = [width + 40, bottom + top + 20]
    app.graph.add(group)
    x += width + 80
  }
  return app.graph.serialize()
}"""

PLACE = """async (left, top) => {
  const boxes = [...app.graph.nodes.map(node => [node.pos[0], node.pos[1] - 30, node.size[0], node.size[1] + 30]),
                 ...app.graph.groups.map(group => [...group.pos, ...group.size])]
  const x = Math.min(...boxes.map(box => box[0])), y = Math.min(...boxes.map(box => box[1]))
  app.canvas.ds.scale = 1
  app.canvas.ds.offset = [left + 10 - x, top + 10 - y]
  app.canvas.setDirty(true, true)
  return [Math.max(...boxes.map(box => box[0] + box[2])) - x + 20, Math.max(...boxes.map(box => box[1] + box[3])) - y + 20]
}"""

# Scrolls to the node of a type, and says how wide and high it is.
PLACE_NODE = """async (type, left, top) => {
  const node = app.graph.nodes.find(node => node.type === type)
  app.canvas.ds.scale = 1
  app.canvas.ds.offset = [left + 10 - node.pos[0], top + 40 - node.pos[1]]
  app.canvas.setDirty(true, true)
  return [node.size[0] + 20, node.size[1] + 50]
}"""


def make_canvas(server: real_comfyui.Server, names: list[str]) -> None:
    """Write the canvas form of these workflows."""
    browser = comfyui_browser.Browser(*comfyui_browser.find(), server.url)
    try:
        for name in names:
            texts = [
                [title, note, lines_of(note)]
                for title, note in zip(("About", "说明"), notes()[name])
            ]
            graph = browser.call(ARRANGE, api(name), texts, name in FIXED)
            graph["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-l2p/{name}"))
            graph["extra"] = {}
            add_downloads(graph)
            (WORKFLOWS / f"{TITLES[name]}.json").write_text(
                json.dumps(without_nulls(graph), indent=1, ensure_ascii=False) + "\n",
                encoding="utf-8",
            )
            print("canvas", name, flush=True)
    finally:
        browser.close()


def lines_of(note: str) -> int:
    """Return about how many lines a note takes on the canvas; a Chinese character is as wide as two
    letters."""
    widths = (sum(2 if char > "⺀" else 1 for char in line) for line in note.splitlines())
    return sum(max(1, -(-width // 46)) for width in widths)


def without_nulls(value):
    """JSON without the keys that say nothing; a link that is not there is said."""
    if isinstance(value, dict):
        return {
            key: without_nulls(each)
            for key, each in value.items()
            if each is not None or key in ("link", "links")
        }
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return round(value) if isinstance(value, float) and value.is_integer() else value


def make_thumbnails(server: real_comfyui.Server, names: list[str]) -> None:
    """Generate and write the thumbnails of these workflows."""

    def generate(name: str, steps: int = 30, **options) -> list[Image.Image]:
        prompt = options.pop("prompt", PROMPTS.get(name, SHAPES[0]))
        files = server.run(small(name, steps, prompt, model_4k=BUNDLED, **options))
        return [Image.open(io.BytesIO(file)).convert("RGB") for file in files]

    write_models(server.models, patch_64=False)
    first = generate("core_nodes", prompt=START)[0]
    server.upload(INPUT_IMAGE, input_image(first))
    for name in names:
        match name:
            case "image_to_image":
                image = halves(first, generate(name, denoise=0.8)[0])
            case "inpaint":
                masked = first.copy()
                ImageDraw.Draw(masked).rectangle(
                    (masked.width // 2, 0, *masked.size), fill=(127, 127, 127)
                )
                image = halves(masked, generate(name)[0])
            case "lora" | "upscale_to_4k":
                before = generate("text_to_image", prompt=PROMPTS[name])[0]
                image = halves(before, generate(name)[0])
            case "latent_draft":
                before = generate("core_nodes", prompt=PROMPTS[name])[0]
                image = halves(before, generate(name)[0])
            case "train_lora":
                image = halves(*before_and_after_training(server, name))
            case "batch_of_prompts" | "training_images":
                image = grid(
                    [
                        each.resize((SIDE // 2,) * 2, Image.Resampling.LANCZOS)
                        for each in generate(name, prompt="\n".join(SHAPES))
                    ]
                )
            case _:
                image = generate(name)[-1].resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        path = WORKFLOWS / f"{TITLES[name]}.jpg"
        image.save(path, quality=85, optimize=True)
        print("thumbnail", name, path.stat().st_size, flush=True)


def before_and_after_training(server: real_comfyui.Server, name: str) -> list[Image.Image]:
    """The image of a workflow that trains a LoRA, without and with it."""
    trained, untrained = api(name), api(name)
    (sampler,) = (
        node
        for node in untrained.values()
        if node["class_type"] == "L2PKSampler" and node["_meta"]["group"].startswith("Use")
    )
    loader = untrained[sampler["inputs"]["model"][0]]
    sampler["inputs"]["model"] = loader["inputs"]["model"]
    untrained = {
        key: node
        for key, node in untrained.items()
        if node["class_type"] not in ("L2PTrainLoRA", "LoraLoaderModelOnly")
    }
    return [
        Image.open(io.BytesIO(server.run(graph, 3000)[-1])).convert("RGB")
        for graph in (untrained, trained)
    ]


def halves(before: Image.Image, after: Image.Image) -> Image.Image:
    """Before above left, after below right, on one square."""
    side = SIDE * 5 // 8
    out = Image.new("RGB", (SIDE, SIDE), (32, 32, 32))
    out.paste(before.resize((SIDE * 7 // 16,) * 2, Image.Resampling.NEAREST), (8, 8))
    out.paste(
        after.resize((side, side), Image.Resampling.LANCZOS), (SIDE - side - 8, SIDE - side - 8)
    )
    return out


def grid(images: list[Image.Image]) -> Image.Image:
    """Four images as one."""
    out = Image.new("RGB", (SIDE, SIDE))
    for index, image in enumerate(images):
        out.paste(image, (index % 2 * SIDE // 2, index // 2 * SIDE // 2))
    return out


def make_screenshots(server: real_comfyui.Server, names: list[str]) -> None:
    """Write the screenshots in docs/: the canvas of the demo after Run, a LoRA in training, the panel
    of missing models, a node's help, and the template browser."""
    server.post(
        "/settings",
        {
            "Comfy.Minimap.Visible": False,
            "Comfy.Graph.CanvasMenu": False,
            "Comfy.Templates.SortBy": "alphabetical",
        },
    )
    browser = comfyui_browser.Browser(*comfyui_browser.find(), server.url, 2200, 1200)
    page = browser.page
    page.set_default_timeout(60_000)

    def save(name: str, clip: dict | None = None) -> None:
        page.wait_for_timeout(3000)
        png = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
        path = ROOT / "docs" / f"{name}.png"
        png.quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)
        print("screenshot", path.name, path.stat().st_size, png.size, flush=True)

    try:
        browser.open(canvas("demo"), TITLES["demo"])
        browser.run()
        left, top = 120, 120
        width, height = browser.call(PLACE, left, top)
        save("canvas-demo", {"x": left, "y": top, "width": width, "height": height})

        browser.open(canvas("train_lora"), TITLES["train_lora"])
        page.get_by_test_id("queue-button").click()
        width, height = browser.call(PLACE_NODE, "L2PTrainLoRA", left, top)
        page.get_by_text(re.compile(r"step [45]\d of 60")).wait_for(timeout=1_200_000)
        save("canvas-train", {"x": left, "y": top, "width": width, "height": height})
        page.wait_for_function("() => !app.ui.lastQueueSize", timeout=600_000)

        browser.open(canvas("demo"), TITLES["demo"])
        page.set_viewport_size({"width": 1500, "height": 800})
        browser.call(
            "type => app.canvas.selectNode(app.graph.nodes.find(node => node.type === type))",
            "L2PKSampler",
        )
        page.get_by_test_id("info-button").click()
        save("canvas-help")

        browser.open(canvas("text_to_image"), TITLES["text_to_image"])
        page.get_by_text("View details").first.click()
        save("canvas-missing-models")

        browser.clear()
        browser.call("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        page.get_by_role("dialog").get_by_text("ComfyUI-L2P", exact=True).first.click()
        save("canvas-templates")
    finally:
        browser.close()


TASKS = {"canvas": make_canvas, "thumbnails": make_thumbnails, "screenshots": make_screenshots}

if __name__ == "__main__":
    if (
        len(sys.argv) < 2
        or sys.argv[1] not in (*TASKS, "all")
        or not set(sys.argv[2:]) <= set(NAMES)
    ):
        sys.exit(__doc__)
    for found in (
        real_comfyui.find(),
        *(() if sys.argv[1] == "thumbnails" else (comfyui_browser.find(),)),
    ):
        if isinstance(found, str):
            sys.exit(found)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped too
    with tempfile.TemporaryDirectory() as folder:
        server = real_comfyui.Server(*real_comfyui.find(), Path(folder))
        try:
            for task in TASKS.values() if sys.argv[1] == "all" else [TASKS[sys.argv[1]]]:
                task(server, sys.argv[2:] or NAMES)
        finally:
            server.close()
