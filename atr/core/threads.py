"""Work in threads ahead of its consumer, for functions that release the interpreter lock, such as codecs."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
__Result = TypeVar("__Result")


def map_ahead(
    function: Callable[[_Item], __Result], items: Iterable[_Item], threads: int
) -> Iterator[__Result]:
    """Like `map`, with `threads` items beyond the consumer's under way; with 0 threads it is `map`.

    Results come in the order of the items, and an error where its result would. At most `threads` results
    wait, so that memory is bounded; `items` is iterated in the consumer's thread.
    """
    if not threads:
        yield from map(function, items)
        return
    waiting: deque[Future[__Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
