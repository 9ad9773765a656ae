import threading

import torch

from fat_train.threads import torch_threads


def test_torch_computes_by_itself_in_these_threads_and_as_before_in_all_others() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        begun: list[int] = []
        pool = torch_threads(2, lambda: begun.append(threading.get_ident()))
        assert len(set(begun)) == 2
        assert {pool.submit(torch.get_num_threads).result() for _ in range(8)} == {1}
        assert torch.get_num_threads() == 3
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
        pool.shutdown()
    finally:
        torch.set_num_threads(before)
