"""Runs commands of Python in forks of a process that has imported the large libraries once, for many starts.

A fork has what a new process has: its own environment, working directory, arguments and `__main__`, and
all modules of this project still to import. Not for tests of what a start imports, or how long it takes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

STAGES = (
    "lightning.pytorch.loggers", "mlflow.tracking", "torch", "torchmetrics",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto",
    "transformers.models.clip.image_processing_pil_clip", "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama", "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
)  # fmt: skip
"""What stages import of other packages."""
DVC = (
    "dulwich.repo", "dvc.cachemgr", "dvc.cli.parser", "dvc.data_cloud", "dvc.dependency", "dvc.dvcfile",
    "dvc.fs", "dvc.lock", "dvc.output", "dvc.repo.experiments", "dvc.repo.index", "dvc.repo.reproduce",
    "dvc.scm", "dvc.stage", "dvc_data.index", "dvc_render.vega", "networkx", "pygit2", "rich.console",
    "scmrepo.git",
)  # fmt: skip
"""What commands of DVC import."""
_SERVER = """
import importlib, json, os, runpy, sys

for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        break
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
else:
    sys.exit()
os.chdir(asked["cwd"])
os.environ.clear()
os.environ.update(asked["env"])
for descriptor, path in enumerate((os.devnull, asked["stdout"], asked["stderr"])):
    os.dup2(os.open(path, os.O_RDWR), descriptor)
sys.stdin = open(0, closefd=False)
sys.path[:0] = ["", *filter(None, asked["env"].get("PYTHONPATH", "").split(os.pathsep))]
option, code, *arguments = asked["arguments"]
sys.argv = [option, *arguments]
if option == "-m":
    runpy.run_module(code, run_name="__main__", alter_sys=True)
else:
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
"""


class Warm:
    """Runs `python -m MODULE ...` and `python -c CODE ...`, one at a time, until it is closed."""

    def __init__(self, modules):
        self._modules, self._server = modules, None

    def run(self, *arguments, cwd=None, env=None):
        """The finished command, with its output as text; `env` is all of its environment."""
        server = self._started()
        with tempfile.TemporaryDirectory() as folder:
            said = [Path(folder, name) for name in ("stdout", "stderr")]
            for file in said:
                file.touch()
            asked = {
                "arguments": [str(argument) for argument in arguments],
                "cwd": str(cwd or Path.cwd()),
                "env": dict(os.environ if env is None else env),
                "stdout": str(said[0]),
                "stderr": str(said[1]),
            }
            server.stdin.write(f"{json.dumps(asked)}\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in said))

    def close(self):
        """End the process."""
        if self._server:
            self._server.stdin.close()
            self._server.wait()
            self._server.stdout.close()

    def _started(self):
        if self._server is None:
            # One thread: a fork has none of the others.
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            self._server = subprocess.Popen(
                [sys.executable, "-c", _SERVER, json.dumps(self._modules)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            assert self._server.stdout.readline() == "ready\n"
        return self._server
