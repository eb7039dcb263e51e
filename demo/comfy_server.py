"""A real ComfyUI server as a child process, with this pack among its custom nodes and nothing kept afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import psutil

PACK = Path(__file__).resolve().parent.parent
PACK_NAME = "psa-attention"
NOT_SHIPPED = shutil.ignore_patterns(".*", "demo", "tests", "benchmarks", "__pycache__")
PROGRESS_TEXT = 3  # ComfyUI's number for a binary message that holds a node's text
START_SECONDS = 180.0

Prompt = Mapping[str, Mapping[str, Any]]


class ComfyError(RuntimeError):
    """The server did not start, refused a prompt or went away; the message ends with what it logged last."""


@dataclass
class Run:
    """What became of one queued prompt.

    Args:
        status: ``success``, ``error`` or ``interrupted``.
        message: What went wrong, empty if nothing did.
        outputs: ComfyUI's history of the output nodes, by node id.
        texts: Texts that nodes showed while running, as ``(node id, text)``.
        node_seconds: How long every node ran, by node id; cached nodes are absent.
        seconds: From queueing to the end.
        peak_mib: Highest memory seen meanwhile, sampled: of the GPU if there is one, else of the process.
    """

    status: str = "error"
    message: str = ""
    outputs: dict[str, Any] = field(default_factory=dict)
    texts: list[tuple[str, str]] = field(default_factory=list)
    node_seconds: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    peak_mib: float = 0.0


class ComfyServer:
    """Context manager around one server on 127.0.0.1.

    Args:
        comfyui: ComfyUI's source tree.
        models: Files to offer, by models folder: ``{"vae": [path]}``.
        custom_nodes: Folders to put beside the pack among the custom nodes.
        with_pack: Whether the pack itself is there.
        arguments: Further command-line arguments of ComfyUI.
        cpu: Run without a GPU; by default where torch finds none.
        port: Port to listen on; a free one by default.
        environment: Variables to set beside the current ones.

    Raises:
        ComfyError: on entry, if the server does not come up.
    """

    def __init__(
        self,
        comfyui: Path,
        *,
        models: Mapping[str, Sequence[Path]] | None = None,
        custom_nodes: Sequence[Path] = (),
        with_pack: bool = True,
        arguments: Sequence[str] = (),
        cpu: bool | None = None,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if not (comfyui / "main.py").is_file():
            raise ValueError(f"comfyui: {comfyui} has no main.py")
        self.comfyui = comfyui.resolve()
        self.cpu = not _cuda_available() if cpu is None else cpu
        self.port = port or _free_port()
        self._models = models or {}
        self._custom_nodes = custom_nodes
        self._with_pack = with_pack
        self._arguments = arguments
        self._environment = environment or {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output_folder(self) -> Path:
        return self.base / "output"

    def __enter__(self) -> ComfyServer:
        self.base = Path(tempfile.mkdtemp(prefix="psa-comfyui-"))
        self._lay_out()
        command = [sys.executable, str(self.comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--use-pytorch-cross-attention", *self._arguments]
        command += ["--cpu"] if self.cpu else []
        self._log_path = self.base / "server.log"
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                # Threads that wait must not spin: on two cores with anything else to do, that costs five times as much.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUNBUFFERED": "1", **self._environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.base, ignore_errors=True)

    def log(self) -> str:
        """Everything that the server has logged."""
        return self._log_path.read_text(errors="replace")

    def version(self) -> str:
        """ComfyUI's version, as the server states it."""
        return str(self.get("/system_stats")["system"]["comfyui_version"])

    def object_info(self, node: str = "") -> dict[str, Any]:
        """Descriptions of all nodes, or of one."""
        return dict(self.get(f"/object_info/{node}" if node else "/object_info"))

    def get(self, path: str) -> Any:
        """JSON that the server gives for a path."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """JSON that the server answers to a body; None where it answers nothing.

        Raises:
            ComfyError: the server refuses; the message holds its reasons.
        """
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            raise ComfyError(f"{path}: {error.code} {error.read().decode(errors='replace')}") from None
        return json.loads(content) if content else None

    def interrupt(self) -> None:
        """Stop the prompt that is running."""
        self.post("/interrupt", {})

    def run(
        self, prompt: Prompt, *, on_progress: Callable[[str, int, int], None] | None = None, timeout: float = 1800.0
    ) -> Run:
        """Queue a prompt in API form and wait for its end.

        Args:
            prompt: Nodes by id.
            on_progress: Called with a node's id and its steps done and in all.
            timeout: Seconds to wait.

        Raises:
            ComfyError: the prompt is refused, or the server goes away or stays silent for too long.
        """
        with _MemoryPeak(self) as memory:
            try:
                run = asyncio.run(asyncio.wait_for(self._follow(prompt, on_progress), timeout))
            except (TimeoutError, aiohttp.ClientError) as error:
                raise self._failure(f"prompt without an end: {error!r}") from error
        run.peak_mib = memory.peak_mib
        return run

    async def _follow(self, prompt: Prompt, on_progress: Callable[[str, int, int], None] | None) -> Run:
        client, run, begin = uuid.uuid4().hex, Run(), time.monotonic()
        node, node_begin = None, begin
        socket_url = f"{self.url}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(socket_url, max_msg_size=0) as messages:
            body = {"prompt": prompt, "client_id": client}
            prompt_id = (await asyncio.to_thread(self.post, "/prompt", body))["prompt_id"]
            async for message in messages:
                if message.type == aiohttp.WSMsgType.BINARY:
                    run.texts += _progress_text(message.data)
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                kind, data = event["type"], event.get("data") or {}
                if data.get("prompt_id") not in (None, prompt_id):
                    continue
                if kind in ("executing", "execution_success", "execution_error", "execution_interrupted"):
                    now = time.monotonic()
                    if node is not None:
                        run.node_seconds[node] = run.node_seconds.get(node, 0.0) + now - node_begin
                    node, node_begin = data.get("node") if kind == "executing" else None, now
                if kind == "progress" and on_progress:
                    await asyncio.to_thread(on_progress, data["node"], data["value"], data["max"])
                if kind == "execution_success":
                    run.status = "success"
                    break
                if kind == "execution_interrupted":
                    run.status, run.message = "interrupted", "interrupted"
                    break
                if kind == "execution_error":
                    run.message = f"{data.get('node_type')}: {data.get('exception_message', '').strip()}"
                    break
            else:
                raise self._failure("the server closed the connection")
        run.seconds = time.monotonic() - begin
        history = await asyncio.to_thread(self._history, prompt_id)
        run.outputs = history.get("outputs", {})
        return run

    def _history(self, prompt_id: str) -> dict[str, Any]:
        """A prompt's record, which appears a moment after its last message."""
        for _ in range(100):
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return dict(history[prompt_id])
            time.sleep(0.05)
        raise self._failure(f"prompt {prompt_id} is not in the history")

    def _lay_out(self) -> None:
        """Make the base folder: models are linked or copied, so is the pack."""
        nodes = self.base / "custom_nodes"
        nodes.mkdir()
        for folder in ("input", "output", "temp", "user", "models"):
            (self.base / folder).mkdir()
        if self._with_pack:
            _link_or_copy(PACK, nodes / PACK_NAME)
        for folder in self._custom_nodes:
            _link_or_copy(folder, nodes / folder.name)
        for kind, files in self._models.items():
            (self.base / "models" / kind).mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copy(file, self.base / "models" / kind / file.name)

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise self._failure(f"ComfyUI ended with code {self.process.returncode}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise self._failure(f"ComfyUI did not answer within {START_SECONDS:.0f} s")

    def _failure(self, what: str) -> ComfyError:
        return ComfyError(f"{what}\n{self.log()[-4000:]}")


class _MemoryPeak:
    """Samples a server's memory in a thread while a prompt runs."""

    def __init__(self, server: ComfyServer, interval: float = 0.1) -> None:
        self.peak_mib = 0.0
        self._server, self._interval, self._stop = server, interval, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process(self._server.process.pid)
        while not self._stop.wait(self._interval):
            try:
                self.peak_mib = max(self.peak_mib, self._read(process) / 2**20)
            except (psutil.Error, urllib.error.URLError, OSError):
                continue  # busy or gone: the run itself will tell

    def _read(self, process: psutil.Process) -> float:
        if self._server.cpu:
            return float(process.memory_info().rss)
        device = self._server.get("/system_stats")["devices"][0]
        return float(device["torch_vram_total"] - device["torch_vram_free"])


def _progress_text(data: bytes) -> list[tuple[str, str]]:
    if struct.unpack(">I", data[:4])[0] != PROGRESS_TEXT:
        return []
    length = struct.unpack(">I", data[4:8])[0]
    return [(data[8 : 8 + length].decode(), data[8 + length :].decode())]


def _link_or_copy(source: Path, target: Path) -> None:
    if os.name == "nt":  # links need privileges there
        shutil.copytree(source, target, ignore=NOT_SHIPPED)
    else:
        target.symlink_to(source, target_is_directory=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()
