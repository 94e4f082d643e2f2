"""ComfyUI's own page in a headless Chromium."""

import importlib.util
import shutil

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
READY = (  # every node type is there, and so is the workflow a first visit begins with
    "() => window.app?.graph?.nodes.length > 0"
)
SAVED = "app.graph.nodes.find(node => node.type === 'SaveImage').imgs?.[0]"
SETTLE = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def find() -> tuple[str] | str:
    """(the browser's path,), or why there is none."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed; it comes with the extra: pip install '.[browser]'"
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    return (path,) if path else "no chromium, chromium-browser or google-chrome on PATH"


class Browser:
    """The page, with its graph empty. browser.page is Playwright's; browser.errors is what went
    wrong on it."""

    def __init__(self, path: str, url: str, width: int = 1600, height: int = 900):
        from playwright.sync_api import sync_playwright

        self.url, self.errors = url, []
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=path, args=FLAGS)
        self.page = self._browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(300_000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY)
        self.clear()

    def clear(self) -> None:
        self.page.evaluate("() => app.graph.clear()")

    def call(self, function: str, *arguments):
        """What a JavaScript function of those arguments returns, once the page has drawn itself
        again."""
        result = self.page.evaluate(f"arguments => ({function})(...arguments)", list(arguments))
        self.page.evaluate(SETTLE)
        return result

    def open(self, workflow: dict, name: str) -> None:
        """Open a workflow in canvas form."""
        self.call(
            "(workflow, name) => app.loadGraphData(workflow, true, true, name)", workflow, name
        )

    def open_template(self, pack: str, name: str) -> None:
        """Open a workflow as a newcomer does: Templates, the pack, its card."""
        self.call("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.page.get_by_role("dialog").get_by_text(pack, exact=True).first.click()
        self.page.get_by_test_id(f"template-workflow-{name}").click()
        self.page.wait_for_function("() => app.graph.nodes.length > 0")

    def run(self, seconds: float = 120) -> None:
        """Press Run, and wait until Save Image shows what came out."""
        self.page.get_by_test_id("queue-button").click()
        self.page.wait_for_function(f"() => ({SAVED})?.complete", timeout=seconds * 1000)

    def close(self) -> None:
        self._browser.close()
        self._playwright.stop()
