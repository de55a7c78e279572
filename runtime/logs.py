"""What a run leaves behind: metrics, times, samples, evaluations, settings, source. wandb is a
view.

metrics.jsonl holds what the seed determines and times.jsonl what the clock does, so that a resumed
run's metrics.jsonl equals the straight run's to the last byte.
"""

import json
import math
import netrc
import os
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

REPO = Path(__file__).resolve().parent.parent
WANDB_SECONDS = 30  # to reach its server; its own default is 90
# Of a run's source.
CHAPTERS = ("kernels", "sandbox", "tasks", "selfplay", "runtime", "bench", "recipes")


class RunLog:
    """Files of one run, written by rank 0 only (`enabled`)."""

    def __init__(self, folder, config, enabled=True, wandb_mode="auto", wandb_id=None):
        self.folder = Path(folder)
        self.enabled = enabled
        self.wandb = None
        self.wandb_id = wandb_id
        if not enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "source").exists():
            self._copy_source()
        self.files = {}
        for name in ("metrics.jsonl", "times.jsonl", "samples.jsonl"):
            self.files[name] = open(self.folder / name, "a", buffering=1)
        self._start_wandb(config, wandb_mode)

    def cut(self, samples, metrics):
        """Keep the rows up to these steps: a resumed run writes the later ones again."""
        if not self.enabled:
            return
        last = {"metrics.jsonl": metrics, "times.jsonl": metrics, "samples.jsonl": samples}
        for name, step in last.items():
            self.files[name].close()
            cut(self.folder / name, step)
            self.files[name] = open(self.folder / name, "a", buffering=1)

    def _copy_source(self):
        """The code that runs, so that a run can be read and repeated later."""
        target = self.folder / "source"
        ignore = shutil.ignore_patterns("__pycache__")
        for name in CHAPTERS:
            shutil.copytree(REPO / name, target / name, ignore=ignore, dirs_exist_ok=True)
        for path in REPO.glob("*.py"):
            shutil.copy(path, target / path.name)

    def _start_wandb(self, config, mode):
        """mode: auto (online with a key for wandb's host, else offline), online, offline, off.

        WANDB_MODE goes before it. Logging never ends a run: what cannot start online is offline.
        """
        if mode == "off":
            return
        try:
            import wandb
        except ImportError:
            say("wandb is not installed: metrics.jsonl has everything")
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        mode = os.environ.get("WANDB_MODE") or mode
        if mode == "auto":
            mode = "online" if has_wandb_key() else "offline"
        elif mode == "online" and not has_wandb_key():
            say("wandb has no key for its host (wandb login): the run is logged offline")
            mode = "offline"

        for attempt in dict.fromkeys([mode, "offline"]):
            try:
                self.wandb = wandb.init(
                    project="rarecode",
                    name=self.folder.name,
                    config=config,
                    dir=str(self.folder),
                    mode=attempt,
                    id=self.wandb_id,
                    resume="allow",
                    settings=wandb.Settings(init_timeout=WANDB_SECONDS),
                )
            except Exception as problem:  # a server that is not there, a refused key, a full disk
                say(f"wandb cannot start {attempt} ({first_line(problem)})")
            else:
                self.wandb_id = self.wandb.id
                return

    def _send(self, row, step):
        """Show a row in wandb; when that fails, the run goes on without it."""
        if not self.wandb:
            return
        try:
            self.wandb.log(row, step=step)
        except Exception as problem:
            say(f"wandb stopped ({first_line(problem)}): metrics.jsonl has everything")
            self.wandb = None

    def step(self, step, metrics, times):
        """One row of metrics and one of times. Raises OSError when the disk is full."""
        if not self.enabled:
            return
        self.files["metrics.jsonl"].write(json.dumps({"step": step, **clean(metrics)}) + "\n")
        self.files["times.jsonl"].write(json.dumps({"step": step, **clean(times)}) + "\n")
        self._send({**metrics, **times}, step)

    def samples(self, step, rows):
        """Rollouts to read: one JSON object a line, with the step."""
        if not self.enabled:
            return
        for row in rows:
            self.files["samples.jsonl"].write(json.dumps({"step": step, **clean(row)}) + "\n")

    def evaluation(self, step, rows, name="eval"):
        """Every judged program of an evaluation in the loop -> NAME/step_N.jsonl.

        name: eval, or validation for the problems that choose the best checkpoint.
        """
        if not self.enabled:
            return
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in rows]
        replace(folder / f"step_{step}.jsonl", "".join(lines))
        if self.wandb and rows and name == "eval":
            import wandb

            # Made anew each time, because wandb tables do not append (wandb issue 2981).
            columns = list(rows[0])
            data = [[str(row.get(column)) for column in columns] for row in rows[:16]]
            self._send({"eval/samples": wandb.Table(columns=columns, data=data)}, step)

    def close(self):
        if not self.enabled:
            return
        for file in self.files.values():
            file.close()
        if self.wandb:
            try:
                self.wandb.finish()
            except Exception as problem:
                say(f"wandb did not end well ({first_line(problem)})")


def has_wandb_key():
    """A key in the environment, or in the netrc file for the very host that wandb talks to."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):  # none, or one that cannot be read
        return False
    _, _, password = known.hosts.get(urlsplit(server).hostname, ("", "", ""))
    return bool(password)


def say(sentence):
    print(sentence, file=sys.stderr, flush=True)


def first_line(problem):
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def write_config(folder, config, rank):
    """config.json of a new run, on every machine, whether or not they share the folder.

    That is what --resume looks for.
    """
    path = folder / "config.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps(config, indent=2) + "\n", f".config.{rank}.tmp")


def add_start(folder, config, origin):
    """One line of starts.jsonl: what a new or resumed run was started with, and from where.

    origin: settings.Origin.
    """
    row = {"from": origin.sentence, "settings": config, "origins": origin.settings}
    with open(folder / "starts.jsonl", "a") as file:
        file.write(json.dumps(clean(row)) + "\n")


def replace(path, text, temporary=None):
    """Write a file whole or not at all."""
    temporary = path.with_name(temporary or f".{path.stem}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def cut(path, step):
    """Keep the rows up to `step`; a half-written last line (a killed run) goes too."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            break
    replace(path, "".join(kept))


def clean(row):
    """JSON has no nan: write null, so that any reader can parse every line."""
    found = dict(row)
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            found[name] = None
    return found
