"""Tasks on executors: each result as it comes, errors as they are."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rsm_probe.errors import CostError
from rsm_probe.execution.executors import cluster, finished, one_thread, processes, threads, visible_gpus


def test_every_task_comes_once_with_its_result():
    with threads(3) as pool:
        found = dict(finished(pool, lambda task: task * task, range(2500)))
    assert found == {k: k * k for k in range(2500)}


def test_results_come_as_they_are_done():
    gate = threading.Event()

    def work(task):
        if task == 0:
            gate.wait(10)
        return task

    with threads(2) as pool:
        for task, _ in finished(pool, work, range(5)):
            if task == 4:  # all but the first are done
                gate.set()
        assert task == 0


def test_after_an_error_no_other_task_begins():
    begun = []

    def work(task):
        begun.append(task)
        time.sleep(0.005)
        if task == 3:
            raise KeyError("three")

    with pytest.raises(KeyError, match="three"), threads(1) as pool:
        list(finished(pool, work, range(500)))
    assert begun[:4] == [0, 1, 2, 3]
    assert len(begun) < 100


def test_whoever_stops_listening_stops_the_work():
    begun = []

    def task(number):
        time.sleep(0.002)  # or all are done before anybody stops listening
        begun.append(number)

    with ThreadPoolExecutor(1) as pool:
        results = finished(pool, task, range(500))
        next(results)
        results.close()
    assert len(begun) < 400


def test_one_thread_is_given_back():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_without_dask_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(CostError, match=r"pip install 'rsm-probe\[dask\]'"), cluster("tcp://127.0.0.1:1"):
        pass


# Processes, some of which die


def die_once(task):
    """Squares; the process of task 1 is killed the first time."""
    folder, number = task
    marker = Path(folder, str(number))
    if number == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def die(task):
    os.kill(os.getpid(), signal.SIGKILL)


def facts(task):
    return torch.get_num_threads(), os.environ.get("CUDA_VISIBLE_DEVICES"), signal.getsignal(signal.SIGINT)


@pytest.mark.slow
def test_work_goes_on_after_a_process_was_killed(tmp_path):
    tasks = [(str(tmp_path), number) for number in range(4)]
    with processes(1) as pool:
        results = dict(finished(pool, die_once, tasks))
        assert results == {task: task[1] ** 2 for task in tasks}
        assert [file.name for file in tmp_path.iterdir()] == ["1"]
        assert next(finished(pool, facts, [0])) == (0, (1, None, signal.SIG_IGN))


@pytest.mark.slow
def test_a_task_that_kills_every_process_ends_the_work():
    with processes(1) as pool, pytest.raises(CostError, match="a worker process died, perhaps because it ran out of"):
        list(finished(pool, die, range(2)))


@pytest.mark.slow
def test_an_executor_of_the_user_is_not_started_again(tmp_path):
    with ProcessPoolExecutor(1) as pool, pytest.raises(CostError, match="a worker process died"):
        list(finished(pool, die_once, [(str(tmp_path), number) for number in range(4)]))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_errors_of_tasks_come_from_processes_as_they_are():
    with processes(1, threads=2) as pool:
        assert next(finished(pool, facts, [0]))[1][0] == 2
        with pytest.raises(KeyError, match="three"):
            list(finished(pool, {1: 2}.__getitem__, ["three"]))


ORPHANS = """
import os, sys, time
from rsm_probe.execution.executors import processes
if __name__ == "__main__":
    with processes(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600)
        time.sleep(600)
"""


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    first = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    worker = int(first.stdout.readline())
    first.kill()
    first.wait()
    for _ in range(200):
        try:
            if "Z" in Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2]:
                return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("a worker outlived the process that started it")


@pytest.mark.parametrize(
    ("listed", "names"),
    [(None, ["0", "1"]), ("", ["0", "1"]), ("3, GPU-a", ["3", "GPU-a"]), ("3,4,5", ["3", "4"])],
)
def test_gpus_are_named_as_the_environment_names_them(listed, names):
    assert visible_gpus({} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}, 2) == names


@pytest.mark.parametrize("options", [{"count": 0}, {"count": 1.5}, {"count": 1, "threads": 0}])
def test_wrong_numbers_of_processes_are_refused(options):
    with pytest.raises(CostError, match=r"(processes|threads) must be"), processes(**options):
        pass
