# SPDX-License-Identifier: Apache-2.0
"""Warnings of one kind come once a run."""

import logging

from pyro_latentde.infer.warn_once import WarnOnce

log = logging.getLogger("pyro_latentde")


@WarnOnce()
def run(count):
    log.info("start")
    for row in range(count):
        log.warning("%d of %d rows have a non-finite gradient; their gradient is set to zero. Try a prior.", row, 9)
    log.warning("something else")


def messages(caplog, count):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="pyro_latentde"):
        run(count)
    return [record.getMessage() for record in caplog.records]


def test_the_first_comes_through_and_the_rest_is_counted(caplog):
    first, *others, last = messages(caplog, 5)
    assert first == "start" and others[1] == "something else" and len(others) == 2
    assert others[0].startswith("0 of 9 rows")
    assert last == "4 more warnings like '0 of 9 rows have a non-finite gradient; their gradient is set to [...]'"


def test_each_run_counts_anew_and_leaves_nothing_behind(caplog):
    assert messages(caplog, 1) == messages(caplog, 1) and len(messages(caplog, 1)) == 3
    assert not log.filters
