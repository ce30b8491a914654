"""`map_ahead`: results in order, errors in their place, and a bounded number of results ahead."""

import threading

import pytest

from atr.core.threads import map_ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_the_order_of_the_items(threads):
    release = threading.Event()

    def square(item):
        if item == 0 and threads > 1:  # finishes after its successor
            release.wait(10)
        if item == 1:
            release.set()
        return item * item

    assert list(map_ahead(square, range(7), threads)) == [0, 1, 4, 9, 16, 25, 36]


@pytest.mark.parametrize("threads", [1, 3])
def test_work_is_done_ahead_in_other_threads_but_bounded(threads):
    started, workers = [], set()

    def record(item):
        workers.add(threading.get_ident())
        return item

    def items():
        for item in range(20):
            started.append(item)
            yield item

    results = map_ahead(record, items(), threads)
    assert next(results) == 0
    assert started == list(range(threads + 1))
    assert next(results) == 1 and len(started) == threads + 2
    results.close()
    assert threading.get_ident() not in workers and len(started) == threads + 2


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("error", [ValueError("image 2"), SystemExit(143)])
def test_an_error_comes_where_its_result_would(error, threads):
    def fail(item):
        if item == 2:
            raise error
        return item

    results = map_ahead(fail, range(5), threads)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(type(error)) as raised:
        next(results)
    assert raised.value is error


def test_no_thread_outlives_an_abandoned_iteration():
    before = threading.active_count()
    results = map_ahead(str, range(9), 3)
    next(results)
    assert threading.active_count() > before
    results.close()
    assert threading.active_count() == before
