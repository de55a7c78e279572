"""What a run leaves, and wandb, which never ends a run: its mode, its key, a server that is gone."""

import json

import pytest

from runs import rows
from runtime import logs
from runtime.logs import RunLog

KEY = "0" * 40


@pytest.fixture(autouse=True)
def no_key(tmp_path, monkeypatch):
    """A machine without a wandb key, and a netrc file to write."""
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def mode_of(log):
    mode = log.wandb.settings.mode if log.wandb else None
    log.close()
    return mode


@pytest.mark.parametrize(
    "netrc,has_key",
    [
        (None, False),
        ("machine api.wandb.ai login user password k\n", True),
        ("machine code.example.org login user password k\n", False),  # a key for another host
        ("default login user password k\n", False),
        ("machine api.wandb.ai login\n", False),  # cannot be read
    ],
)
def test_a_key_counts_only_for_wandbs_host(tmp_path, netrc, has_key):
    if netrc is not None:
        (tmp_path / "netrc").write_text(netrc)
    assert logs.has_wandb_key() == has_key


def test_a_key_for_ones_own_server_counts_there(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password k\n")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert logs.has_wandb_key()


@pytest.mark.parametrize("environment", ["offline", "disabled"])
def test_the_environment_goes_before_a_key(tmp_path, monkeypatch, environment):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", environment)
    assert mode_of(RunLog(tmp_path, {})) == environment


def test_without_a_key_a_run_is_offline_also_when_online_was_asked_for(tmp_path, capsys):
    assert mode_of(RunLog(tmp_path / "a", {})) == "offline"
    assert mode_of(RunLog(tmp_path / "b", {}, wandb_mode="online")) == "offline"
    assert "no key" in capsys.readouterr().err


def test_a_server_that_is_not_there_ends_in_an_offline_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logs, "WANDB_SECONDS", 2)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    log = RunLog(tmp_path, {})
    log.step(1, {"reward": 0.5}, {})
    assert mode_of(log) == "offline"
    assert rows(tmp_path) == [{"step": 1, "reward": 0.5}]
    assert "cannot start online" in capsys.readouterr().err


def test_a_wandb_that_fails_on_the_way_is_said_and_left(tmp_path, capsys):
    log = RunLog(tmp_path, {}, wandb_mode="offline")
    wandb_run = log.wandb

    class Broken:
        def log(self, *arguments, **options):
            raise ConnectionError("the server has gone")

    log.wandb = Broken()
    log.step(1, {"reward": 0.5}, {})
    log.step(2, {"reward": 0.6}, {})
    log.close()
    wandb_run.finish()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert capsys.readouterr().err.count("the server has gone") == 1


def test_a_resumed_run_writes_the_later_rows_again(tmp_path):
    log = RunLog(tmp_path, {}, wandb_mode="off")
    for step in (1, 2, 3):
        log.step(step, {"reward": step / 4}, {"time/step": 1.0})
        log.samples(step, [{"text": "t"}])
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')  # a kill in the middle of a write

    log = RunLog(tmp_path, {}, wandb_mode="off")
    log.cut(samples=2, metrics=1)
    log.step(2, {"reward": 9.0}, {"time/step": 2.0})
    log.close()
    assert [row["reward"] for row in rows(tmp_path)] == [0.25, 9.0]
    assert [row["step"] for row in rows(tmp_path, "samples.jsonl")] == [1, 2]


def test_wandb_continues_under_the_same_id_and_its_keys_do_not_grow(tmp_path):
    """The real wandb, offline: what it would send is read back from its own files."""
    log = RunLog(tmp_path, {"seed": 0}, wandb_mode="offline")
    for step in (1, 2):
        log.step(step, {"reward": step / 4}, {"time/step": 1.0})
        log.evaluation(step, [{"id": "p", "correct": True, "text": "t"}])
    first = log.wandb_id
    log.close()
    log = RunLog(tmp_path, {"seed": 0}, wandb_mode="offline", wandb_id=first)
    log.step(3, {"reward": 0.75}, {"time/step": 1.0})
    keys = set(log.wandb.summary.keys())
    log.close()

    folders = (tmp_path / "wandb").glob("offline-run-*")
    # offline-run-TIME-ID, with -1 when both began in one second.
    assert {folder.name.split("-")[3] for folder in folders} == {first} == {log.wandb_id}
    assert not any(character.isdigit() for key in keys for character in key)
    tables = list((tmp_path / "wandb").rglob("*.table.json"))
    assert tables
    assert all(len(json.loads(table.read_text())["data"]) == 1 for table in tables)
