"""A run as one page: what it shows, that no model's text can break it, and that it opens."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from bench import report
from runs import SMALL, needs_prolog, run
from runtime.logs import add_start
from settings import parse_settings

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no headless browser: apt-get install chromium"
)
# Ends a script, opens others, and holds the template's own mark.
HOSTILE = (
    "</script><script>document.title = 'owned'</script>"
    "<img src=x onerror=\"document.title = 'owned'\"><!-- {{DATA}} \u2028 ' \" \\"
)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluated(id, corrects, **more):
    """Rows of one problem, a sample for each of `corrects`; None: not judged."""
    rows = []
    for sample, correct in enumerate(corrects):
        row = {"id": id, "sample": sample, "question": f"What is {id}?", "answer": "42"}
        row |= {"correct": correct is True, "status": "ok", "value": "42", "tokens": 9}
        if correct is None:
            row["status"] = "sandbox_error"
        row |= {"program": f"print({id!r})", "text": HOSTILE, "constant": False, "leaked": False}
        rows.append(row | more)
    return rows


def write_run(folder, steps=3, seed=0, lift=0.0):
    """A run folder of two evaluations, and samples of 2 a step, written by nobody's model."""
    settings, _, origin = parse_settings(
        ["--task", "sums", "--lr", "0.01", "--name", folder.name, "--seed", str(seed)], ""
    )
    folder.mkdir(parents=True)
    config = vars(settings)
    (folder / "config.json").write_text(json.dumps(config))
    add_start(folder, config, origin)
    metrics = []
    samples = []
    for step in range(1, steps + 1):
        rate = step / steps + lift
        row = {"step": step, "reward": rate, "reward_low": rate - 0.1, "reward_high": rate + 0.1}
        # The mean of three seeds' 0.99 is not quite 0.99: a chart of no height.
        metrics.append(row | {"completions/length_solved": None, "sandbox/ok_frac": 0.99})
        for number in range(2):
            samples.append(
                {"step": step, "problem": f"p{number}", "reward": 1.0, "status": "ok"}
                | {"advantage": 0.5, "value": "3", "text": HOSTILE}
            )
    write_rows(folder / "metrics.jsonl", metrics)
    write_rows(folder / "times.jsonl", [{"step": row["step"], "time/step": 2.0} for row in metrics])
    write_rows(folder / "samples.jsonl", samples)
    before = [
        *evaluated("a", [False] * 4),
        *evaluated("b", [True] * 4),
        *evaluated("c", [None] * 4),
    ]
    after = [
        *evaluated("a", [False, True, True, False]),
        *evaluated("b", [True, True, True, False], status="ok", constant=True),
        *evaluated("c", [True] * 4),
    ]
    write_rows(folder / "eval/step_0.jsonl", before)
    write_rows(folder / f"eval/step_{steps}.jsonl", after)
    write_rows(folder / "greedy/step_0.jsonl", evaluated("a", [False]) + evaluated("b", [True]))
    write_rows(
        folder / f"greedy/step_{steps}.jsonl", evaluated("a", [True]) + evaluated("b", [True])
    )
    return folder


class Page(HTMLParser):
    """Tags of a page as a browser would cut it, and the text of its scripts."""

    def __init__(self, path):
        super().__init__()
        self.tags = []
        self.scripts = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data

    def runs(self):
        return json.loads(self.scripts[0])["runs"]


def page_of(*folders):
    return Page(report.write_page(folders))


# ---- what it holds ----


def test_a_page_is_one_file_that_fetches_nothing(tmp_path):
    page = page_of(write_run(tmp_path / "a"))
    text = (tmp_path / "a/report.html").read_text()
    assert page.tags.count("script") == 2
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page.scripts[1] and "default-src 'none'" in text


def test_what_a_model_wrote_comes_through_and_ends_no_script(tmp_path):
    page = page_of(write_run(tmp_path / "a"))
    (data,) = page.runs()
    assert data["samples"][0]["text"] == HOSTILE
    assert data["problems"]["eval"]["rows"][0]["sides"][1]["text"] == HOSTILE
    assert "<" not in page.scripts[0] and page.scripts[0].isascii()
    half_a_character = "\ud800"
    assert json.loads(report.encode(half_a_character)) == half_a_character


def test_every_setting_says_where_it_comes_from(tmp_path):
    """--lr by the command line, steps by the recipe, loss the default, its clip by the loss."""
    (data,) = page_of(write_run(tmp_path / "a")).runs()
    assert data["settings"]["lr"] == 0.01
    assert data["origins"]["lr"] == "command line"
    assert data["origins"]["steps"] == "recipes/tiny.toml"
    assert data["origins"]["clip_high"] == "--loss dapo"
    assert "loss" not in data["origins"]
    assert "recipes/tiny.toml" in data["starts"][0]


def test_a_resumed_runs_settings_are_those_of_its_last_start(tmp_path):
    folder = write_run(tmp_path / "a")
    settings, _, origin = parse_settings(["--resume", str(folder), "--steps", "9"], "")
    add_start(folder, vars(settings), origin)
    (data,) = page_of(folder).runs()
    assert data["settings"]["steps"] == 9
    assert data["origins"]["steps"] == "command line"
    assert data["origins"]["lr"] == "command line"  # of the first start
    assert data["origins"]["prompts"] == "recipes/tiny.toml"
    assert len(data["starts"]) == 2


def test_what_an_older_version_started_has_no_made_up_origin(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "starts.jsonl").unlink()
    settings, _, origin = parse_settings(["--resume", str(folder), "--steps", "9"], "")
    add_start(folder, vars(settings), origin)
    (data,) = page_of(folder).runs()
    assert data["origins"]["lr"] == data["origins"]["loss"] == "an earlier start"
    assert data["origins"]["steps"] == "command line"


def test_curves_are_by_step_and_what_was_not_measured_is_not_0(tmp_path):
    (data,) = page_of(write_run(tmp_path / "a", steps=4)).runs()
    assert data["steps"] == [1, 2, 3, 4]
    assert data["curves"]["reward"] == [0.25, 0.5, 0.75, 1.0]
    assert data["curves"]["reward_low"] == [0.15, 0.4, 0.65, 0.9]
    assert data["curves"]["time/step"] == [2.0] * 4
    assert "completions/length_solved" not in data["curves"]


def test_evaluations_leave_out_what_was_not_judged(tmp_path):
    """At T 1 of a and b 0 and 4 of 4 before, 2 and 3 after: 0.5, then (0.5 + 0.75) / 2."""
    (data,) = page_of(write_run(tmp_path / "a")).runs()
    before, after = data["evaluations"]["eval"]
    assert (before["step"], after["step"]) == (0, 3)
    assert before["figures"]["pass@1"][0] == 0.5
    assert before["figures"]["pass@4"][0] == 0.5
    assert after["figures"]["pass@1"][0] == pytest.approx((0.5 + 0.75 + 1) / 3)
    assert [row["figures"]["pass@1"][0] for row in data["evaluations"]["greedy"]] == [0.5, 1.0]
    figures = [change["figure"] for change in data["changes"]]
    assert figures == ["pass@1 greedy", "pass@1 at temperature 1", "pass@4 at temperature 1"]


def test_the_table_compares_the_first_evaluation_with_the_last(tmp_path):
    """Steps 0, 2, 10: figures of all three, and 10 comes after 2."""
    folder = write_run(tmp_path / "a", steps=10)
    write_rows(folder / "eval/step_2.jsonl", evaluated("a", [True] * 4))
    (data,) = page_of(folder).runs()
    assert [row["step"] for row in data["evaluations"]["eval"]] == [0, 2, 10]
    assert data["changes"][1]["steps"] == data["problems"]["eval"]["steps"] == [0, 10]
    assert data["changes"][1]["after"][0] == pytest.approx((0.5 + 0.75 + 1) / 3)


def test_problems_stand_side_by_side(tmp_path):
    (data,) = page_of(write_run(tmp_path / "a")).runs()
    gained, lost, unknown = data["problems"]["eval"]["rows"]
    assert (gained["id"], gained["change"]) == ("a", 1)
    assert [side["verdict"] for side in gained["sides"]] == ["wrong", "right"]  # its sample 1
    assert [side["right"] for side in gained["sides"]] == [0, 2]
    assert (lost["change"], lost["sides"][1]["constant"]) == (-1, True)
    assert unknown["change"] == 0  # nobody judged it before
    assert unknown["sides"][0]["verdict"] == "sandbox_error"


def test_seeds_of_the_same_settings_are_one_group(tmp_path):
    """a, b differ in seed and name alone, c in its learning rate."""
    folders = [write_run(tmp_path / name, seed=n) for n, name in enumerate("abc")]
    starts = folders[2] / "starts.jsonl"
    starts.write_text(starts.read_text().replace('"lr": 0.01', '"lr": 0.02'))
    runs = page_of(*folders, folders[0]).runs()
    assert [run["group"] for run in runs] == [0, 0, 1]  # a folder counts once
    assert (folders[0] / "report.html").exists() and not (folders[1] / "report.html").exists()


# ---- what is missing or broken ----


def test_a_folder_without_a_run_is_refused_in_a_sentence(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(SystemExit, match="is not a run folder"):
            report.main([str(folder)])


def test_half_a_line_and_foreign_lines_are_counted(tmp_path):
    folder = write_run(tmp_path / "a")
    broken = '[]\n{"step": "1"}\n{"step": 9, "rew'
    for name in ("metrics.jsonl", "times.jsonl", "samples.jsonl"):
        with open(folder / name, "a") as file:
            file.write(broken)
    (folder / "eval/step_3.jsonl").write_bytes(b'\xff\xfe\n{"id": 1}\n')
    (data,) = page_of(folder).runs()
    assert "lines of metrics.jsonl that cannot be read: 3" in data["notes"]
    assert "lines of step_3.jsonl that cannot be read: 2" in data["notes"]
    assert data["steps"] == [1, 2, 3]
    assert [row["step"] for row in data["evaluations"]["eval"]] == [0]


@pytest.mark.parametrize(
    "name", ["config.json", "starts.jsonl", "metrics.jsonl", "times.jsonl", "samples.jsonl", "eval"]
)
def test_any_file_may_be_missing(tmp_path, name):
    folder = write_run(tmp_path / "a")
    if name == "eval":
        shutil.rmtree(folder / name)
    else:
        (folder / name).unlink()
    (data,) = page_of(folder).runs()
    if name.endswith("s.jsonl") and name != "starts.jsonl":
        assert f"{name} is missing" in data["notes"]


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text('{"steps": ')
    (data,) = page_of(folder).runs()
    assert data["steps"] == data["samples"] == data["changes"] == []
    assert any("config.json" in note for note in data["notes"])


# ---- how large ----


def test_a_long_runs_page_stays_small_and_says_what_is_left_out(tmp_path):
    """3,000 steps of 30 metrics, 24,000 samples of 2,000 characters, 1,000 problems: 60 MB."""
    folder = write_run(tmp_path / "a")
    names = [f"metric/{number}" for number in range(30)]
    rows = [{"step": step} | dict.fromkeys(names, step / 7) for step in range(1, 3001)]
    write_rows(folder / "metrics.jsonl", rows)
    sample = {"status": "ok", "text": "<x" * 1000, "reward": 1, "advantage": 0, "problem": "p"}
    write_rows(
        folder / "samples.jsonl", [sample | {"step": step // 8 + 1} for step in range(24_000)]
    )
    for step in (0, 3):
        found = []
        for number in range(1000):
            right = number == 999 and step == 3
            found += evaluated(f"p{number}", [right], text="y" * 50_000)
        write_rows(folder / f"eval/step_{step}.jsonl", found)
    (data,) = page_of(folder).runs()
    assert (folder / "report.html").stat().st_size < report.MOST_BYTES

    # 3,000 steps in parts of 8: 375 points, the last of the mean of steps 2,993 to 3,000.
    assert len(data["curves"]["metric/0"]) == 375
    assert data["curves"]["metric/0"][-1] == pytest.approx(2996.5 / 7, rel=1e-4)
    steps = sorted({row["step"] for row in data["samples"]})
    assert steps[-1] == 3000 and len(steps) > 20
    assert len(data["samples"]) == 8 * len(steps)  # whole steps
    assert data["problems"]["eval"]["rows"][-1]["id"] == "p999"  # the gained one is kept
    said = " ".join(data["notes"])
    assert "mean of 8 steps" in said and "of 3000 steps" in said and "of 1000 are shown" in said
    text = data["problems"]["eval"]["rows"][0]["sides"][0]["text"]
    assert "[... 46000 characters left out ...]" in text


# ---- in a browser ----


def dump(path, choices, tmp_path):
    """(DOM after the scripts, what the console says) of the page with choices behind its "#"."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        + [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=2000", "--dump-dom"]
        + [f"file://{path}#{choices}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console


@needs_browser
def test_the_page_opens_in_a_browser_and_its_filters_work(tmp_path):
    """Of three problems one is gained; what a model wrote is text, and has not run."""
    path = report.write_page([write_run(tmp_path / name, seed=n) for n, name in enumerate("abc")])
    whole, console = dump(path, "kind=eval", tmp_path)
    assert console == []
    assert '<p id="fault"></p>' in whole
    assert whole.count('class="problem"') == 3
    assert "<title>rarecode: " in whole and "owned</title>" not in whole
    assert "&lt;/script&gt;&lt;script&gt;document.title" in whole
    assert "<img" not in whole
    assert whole.count("<svg") > 4

    gained, console = dump(path, "kind=eval&show=gained&seeds=together&theme=dark", tmp_path)
    assert console == []
    assert gained.count('class="problem"') == 1 and "1 of 3 problems" in gained
    assert 'data-theme="dark"' in gained
    constant, _ = dump(path, "kind=eval&mark=constant", tmp_path)
    assert constant.count('class="problem"') == 1
    step, _ = dump(path, "step=2", tmp_path)
    assert step.count('class="sample"') == 2


@needs_browser
@pytest.mark.slow
def test_a_run_that_has_just_begun_opens_in_a_browser(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    whole, console = dump(report.write_page([folder]), "", tmp_path)
    assert console == [] and '<p id="fault"></p>' in whole
    assert "There are no samples." in whole


# ---- at the end of a run ----


@needs_prolog
def test_a_run_ends_with_its_page_and_its_greedy_samples_beside_the_others(tmp_path):
    """Two samples at temperature 1 and a greedy one of each of four problems, before and after."""
    both = "--eval_greedy true --eval_temperature 1 --eval_samples 2 --steps 1".split()
    done = run(tmp_path, *SMALL, *both, "--name", "one")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs/one"
    last = done.stdout.strip().splitlines()[-1]
    assert last.endswith("The run as a page: runs/one/report.html")
    assert "greedy/pass@1" in done.stdout

    (data,) = Page(folder / "report.html").runs()
    assert len(data["problems"]["greedy"]["rows"]) == 4
    figures = [change["figure"] for change in data["changes"]]
    assert figures == ["pass@1 greedy", "pass@1 at temperature 1", "pass@2 at temperature 1"]
    for kind, count in (("greedy", 4), ("eval", 8)):
        for step in (0, 1):
            rows = (folder / kind / f"step_{step}.jsonl").read_text().splitlines()
            assert len(rows) == count
    (row,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert {"eval/pass@1", "eval/pass@2", "eval/greedy/pass@1"} <= set(row)
    assert (folder / "source/bench/report.html").exists()
