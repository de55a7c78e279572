"""What a run leaves behind: metrics, times, samples, evaluations, settings, source. wandb is a
view.

metrics.jsonl holds what the seed determines and times.jsonl what the clock does, so that a resumed
run's metrics.jsonl equals the straight run's to the last byte.
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
CHAPTERS = ("kernels", "sandbox", "tasks", "selfplay", "runtime", "recipes")  # of a run's source


class RunLog:
    """Files of one run, written by rank 0 only (`enabled`)."""

    def __init__(
        self, folder, config, enabled=True, resume_step=None, wandb_mode="auto", wandb_id=None
    ):
        self.folder = Path(folder)
        self.enabled = enabled
        self.wandb = None
        self.wandb_id = wandb_id
        if not enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        names = ["metrics.jsonl", "times.jsonl", "samples.jsonl"]
        if resume_step is None:
            self._copy_source()
        else:
            for name in names:
                cut(self.folder / name, resume_step)
        self.files = {name: open(self.folder / name, "a", buffering=1) for name in names}
        self._start_wandb(config, wandb_mode)

    def _copy_source(self):
        """The code that runs, so that a run can be read and repeated later."""
        target = self.folder / "source"
        ignore = shutil.ignore_patterns("__pycache__")
        for name in CHAPTERS:
            shutil.copytree(REPO / name, target / name, ignore=ignore, dirs_exist_ok=True)
        for path in REPO.glob("*.py"):
            shutil.copy(path, target / path.name)

    def _start_wandb(self, config, mode):
        """mode: auto (online with a key, else offline), online, offline, off."""
        if mode == "off":
            return
        try:
            import wandb
        except ImportError:
            print(
                "wandb is not installed: metrics.jsonl has everything "
                "(pip install wandb to watch the run)",
                file=sys.stderr,
            )
            return
        if mode == "auto":
            has_key = os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").exists()
            mode = "online" if has_key else "offline"
        os.environ.setdefault("WANDB_SILENT", "true")
        self.wandb = wandb.init(
            project="rarecode",
            name=self.folder.name,
            config=config,
            dir=str(self.folder),
            mode=mode,
            id=self.wandb_id,
            resume="allow",
        )
        self.wandb_id = self.wandb.id

    def step(self, step, metrics, times):
        """One row of metrics and one of times. Raises OSError when the disk is full."""
        if not self.enabled:
            return
        self.files["metrics.jsonl"].write(json.dumps({"step": step, **clean(metrics)}) + "\n")
        self.files["times.jsonl"].write(json.dumps({"step": step, **clean(times)}) + "\n")
        if self.wandb:
            self.wandb.log({**metrics, **times}, step=step)

    def samples(self, step, rows):
        """Rollouts to read: one JSON object a line, with the step."""
        if not self.enabled:
            return
        for row in rows:
            self.files["samples.jsonl"].write(json.dumps({"step": step, **clean(row)}) + "\n")

    def evaluation(self, step, rows):
        """Every judged program of an evaluation in the loop -> eval/step_N.jsonl."""
        if not self.enabled:
            return
        folder = self.folder / "eval"
        folder.mkdir(exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in rows]
        replace(folder / f"step_{step}.jsonl", "".join(lines))
        if self.wandb and rows:
            self._log_table(step, rows[:16])

    def _log_table(self, step, rows):
        """Made anew each time, because wandb tables do not append (wandb issue 2981)."""
        import wandb

        columns = list(rows[0])
        data = [[str(row.get(column)) for column in columns] for row in rows]
        self.wandb.log({"eval/samples": wandb.Table(columns=columns, data=data)}, step=step)

    def close(self):
        if not self.enabled:
            return
        for file in self.files.values():
            file.close()
        if self.wandb:
            self.wandb.finish()


def write_config(folder, config, rank):
    """config.json of a new run, on every machine, whether or not they share the folder.

    That is what --resume looks for.
    """
    path = folder / "config.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps(config, indent=2) + "\n", f".config.{rank}.tmp")


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
