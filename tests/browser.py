"""ComfyUI's frontend in a headless Chromium, driven as a user would."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from comfy_server import ComfyServer
from install_browser import find_browser

# Nothing but the server itself can be reached, so that a test never depends on, or tells, anybody else.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
READY = "window.app?.graph && 'KSampler' in LiteGraph.registered_node_types && app.extensionManager"
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}


class Frontend:
    """The page of a running server.

    Args:
        page: An open page of the frontend.
        server: The server behind it.
    """

    def __init__(self, page: Page, server: ComfyServer) -> None:
        self.page = page
        self.server = server

    def open_templates(self) -> None:
        """Open the template browser."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")

    def load(self, workflow: dict[str, Any]) -> None:
        """Load a workflow and wait until it is there."""
        self.page.evaluate("async (workflow) => { await app.loadGraphData(workflow) }", workflow)
        self.page.wait_for_function(f"app.graph.nodes.length === {len(workflow['nodes'])}")

    def set_values(self, node_type: str, **values: Any) -> None:
        """Change widgets of the nodes of a type, by name."""
        self.page.evaluate(
            """([type, values]) => {
                for (const node of app.graph.nodes.filter((node) => node.type === type))
                    for (const [name, value] of Object.entries(values))
                        node.widgets.find((widget) => widget.name === name).value = value
            }""",
            [node_type, values],
        )

    def set_mode(self, node_type: str, mode: int) -> None:
        """Set the mode of the nodes of a type: 0 always, 2 muted, 4 bypassed."""
        self.page.evaluate(
            "([type, mode]) => { for (const node of app.graph.nodes) if (node.type === type) node.mode = mode }",
            [node_type, mode],
        )

    def place(self, name: str, left: float, top: float, width: float, height: float) -> None:
        """Move and resize the nodes of a title or type, in the graph's own units."""
        self.page.evaluate(
            """([name, pos, size]) => {
                for (const node of app.graph.nodes.filter((node) => [node.title, node.type].includes(name)))
                    Object.assign(node, { pos, size })
            }""",
            [name, [left, top], [width, height]],
        )

    def add(self, node_type: str, links: dict[str, tuple[str, int]], place: tuple[float, float, float, float]) -> None:
        """Add a node.

        Args:
            node_type: Its type.
            links: For each input, the type of the node to connect and the number of its output.
            place: Left, top, width and height, in the graph's own units.
        """
        self.page.evaluate(
            """([type, links, [left, top, width, height]]) => {
                const node = LiteGraph.createNode(type)
                app.graph.add(node)
                Object.assign(node, { pos: [left, top], size: [width, height] })
                for (const [name, [source, output]] of Object.entries(links))
                    app.graph.nodes.find((node) => node.type === source).connect(output, node, name)
            }""",
            [node_type, links, list(place)],
        )

    def node_types(self) -> list[str]:
        """Types of all nodes on the canvas."""
        return list(self.page.evaluate("() => app.graph.nodes.map((node) => node.type)"))

    def missing_types(self) -> list[str]:
        """Types of the nodes on the canvas that no node pack has registered."""
        return list(
            self.page.evaluate(
                """() => app.graph.nodes.filter((node) => !(node.type in LiteGraph.registered_node_types))
                    .map((node) => node.type)"""
            )
        )

    def prompt(self) -> dict[str, dict[str, Any]]:
        """What the Run button would send."""
        return dict(self.page.evaluate("async () => (await app.graphToPrompt()).output"))

    def run(self, timeout: float = 120.0) -> dict[str, Any]:
        """Press Run and wait for the prompt's end.

        Returns:
            The prompt's record in the server's history.
        """
        before = set(self.server.get("/history"))
        self.page.get_by_test_id("queue-button").first.click()
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.page.wait_for_timeout(300)
            new = [record for key, record in self.server.get("/history").items() if key not in before]
            if new:
                return dict(new[0])
        raise TimeoutError(f"the prompt had no end within {timeout:.0f} s")

    def click_widget(self, node_type: str, name: str) -> None:
        """Click the middle of a widget of the only node of a type, at whatever place the canvas shows it."""
        x, y = self.page.evaluate(
            """([type, name]) => {
                const node = app.graph.nodes.find((node) => node.type === type)
                const widget = node.widgets.find((widget) => widget.name === name)
                const { scale, offset } = app.canvas.ds
                const place = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10]
                const { left, top } = app.canvas.canvas.getBoundingClientRect()
                return [left + (place[0] + offset[0]) * scale, top + (place[1] + offset[1]) * scale]
            }""",
            [node_type, name],
        )
        self.page.mouse.click(x, y)

    def fit(self, left: float, top: float, scale: float) -> None:
        """Move the canvas: the graph's point that is its upper left corner, and how large it is drawn."""
        self.page.evaluate(
            """([left, top, scale]) => {
                Object.assign(app.canvas.ds, { scale, offset: [-left, -top] }); app.canvas.setDirty(true, true)
            }""",
            [left, top, scale],
        )
        self.page.wait_for_timeout(500)

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)


@contextmanager
def open_frontend(
    server: ComfyServer, width: int = 1600, height: int = 900, language: str = "en"
) -> Iterator[Frontend]:
    """Open a server's frontend in a headless browser.

    Raises:
        playwright.sync_api.Error: the frontend does not come up.
    """
    for name, value in {**SETTINGS, "Comfy.Locale": language}.items():
        server.post(f"/settings/{name}", value)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=ARGUMENTS)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")  # an announcement
            page.set_default_timeout(15_000)
            page.goto(server.url)
            page.wait_for_function(READY, timeout=120_000)
            yield Frontend(page, server)
        finally:
            browser.close()
