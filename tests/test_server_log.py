"""The server's log: one JSON object per line, whoever speaks, and few lines of a kind."""

import gc
import io
import json
import logging
import sys
import threading
import warnings
from collections import Counter

from neuron_minimax.serving.log import (
    INTERVAL,
    REQUESTS_PER_INTERVAL,
    WARNINGS_PER_INTERVAL,
    LimitedHandler,
    json_log,
)


def read(stream):
    return [json.loads(line) for line in stream.getvalue().split("\n")[:-1]]


class Unlucky:
    def __del__(self):
        raise OSError("lost in a finalizer")


def fail():
    raise KeyError("lost in a thread")


def test_everybody_speaks_json_while_the_log_is_on_and_as_before_afterwards(monkeypatch):
    gc.collect()  # what other tests have left would warn below
    before = io.StringIO()
    monkeypatch.setattr(sys, "stderr", before)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    library = logging.getLogger("a.library")
    library.propagate = False
    library.addHandler(logging.StreamHandler())
    stream = io.StringIO()
    with json_log(stream), warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.getLogger("asyncio").error("two\nlines \x1b[31m \u2028 \udc80")
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
        logging.getLogger("uvicorn.error").info("not worth a line")
        logging.getLogger("neuron_minimax.serving").info("worth one")
        library.error("from a handler of its own")
        warnings.warn("look out", stacklevel=1)
        print("printed", "twice", sep="\n", file=sys.stderr)
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        Unlucky()
        gc.collect()
    lines = read(stream)
    assert stream.getvalue().isascii()
    assert before.getvalue() == ""
    text = [line["event"] + line.get("traceback", "") for line in lines]
    wanted = (
        "two\nlines \x1b[31m \u2028 \udc80",
        "Invalid HTTP",
        "worth one",
        "from a handler of its own",
        "look out",
        "printed",
        "twice",
        "lost in a thread",
        "lost in a finalizer",
    )
    for found, words in zip(text, wanted, strict=True):
        assert words in found
    library.error("afterwards")
    print("plain", file=sys.stderr)
    assert before.getvalue() == "afterwards\nplain\n"


def test_lines_beyond_the_limit_of_their_kind_are_counted_and_none_is_lost_in_the_counts():
    now = [1000.0]
    stream = io.StringIO()
    handler = LimitedHandler(stream, clock=lambda: now[0])
    logger = logging.Logger("flood")
    logger.addHandler(handler)
    for _ in range(3):
        for number in range(500):
            logger.info("request", extra={"fields": {"status": 401}})
            logger.warning("trouble %d", number)
            if number < 20:
                logger.info("request", extra={"fields": {"status": 200}})
        now[0] += INTERVAL
    handler.close()
    written = Counter()
    left_out = Counter()
    for line in read(stream):
        if "left_out" in line:
            left_out[line["like"], line["status"]] += line["left_out"]
        else:
            written[line["event"].split()[0], line.get("status")] += 1
    assert written == {
        ("request", 401): 3 * REQUESTS_PER_INTERVAL,
        ("request", 200): 3 * 20,  # a flood of others hides none of these
        ("trouble", None): 3 * WARNINGS_PER_INTERVAL,
    }
    assert left_out == {
        ("request", 401): 3 * (500 - REQUESTS_PER_INTERVAL),
        ("trouble %d", None): 3 * (500 - WARNINGS_PER_INTERVAL),
    }
