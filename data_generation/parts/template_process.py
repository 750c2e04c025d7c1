"""Has chat templates rendered in a process of its own, so that one that runs away ends there, with a line here.

Knows nothing about tokenizers or turns; template_worker.py is what runs there.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from parts.raw_rows import InputError

WORKER = Path(__file__).with_name("template_worker.py")
SECONDS = 5.0  # of the processor, a thousand times what templates take
MEMORY_BYTES = 1 << 29
CHARACTERS_PER_LETTER, FREE_CHARACTERS = 10, 1 << 20  # of what is written, by the letters in the messages


class TemplateError(InputError):
    """A template that cannot be compiled or rendered.

    Args:
        reason: Why.
        stage: "compile", "render", or "run away" where it took too much.
        undefined: Whether it uses a name that nothing defines.
    """

    def __init__(self, reason: str, stage: str, undefined: bool = False) -> None:
        """Keeps the arguments as attributes."""
        super().__init__(reason)
        self.stage, self.undefined = stage, undefined


class TemplateProcess:
    """The other process: started when it is needed, ended with this one, and replaced after it was stopped.

    Threads may share it; one asks after the other.
    """

    def __init__(self) -> None:
        """Starts nothing yet."""
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def ask(self, template: str, names: dict[str, Any] | None) -> tuple[str, list[str]]:
        """Compiles a template, and renders it with these names unless they are None.

        Returns:
            The text, and the dates in it.

        Raises:
            TemplateError: If it fails, or takes too much time, memory or room.
        """
        packed = json.dumps(names)
        request = {
            "template": template,
            "names": None,
            "seconds": SECONDS,
            "most_characters": FREE_CHARACTERS + CHARACTERS_PER_LETTER * (len(packed) + len(template)),
        }
        line = json.dumps(request).encode().replace(b'"names": null', b'"names": ' + packed.encode(), 1)
        with self.lock:
            answer = json.loads(self.exchange(line) or "null")
        if answer is None:
            limits = f"{SECONDS:g} s of computing or {MEMORY_BYTES >> 20} MB"
            raise TemplateError(f"it took more than {limits} and was stopped", "run away")
        if "error" in answer:
            raise TemplateError(answer["error"], answer["stage"], answer["undefined"])
        return answer["text"], answer.get("dates", [])

    def exchange(self, line: bytes) -> bytes:
        """Returns the answer to a line, empty if the process ended before it."""
        if self.process is None:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    str(WORKER),
                    str(MEMORY_BYTES),
                ],  # -P: modules beside it are none of Python's own
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C lets answers in flight end, which may need a template
            )
        assert self.process.stdin
        assert self.process.stdout
        answer = b""
        try:
            self.process.stdin.write(line + b"\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not answer.endswith(b"\n"):  # after an interrupt too: the next request must not get this one's answer
                self.close()
                answer = b""
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
