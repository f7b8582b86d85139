"""Chromium without a window, driven over a pipe by its DevTools protocol: one page, asked in JavaScript."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
]


class Page:
    """A page in a Chromium of its own that reaches nothing but this machine."""

    def __init__(self, address: str):
        self.profile = tempfile.mkdtemp()
        (read, self.to), (self.from_, write) = os.pipe(), os.pipe()
        command = [
            str(CHROMIUM),
            *FLAGS,
            f"--user-data-dir={self.profile}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ]
        script = f'exec "$@" 3<&{read} 4>&{write}'  # the ends it looks for
        self.process = subprocess.Popen(
            ["bash", "-c", script, "chromium", *command],
            pass_fds=(read, write),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self.answers, self.number, self.session = os.fdopen(self.from_, "rb"), 0, ""
        target = self.tell("Target.createTarget", url=address)["targetId"]
        self.session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        deadline = time.monotonic() + 60
        while self.ask("[document.readyState, location.href]") != ["complete", address]:
            assert time.monotonic() < deadline, f"{address} does not load"

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.answers.close()
        os.close(self.to)
        shutil.rmtree(self.profile, ignore_errors=True)

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its result."""
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        message = {"id": self.number, "method": method, "params": parameters} | session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self) -> bytes:
        """The next message; they end with a zero byte."""
        parts = []
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            parts.append(byte)
        return b"".join(parts)

    def ask(self, expression: str) -> Any:
        """The value of an expression, or of what it promises; AssertionError for what it throws."""
        answer = self.tell("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]["exception"].get("description")
        return answer["result"].get("value")


def as_address(page: Path) -> str:
    """Where Chromium finds a file."""
    return page.absolute().as_uri()
