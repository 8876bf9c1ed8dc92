"""A process of another environment's Python that scores: official packages pin what cfjax cannot have beside itself.

VBench 0.1.5 wants NumPy below 2 and transformers 4.33, HPSv3 1.0 transformers 4.45. What runs there is
`evaluation/worker/score.py`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cfjax.core.errors import UserError
from cfjax.core.paths import one_line
from cfjax.evaluation.scorers import DEVICES, ScorerSettings

SCRIPT = Path(__file__).parent / "worker" / "score.py"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # unless they are set: weights come by path alone
LOG = "log.txt"  # what the package printed


class Outside:
    """The process; it starts with the first request.

    Args:
      settings: whose `python` it is, and in whose folder its log goes.
      environment: variables beside cfjax's own.
    """

    def __init__(self, settings: ScorerSettings, environment: Mapping[str, str] | None = None) -> None:
        if settings.device not in DEVICES:
            raise UserError(f"{settings.key('device')}={settings.device}: use cpu or cuda")
        self._settings, self._environment = settings, dict(environment or {})
        self._process: subprocess.Popen[str] | None = None
        self._log = settings.folder / LOG

    @property
    def python(self) -> str:
        """The interpreter."""
        return self._settings.python or sys.executable

    def ask(self, **request: Any) -> dict[str, Any]:
        """What it answers.

        Raises:
          UserError: it cannot be started, failed, or ended.
        """
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            code = process.wait()
            self.close()
            raise UserError(f"scorer {self._settings.name}: {self.python} ended with code {code}; {self._last_words()}")
        found = json.loads(reply)
        if "error" in found:
            reason = " ".join(found["error"].split())[:400]
            raise UserError(f"scorer {self._settings.name}: {reason}; all of it is in {self._log}")
        gives: dict[str, Any] = found["gives"]
        return gives

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            variables = {**OFFLINE, **os.environ, **self._environment}
            try:
                self._settings.folder.mkdir(parents=True, exist_ok=True)
                with self._log.open("w", encoding="utf-8") as log:
                    self._process = subprocess.Popen(
                        [self.python, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                        env=variables, encoding="utf-8",
                    )  # fmt: skip
            except OSError as error:
                raise UserError(
                    f"{self._settings.key('python')}={self.python}: cannot be run ({one_line(error)}); name the "
                    "interpreter of the environment that has the package, as ENV/bin/python"
                ) from None
        return self._process

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{self._log} ends with: {lines[-1][:300]}" if lines else f"{self._log} is empty"

    def versions(self, modules: Sequence[str], packages: Sequence[str], how: str, path: str = "") -> dict[str, str]:
        """The versions of packages there.

        Args:
          modules: that must be imported.  how: one gets them, for the message.  path: a folder to find them in.

        Raises:
          UserError: a module cannot be imported.
        """
        if path:
            others = self._environment.get("PYTHONPATH") or os.environ.get("PYTHONPATH", "")
            self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, (path, others)))
        try:
            found = self.ask(do="probe", modules=list(modules), packages=list(packages))
        finally:
            self.close()  # a scorer may not come to be: then nobody closes it
        if found["reason"]:
            reason = " ".join(found["reason"].split())[:200]
            raise UserError(
                f"scorer {self._settings.name}: {self.python} cannot import {reason}; {how}, and name its interpreter "
                f"by {self._settings.key('python')}=ENV/bin/python"
            )
        versions: dict[str, str] = found["versions"]
        return versions

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


def check_version(settings: ScorerSettings, package: str, found: str, pinned: str, accepted: str) -> None:
    """Raises UserError for another version than the one whose numbers are meant, unless the options accept it."""
    if found != (accepted or pinned):
        raise UserError(
            f"scorer {settings.name}: {package} {found or 'of no known version'} is installed, and {package} "
            f"{accepted or pinned} is meant; pip install {package}=={accepted or pinned}, or accept it with "
            f"{settings.key('options')}='version={found or 'VERSION'}'"
        )
