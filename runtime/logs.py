"""What a run leaves behind: metrics.jsonl, times.jsonl, samples.jsonl, eval/, config.json, source/; wandb is a view of them.

metrics.jsonl holds what the seed determines and times.jsonl what the clock does, so that a resumed run's metrics.jsonl equals
the straight run's to the last byte.
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
CODE = (
    "kernels",
    "sandbox",
    "tasks",
    "selfplay",
    "runtime",
    "recipes",
)  # folders of a run's source


def clean(row):
    """JSON has no nan: write null, so that any reader can parse every line."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _cut(path, step):
    """Keep the rows up to `step`; a half-written last line (a killed run) goes too."""
    rows = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                rows.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            break
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(rows))
    os.replace(temporary, path)


def write_config(folder, config, rank):
    """config.json of a new run, on every machine (that is what --resume looks for), whether or not they share the folder."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".config.{rank}.tmp"
        temporary.write_text(json.dumps(config, indent=2) + "\n")
        os.replace(temporary, folder / "config.json")


class RunLog:
    """Files of one run, written by rank 0 only (`enabled`)."""

    def __init__(
        self, folder, config, enabled=True, resume_step=None, wandb_mode="auto", wandb_id=None
    ):
        self.folder, self.enabled, self.wandb, self.wandb_id = Path(folder), enabled, None, wandb_id
        if not enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        names = ["metrics.jsonl", "times.jsonl", "samples.jsonl"]
        if resume_step is None:
            self._copy_source()
        else:
            for name in names:
                _cut(self.folder / name, resume_step)
        self.files = {name: open(self.folder / name, "a", buffering=1) for name in names}
        self._start_wandb(config, wandb_mode)

    def _copy_source(self):
        """The code that runs, so that a run can be read and repeated later."""
        target = self.folder / "source"
        ignore = shutil.ignore_patterns("__pycache__")
        for name in CODE:
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
                "wandb is not installed: metrics.jsonl has everything (pip install wandb to watch the run)",
                file=sys.stderr,
            )
            return
        if mode == "auto":
            mode = (
                "online"
                if os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").exists()
                else "offline"
            )
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
        for row in rows if self.enabled else []:
            self.files["samples.jsonl"].write(json.dumps({"step": step, **clean(row)}) + "\n")

    def evaluation(self, step, rows):
        """Every judged program of an in-loop evaluation -> eval/step_N.jsonl; the first 16 as a wandb table, rebuilt each time
        because wandb tables do not append (wandb issue 2981)."""
        if not self.enabled:
            return
        folder = self.folder / "eval"
        folder.mkdir(exist_ok=True)
        temporary = folder / f".step_{step}.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, folder / f"step_{step}.jsonl")
        if self.wandb and rows:
            import wandb

            columns = list(rows[0])
            self.wandb.log(
                {
                    "eval/samples": wandb.Table(
                        columns=columns, data=[[str(r.get(c)) for c in columns] for r in rows[:16]]
                    )
                },
                step=step,
            )

    def close(self):
        if self.enabled:
            for f in self.files.values():
                f.close()
            if self.wandb:
                self.wandb.finish()
