"""A crew for tests: no processes, and deaths on demand; everything still crosses the wire."""

from __future__ import annotations

from omega_qvla.evaluation.execution import worker as work
from omega_qvla.evaluation.execution.executor import Death, Reply
from omega_qvla.evaluation.simulators.channel import LENGTHS, decode, encode


class InlineCrew:
    """A crew without processes: each job is carried out when it is asked about.

    ``deadly`` says of each message whether the worker dies instead of sending it.
    """

    def __init__(self, deadly=lambda message: False):
        self._deadly, self._jobs, self._events = deadly, [], []
        self._worker = work.Worker()

    def start(self, job, request):
        self._jobs.append((job, request))

    def wait(self):
        while not self._events:
            job, request = self._jobs.pop(0)
            self._worker.perform(through_the_wire(request), lambda m, job=job: self._tell(job, m))
        return self._events.pop(0)

    def close(self):
        self._worker.close()

    def _tell(self, job, message):
        if self._events and isinstance(self._events[-1], Death):
            return  # the dead say nothing
        dies = self._deadly(message)
        self._events.append(
            Death(job, "killed by signal 9") if dies else Reply(job, through_the_wire(message))
        )


def through_the_wire(message):
    """What arrives at the other end."""
    data = encode(message)
    header, _ = LENGTHS.unpack_from(data)
    split = LENGTHS.size + header
    return decode(data[LENGTHS.size : split], bytearray(data[split:]))
