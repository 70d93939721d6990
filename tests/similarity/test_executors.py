"""Tasks on executors: each result as it comes, errors as they are."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rsm_probe.errors import CostError
from rsm_probe.execution.executors import cluster, finished, one_thread, threads


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
