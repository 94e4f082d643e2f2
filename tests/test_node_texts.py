"""Every node explains itself: tooltips in its schema, a help page and widget names in each
language, and none of them stale."""

import ast
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from workflow_variants import TITLES

ROOT = Path(__file__).parents[1]
WORKFLOWS = set(TITLES.values())
HELP = {
    "": "Workflows: ",
    "zh": "工作流：",
}  # a language's help pages end in a line that begins so; "" for all that have none
CHINESE = re.compile("[一-鿿]")
MESSAGE_SYNTAX = set("{}@|")  # of the interface's translations: placeholders, links and plurals


class Node(NamedTuple):
    display_name: str
    tooltips: dict[str, bool]  # by input, in order: whether there is one
    outputs: list[str]


def constants_of(module: ast.Module) -> dict[str, ast.expr]:
    """What a module assigns to names."""
    return {
        statement.targets[0].id: statement.value
        for statement in module.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }


MODULES = [ast.parse(path.read_text()) for path in sorted((ROOT / "nodes").glob("*.py"))]
SHARED = constants_of(ast.parse((ROOT / "nodes" / "inputs.py").read_text()))


def nodes_in(module: ast.Module) -> dict[str, Node]:
    """The nodes that a module defines, by id, read without importing it, which takes a ComfyUI."""
    constants = SHARED | constants_of(module)
    found = {}
    for call in ast.walk(module):
        if not (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "Schema"
        ):
            continue
        fields = {keyword.arg: keyword.value for keyword in call.keywords}
        inputs = [
            constants[item.id] if isinstance(item, ast.Name) else item
            for item in fields["inputs"].elts
        ]
        found[fields["node_id"].value] = Node(
            fields["display_name"].value,
            dict(map(input_in, inputs)),
            [
                item.args[0].value if item.args else item.func.value.attr.upper()
                for item in fields["outputs"].elts
            ],
        )
    return found


def input_in(call: ast.Call) -> tuple[str, bool]:
    """An input's name and whether it has a tooltip. `setting` and `side` take theirs from
    `Settings`, by the setting's name; a second argument is what the node calls it."""
    derived = isinstance(call.func, ast.Name)
    name = call.args[1] if derived and len(call.args) > 1 else call.args[0]
    return name.value, derived or any(keyword.arg == "tooltip" for keyword in call.keywords)


NODES = {node_id: node for module in MODULES for node_id, node in nodes_in(module).items()}
FILE_TOOLS = {  # in no workflow: each is one on its own
    node_id
    for name in ("files.py", "check.py")
    for node_id in nodes_in(ast.parse((ROOT / "nodes" / name).read_text()))
}


def help_page(node_id: str, language: str) -> str:
    docs = ROOT / "web" / "docs"
    return (docs / node_id / f"{language}.md" if language else docs / f"{node_id}.md").read_text(
        encoding="utf-8"
    )


def translation(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def test_the_schemas_are_read_as_comfyui_reads_them(comfyui):
    shown = comfyui.call("describe", names=sorted(NODES))
    assert shown == {
        node_id: [node.display_name, node.tooltips, node.outputs]
        for node_id, node in sorted(NODES.items())
    }
    assert sorted(NODES) == comfyui.nodes


@pytest.mark.parametrize("node_id", NODES)
def test_every_input_has_a_tooltip(node_id):
    assert [name for name, tooltip in NODES[node_id].tooltips.items() if not tooltip] == []


@pytest.mark.parametrize("language", HELP)
@pytest.mark.parametrize("node_id", NODES)
def test_a_help_page_explains_every_input_and_no_other(node_id, language):
    """As a list: the info panel of the page is too narrow for a table."""
    page = help_page(node_id, language)
    explained = re.findall(r"^- `(\w+)` ?[(（]", page, re.MULTILINE)
    assert explained == list(NODES[node_id].tooltips)
    assert not re.search(r"^\|", page, re.MULTILINE)


@pytest.mark.parametrize("language", HELP)
@pytest.mark.parametrize("node_id", sorted(NODES.keys() - FILE_TOOLS))
def test_a_help_page_names_workflows_that_there_are(node_id, language):
    last = help_page(node_id, language).splitlines()[-1]
    assert last.startswith(HELP[language])
    named = re.findall(r"`([^`]+)`", last)
    assert named and set(named) <= WORKFLOWS


def test_no_help_page_is_left_of_a_node_that_is_gone():
    docs = ROOT / "web" / "docs"
    assert {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} == {
        page for node_id in NODES for page in (f"{node_id}.md", f"{node_id}/zh.md")
    }


def test_chinese_names_every_node_input_and_output_and_no_other():
    found = {
        node_id: (list(texts["inputs"]), list(texts["outputs"]))
        for node_id, texts in translation("zh").items()
    }
    assert found == {
        node_id: (list(node.tooltips), [str(place) for place in range(len(node.outputs))])
        for node_id, node in NODES.items()
    }


@pytest.mark.parametrize("node_id", NODES)
def test_the_chinese_texts_are_whole_and_chinese(node_id):
    texts = translation("zh")[node_id]
    assert set(texts) == {"display_name", "description", "inputs", "outputs"}
    assert all(
        set(item) == {"name", "tooltip"} and item["name"] for item in texts["inputs"].values()
    )
    assert all(set(item) == {"name"} and item["name"] for item in texts["outputs"].values())
    sentences = [
        texts["description"],
        *(item["tooltip"] for item in texts["inputs"].values()),
        help_page(node_id, "zh"),
    ]
    assert all(CHINESE.search(text) for text in (texts["display_name"], *sentences))


@pytest.mark.parametrize("node_id", NODES)
def test_texts_hold_nothing_that_the_interface_takes_for_syntax(node_id):
    """Names and descriptions pass through vue-i18n; tooltips are shown as they are."""
    texts = translation("zh")[node_id]
    shown = [
        texts["display_name"],
        texts["description"],
        *(item["name"] for part in ("inputs", "outputs") for item in texts[part].values()),
    ]
    assert [text for text in shown if MESSAGE_SYNTAX & set(text)] == []
