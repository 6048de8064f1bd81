"""Workers for tests: no processes, and deaths on demand; everything still crosses the wire."""

from __future__ import annotations

from omega_qvla.evaluation.execution import worker
from omega_qvla.evaluation.execution.executor import Death, Reply
from omega_qvla.evaluation.simulators.channel import LENGTHS, decode, encode


class WiredExecutor:
    """Each job is carried out when it is waited for, by a worker that knows its request alone.

    ``deadly`` says of each message whether the worker dies instead of sending it.
    """

    description = ""

    def __init__(self, deadly=lambda message: False, *, seeds_per_job=50):
        self.seeds_per_job = seeds_per_job
        self._deadly, self._jobs = deadly, []
        self._worker = worker.Worker()

    def start(self, number, job):
        self._jobs.append((number, self.request(job)))

    def request(self, job):
        return worker.request_of(job, threads=1)

    def wait(self, hear):
        number, request = self._jobs.pop(0)
        events = []

        def tell(message):
            if events and isinstance(events[-1], Death):
                return  # the dead say nothing
            if self._deadly(message):
                events.append(Death(number, "killed by signal 9"))
            else:
                events.append(Reply(number, through_the_wire(message)))

        self._worker.perform(through_the_wire(request), tell)
        for event in events:
            hear(event)

    def close(self):
        self._worker.close()


def through_the_wire(message):
    """What arrives at the other end."""
    data = encode(message)
    header, _ = LENGTHS.unpack_from(data)
    split = LENGTHS.size + header
    return decode(data[LENGTHS.size : split], bytearray(data[split:]))
