"""The engine: finished shards stay finished, whatever happens to workers, disks and configurations."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dsm_train.corpus.config import EngineConfig, SlurmConfig
from dsm_train.corpus.engine import executors
from dsm_train.corpus.engine.engine import (
    StepError,
    Task,
    finished_shards,
    read_report,
    run_step,
    shard_tasks,
)
from dsm_train.corpus.engine.page import Page, read_pages, replacing, write_pages
from dsm_train.corpus.engine.progress import duration, progress_line

TWO = EngineConfig(workers=2)


@dataclass(frozen=True)
class Copy:
    """Copies shards, and keeps a diary of it; `trouble` happens at shard 3 while the file of that name exists."""

    diary: Path
    trouble: str = ""
    seconds: float = 0.0
    workers: int = field(default=0, compare=False)

    def __call__(self, task: Task) -> Mapping[str, int]:
        with open(self.diary, "a") as diary:
            diary.write(f"{task.index} {os.getpid()}\n")
        time.sleep(self.seconds)
        if task.index == 3 and self.trouble and (self.diary.parent / self.trouble).exists():
            if self.trouble == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "disk":
                with replacing(task.output) as path, open(path, "wb") as file:
                    file.write(bytes(1 << 20))
            raise ValueError("the page has no end")
        return {"pages": write_pages(task.output, read_pages(task.inputs[0]))}


def shards_of_pages(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{i:05d}.jsonl.gz" for i in range(count)]
    for i, path in enumerate(paths):
        write_pages(path, [Page(f"{i:08x}{j:08x}", f"http://a.org/{i}/{j}", "x" * j, "en", "") for j in range(i)])
    return paths


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.jsonl.gz")}


def entries(diary: Path) -> list[int]:
    return sorted(int(line.split()[0]) for line in diary.read_text().splitlines())


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    """Output of a run of 8 shards that nothing disturbs."""
    inputs, out = shards_of_pages(tmp_path / "in", 8), tmp_path / "undisturbed"
    run_step("copy", shard_tasks(inputs, out, TWO), Copy(tmp_path / "other-diary"), TWO, out)
    return content(out)


def test_counts_are_summed_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    inputs, out, diary = shards_of_pages(tmp_path / "in", 5), tmp_path / "out", tmp_path / "diary"
    tasks = shard_tasks(inputs, out, TWO)
    report = run_step("copy", tasks, Copy(diary), TWO, out)
    assert (report.step, report.shards, report.counts) == ("copy", 5, {"pages": 0 + 1 + 2 + 3 + 4})
    assert read_report(out) == report == run_step("copy", tasks, Copy(diary), TWO, out)
    assert entries(diary) == [0, 1, 2, 3, 4]
    assert [path.name for path in finished_shards(out)] == [path.name for path in inputs]
    (out / "00002.jsonl.gz").unlink()
    with pytest.raises(StepError, match=r"out' holds 4 of the 5 shards it was written with: delete the \.counts\.json"):
        finished_shards(out)


def test_a_step_of_no_shards_is_a_step(tmp_path: Path) -> None:
    assert run_step("copy", [], Copy(tmp_path / "diary"), TWO, tmp_path / "out").counts == {}


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("kill", r"^copy: a worker was killed; \d of 8 shards are finished and kept: run the same command again"),
        ("fail", r"^copy: 1 of 8 shards did not finish, such as 00003.jsonl.gz \(ValueError: the page has no end\)"),
    ],
)
def test_a_run_that_was_disturbed_goes_on_where_it_was(
    tmp_path: Path, undisturbed: dict[str, bytes], trouble: str, said: str
) -> None:
    out, diary = tmp_path / "out", tmp_path / "diary"
    tasks, work = shard_tasks(sorted((tmp_path / "in").iterdir()), out, TWO), Copy(diary, trouble)
    (tmp_path / trouble).touch()
    with pytest.raises(StepError, match=said):
        run_step("copy", tasks, work, TWO, out)
    finished = [int(path.name[:5]) for path in out.glob("*.counts.json")]
    assert finished and 3 not in finished and read_report(out) is None
    with pytest.raises(StepError, match=r"the step that writes '.*out' has not finished"):
        finished_shards(out)

    (tmp_path / trouble).unlink()
    diary.unlink()
    report = run_step("copy", tasks, work, TWO, out)
    assert entries(diary) == sorted(set(range(8)) - set(finished))  # none twice, none lost
    assert content(out) == undisturbed and report.counts == {"pages": 28}


def test_when_all_shards_fail_the_rest_is_not_tried(tmp_path: Path) -> None:
    inputs, out = [tmp_path / f"{i}.jsonl.gz" for i in range(100)], tmp_path / "out"
    with pytest.raises(
        StepError, match=r"100 of 100 shards did not finish, such as 00000.jsonl.gz \(FileNotFoundError"
    ):
        run_step("copy", shard_tasks(inputs, out, TWO), Copy(tmp_path / "diary"), TWO, out)
    assert 16 <= len(entries(tmp_path / "diary")) < 50


DRIVER = """
import sys, test_engine as t
from pathlib import Path
folder, trouble, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
if trouble == "disk":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
if __name__ == "__main__":
    tasks = t.shard_tasks(sorted((folder / "in").iterdir()), folder / "out", t.TWO)
    try:
        t.run_step("copy", tasks, t.Copy(folder / "diary", trouble, seconds), t.TWO, folder / "out")
    except t.StepError as error:
        sys.exit(str(error))
"""


def driver(tmp_path: Path, trouble: str = "", seconds: float = 0.0) -> subprocess.Popen[str]:
    """The same run as a process of its own, which can be killed and limited."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, str(script), str(tmp_path), trouble, str(seconds)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_until(condition: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def runs(process: int) -> bool:
    """True until a process has ended; a zombie, which init does not reap in some containers, has ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_killed_run_leaves_no_worker_behind_and_is_resumed(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out, diary = tmp_path / "out", tmp_path / "diary"
    process = driver(tmp_path, seconds=0.3)
    wait_until(lambda: len(list(out.glob("*.counts.json"))) >= 2)
    process.kill()
    process.wait()
    workers = {int(line.split()[1]) for line in diary.read_text().splitlines()}
    wait_until(lambda: not any(map(runs, workers)))
    finished = {int(path.name[:5]) for path in out.glob("*.counts.json")}

    diary.unlink()
    again = driver(tmp_path, seconds=0.3)
    assert again.communicate()[1].count("shards were finished before") == 1 and again.returncode == 0
    assert entries(diary) == sorted(set(range(8)) - finished)
    assert content(out) == undisturbed


def test_a_full_disk_is_one_line_and_what_was_written_stays(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    (tmp_path / "disk").touch()
    process = driver(tmp_path, trouble="disk")  # files of more than 512 KiB cannot be written
    errors = process.communicate()[1].splitlines()
    assert process.returncode == 1
    assert "copy: no space left to write in" in errors[-1] and "of 8 shards are finished and kept" in errors[-1]
    assert "Traceback" not in "".join(errors)
    # Another worker may have been stopped within a shard, whose next attempt takes its file's place.
    assert len(list((tmp_path / "out").glob("*.tmp"))) < TWO.workers
    (tmp_path / "disk").unlink()
    again = driver(tmp_path, trouble="disk")
    assert again.communicate() and again.returncode == 0
    assert content(tmp_path / "out") == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path):  # noqa: ANN201
    """A file system of 256 KiB, where the machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(tmp_path: Path, small_disk: Path) -> None:
    inputs = shards_of_pages(tmp_path / "in", 4)
    for path in inputs:  # 100 KiB each, which gzip makes no smaller
        write_pages(path, [Page("0", "u", os.urandom(75_000).hex(), "en", "")])
    out = small_disk / "out"
    with pytest.raises(StepError, match=r"no space left to write in .* \(No space left on device\); [12] of 4 shards"):
        run_step("copy", shard_tasks(inputs, out, TWO), Copy(tmp_path / "diary"), TWO, out)
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    run_step("copy", shard_tasks(inputs, out, TWO), Copy(tmp_path / "diary"), TWO, out)
    assert content(out) == content(tmp_path / "in")
    assert len(entries(tmp_path / "diary")) < 8  # the shards that were finished were not done again


def test_a_folder_belongs_to_its_configuration(tmp_path: Path) -> None:
    inputs, first, second = shards_of_pages(tmp_path / "in", 3), tmp_path / "first", tmp_path / "second"
    work = Copy(tmp_path / "diary")
    run_step("copy", shard_tasks(inputs, first, TWO), work, TWO, first)
    run_step("copy", shard_tasks(inputs, first, TWO), Copy(tmp_path / "diary", workers=9), TWO, first)
    other = Copy(tmp_path / "diary", trouble="none")
    with pytest.raises(StepError, match=r"another configuration \(trouble was '' and is 'none'\): choose another run"):
        run_step("copy", shard_tasks(inputs, first, TWO), other, TWO, first)
    with pytest.raises(StepError, match=r"another configuration \(inputs was"):
        run_step("copy", shard_tasks(inputs[:2], first, TWO), work, TWO, first)

    run_step("again", shard_tasks(finished_shards(first), second, TWO), work, TWO, second)
    shutil.rmtree(first)  # and made anew with another configuration, from which `second` was not made
    run_step("copy", shard_tasks(inputs, first, TWO), other, TWO, first)
    with pytest.raises(StepError, match=r"another configuration \(configuration of .*first was"):
        run_step("again", shard_tasks(finished_shards(first), second, TWO), work, TWO, second)


@pytest.mark.parametrize("name", ["step.json", "report.json", "00001.counts.json"])
def test_a_file_of_the_engine_that_was_cut_short_is_named(tmp_path: Path, name: str) -> None:
    inputs, out = shards_of_pages(tmp_path / "in", 2), tmp_path / "out"
    tasks, work = shard_tasks(inputs, out, TWO), Copy(tmp_path / "diary")
    report = run_step("copy", tasks, work, TWO, out)
    (out / name).write_text("")
    if "counts" in name:
        (out / "report.json").unlink()
    with pytest.raises(StepError, match=rf"out/{name} is not JSON .*: delete it and run the same command again"):
        run_step("copy", tasks, work, TWO, out)
    (out / name).unlink()
    assert run_step("copy", tasks, work, TWO, out).counts == report.counts


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StepError, match="another process works in"):
            run_step("copy", [], Copy(tmp_path / "diary"), TWO, tmp_path / "out")


SBATCH = """#!/bin/bash
for script; do :; done  # the last argument
cp "$script" {folder}/script; echo "$@" >> {folder}/submissions; touch {folder}/running
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
(for task in $(seq 0 $last); do
    SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here bash {folder}/script
done; rm {folder}/running) > {folder}/log 2>&1 &
echo Submitted batch job 4242
"""
COMMANDS = {
    "sbatch": SBATCH,
    "squeue": "#!/bin/bash\n[ -e {folder}/running ] && echo 4242 normal corpus R\nexit 0\n",
    "srun": '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/bash\necho localhost\n",
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands as scripts that run a job on this machine, element after element."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, script in COMMANDS.items():
        (folder / name).write_text(script.replace("{folder}", str(folder)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    monkeypatch.setattr(executors, "_SLURM_SECONDS", 0.2)
    return folder


def test_slurm_gets_a_job_array_and_the_same_shards_come_out(
    tmp_path: Path, undisturbed: dict[str, bytes], slurm: Path
) -> None:
    asked = SlurmConfig(partition="cpu", time="3:00:00", qos="low", tasks_per_job=3, max_array=100)
    config, out = EngineConfig(executor="slurm", workers=5, memory_gb=7, slurm=asked), tmp_path / "out"
    tasks, work = shard_tasks(sorted((tmp_path / "in").iterdir()), out, config), Copy(tmp_path / "diary", "fail")
    (tmp_path / "fail").touch()
    with pytest.raises(StepError, match=r"1 of 8 shards did not finish, such as 00003.jsonl.gz \(ValueError: the page"):
        run_step("copy", tasks, work, config, out)
    script = (slurm / "script").read_text()
    for line in ("partition=cpu", "time=3:00:00", "qos=low", "mem-per-cpu=7G", "array=0-2%5", "job-name=corpus-copy"):
        assert f"#SBATCH --{line}\n" in script
    assert f"export PATH={Path(sys.executable).parent}:$PATH" in script
    assert "launch_pickled_pipeline" in script and (slurm / "submissions").read_text().count("\n") == 1

    (tmp_path / "fail").unlink()
    run_step("copy", tasks, work, config, out)
    assert content(out) == undisturbed
    assert "#SBATCH --array=0-0%5\n" in (slurm / "script").read_text()  # what was left, in one element


def test_a_slurm_job_that_is_there_already_is_waited_for(tmp_path: Path, slurm: Path) -> None:
    config, out = EngineConfig(executor="slurm", slurm=SlurmConfig(partition="cpu")), tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    (out / "logs" / "job").write_text("4242")
    (slurm / "running").touch()
    ended = threading.Timer(0.5, (slurm / "running").unlink)
    ended.start()
    tasks = shard_tasks(shards_of_pages(tmp_path / "in", 2), out, config)
    with pytest.raises(
        StepError, match="2 of 2 shards did not finish.*it was killed.*engine.memory_gb"
    ):  # that job did nothing
        run_step("copy", tasks, Copy(tmp_path / "diary"), config, out)
    assert ended.finished.is_set() and not (slurm / "submissions").exists()


def test_what_is_not_installed_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    tasks = shard_tasks(shards_of_pages(tmp_path / "in", 1), tmp_path / "out", TWO)
    config = EngineConfig(executor="slurm", slurm=SlurmConfig(partition="cpu"))
    with pytest.raises(ValueError, match="engine.executor=slurm needs sbatch, which is not here"):
        run_step("copy", tasks, Copy(tmp_path / "diary"), config, tmp_path / "out")
    if importlib.util.find_spec("ray") is None:
        with pytest.raises(ValueError, match="engine.executor=ray needs Ray: pip install"):
            run_step("copy", tasks, Copy(tmp_path / "diary"), EngineConfig(executor="ray"), tmp_path / "out")
    with pytest.raises(ValueError, match="slurm.partition must be given"):
        EngineConfig(executor="slurm")


def test_progress_says_how_long_it_still_takes() -> None:
    assert (
        progress_line("x", 0, 4, 59.6, 400, 400)
        == "x: 0 of 4 shards, 1 min 0 s, time left unknown until a shard is finished"
    )
    assert progress_line("x", 3, 4, 30, 400, 300) == "x: 3 of 4 shards, 30 s, about 1 min 30 s left"
    assert progress_line("x", 4, 4, 7300, 400, 0) == "x: 4 of 4 shards, 2 h 1 min"
    assert [duration(s) for s in (0.4, 59, 61, 3600)] == ["0 s", "59 s", "1 min 1 s", "1 h 0 min"]


def test_a_folder_that_another_version_made_is_refused_with_the_remedy(tmp_path: Path) -> None:
    inputs, out, work = shards_of_pages(tmp_path / "in", 2), tmp_path / "out", Copy(tmp_path / "diary")
    run_step("copy", shard_tasks(inputs, out, TWO), work, TWO, out)
    claim = json.loads((out / "step.json").read_text())
    (out / "step.json").write_text(json.dumps(claim | {"work": "dsm_train.corpus.copy.Copy"}))
    with pytest.raises(
        StepError, match=r"another version of dsm-train \(work was .*\.Copy' and is 'Copy'\).* delete that"
    ):
        run_step("copy", shard_tasks(inputs, out, TWO), work, TWO, out)
