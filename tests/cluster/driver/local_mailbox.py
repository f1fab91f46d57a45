"""A learner's mailbox without Ray, which dies when it is told to."""

from gflowvlm.actors.event_loop import EventLoopThread
from gflowvlm.cluster.driver.learner_reports import LearnerMailbox

LIMIT_S = 30.0


class LostError(Exception):
    """The call went down with the mailbox."""


class LocalMailbox:
    """The real mailbox on an event loop of this process.

    Attributes:
        loses: How many of the next answers to reports are lost: the driver has the report, the learner sends it again.
    """

    def __init__(self):
        self.actor, self.loop = LearnerMailbox(), EventLoopThread("mailbox")
        self.loses = 0

    def report(self, report):
        while True:
            try:
                self.loop.run(self.actor.report(report), LIMIT_S)
            except LostError:
                continue
            if self.loses == 0:
                return
            self.loses -= 1

    def exchange(self, answers, timeout_s):
        return self.loop.run(self.actor.exchange(answers, timeout_s), LIMIT_S)

    def die(self):
        """Ends the mailbox with what it holds; another takes its place."""
        died, self.actor = self.actor, LearnerMailbox()
        self.loop.run(_fail(died), LIMIT_S)

    def close(self):
        self.loop.close()


async def _fail(actor):
    for _, answer in actor._waiting.values():
        answer.set_exception(LostError())
    actor._waiting.clear()
    actor._arrived.set()
