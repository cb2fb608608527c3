import time

import pytest

from merit.parallel import parallel


def test_an_error_in_one_thread_stops_the_others():
    done = []

    def work(take):
        while (job := take()) < 5000:
            if job == 3:
                raise KeyError(job)
            time.sleep(0.002)
            done.append(job)

    with pytest.raises(KeyError):
        parallel(work, 3)
    assert len(done) < 2500
    done.clear()
    parallel(lambda take: done.extend(iter(take, 3)), 1)
    assert done == [0, 1, 2]
