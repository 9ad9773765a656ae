"""Threads for work on many small tensors at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def torch_threads(count: int, begin: Callable[[], object] = int) -> ThreadPoolExecutor:
    """Start threads in which torch computes by itself, without threads of its own: they are what runs side by side.

    Args:
        count: threads.
        begin: called in each before anything else.
    """
    threads_of_caller = torch.get_num_threads()
    ready = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # or the thread's first use of torch would take the process's number after all
        torch.set_num_threads(1)
        begin()
        ready.wait()

    pool = ThreadPoolExecutor(count, "fat_train_torch", start)
    for _ in range(count):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads_of_caller)  # what `start` says holds for threads yet to come, too
    return pool
