"""A headless Chromium, driven by the DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-sandbox",
    "--disable-dev-shm-usage",
)
SOFTWARE_WEBGPU = (
    "--enable-unsafe-webgpu",
    "--enable-features=Vulkan",
    "--use-vulkan=swiftshader",
    "--use-webgpu-adapter=swiftshader",
)
"""Flags with which WebGPU computes on the CPU: slow, and needs no graphics card."""
KEYS = {"Tab": 9, "Enter": 13, " ": 32}


class Browser:
    """One tab. Everything that the page asked for is in `requests`, what it logged in `console`."""

    def __init__(self, profile: Path, flags: Sequence[str] = ()) -> None:
        from_us, self._out = os.pipe()
        self._in, to_us = os.pipe()
        # Chromium reads file descriptor 3 and writes to 4; the shell puts the pipes there.
        command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{from_us} 4>&{to_us}', "bash", *command],
            pass_fds=(from_us, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self._buffer, self._number, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.console: list[str] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        self._enable()

    def _enable(self) -> None:
        # Requests of a worker are seen only by one who is attached to it.
        self.send(
            "Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True
        )
        for domain in ("Network", "Runtime", "Page"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        """End the browser and wait for it."""
        self._session = ""
        self.send("Browser.close")
        self._process.wait(timeout=20)
        os.close(self._out)
        os.close(self._in)

    def send(
        self, method: str, *, session: str | None = None, wait: float = 60, **params: Any
    ) -> Any:
        """Call a method of the protocol and return its result."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = session or self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + wait
        while True:
            found = self._receive(deadline, method)
            if found.get("id") == number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']['message']}")
                return found["result"]

    def _receive(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(what)
            read = os.read(self._in, 1 << 20)
            if not read:
                raise RuntimeError("chromium ended")
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])
            case "Runtime.consoleAPICalled":
                parts = [str(a.get("value", a.get("description"))) for a in event["params"]["args"]]
                self.console.append(" ".join(parts))
            case "Runtime.exceptionThrown":
                self.console.append(str(event["params"]["exceptionDetails"]))
            case "Target.attachedToTarget":
                self._attach_worker(event["params"]["sessionId"])

    def _attach_worker(self, session: str) -> None:
        for method in ("Network.enable", "Runtime.enable", "Runtime.runIfWaitingForDebugger"):
            self._number += 1
            call = {"id": self._number, "method": method, "params": {}, "sessionId": session}
            os.write(self._out, json.dumps(call).encode() + b"\0")

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        found = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> None:
        """Ask again until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"!!({expression})"):
            if time.monotonic() > deadline:
                text = self.evaluate("document.body.innerText")
                raise TimeoutError(f"{expression}\n{text}\n{self.console}")
            time.sleep(0.02)

    def resize(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, *keys: str) -> None:
        """Press keys by name, or type text."""
        for key in keys:
            if key not in KEYS:
                self.send("Input.insertText", text=key)
                continue
            text = {"Enter": "\r", " ": " "}.get(key, "")
            both = {"key": key, "windowsVirtualKeyCode": KEYS[key]}
            self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **both)
            self.send("Input.dispatchKeyEvent", type="keyUp", **both)

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
