"""The lab's task as a user writes one: the run is that of the built-in task, bit for bit.

sodfast train task.name=python task.source=examples/arithmetic_task.py:Arithmetic
"""

import re

from sodfast.tasks.arithmetic import question_pools


class Arithmetic:
    def __init__(self, train=1024, test=64):
        pools = question_pools()
        self.train, self.test = pools[0][:train], pools[1][:test]

    def extract(self, response):
        match = re.search(r"=([0-9]+)\Z", response)
        return match and (match[1].lstrip("0") or "0")

    def score(self, question, response):
        return float(self.extract(response) == question.answer)

    def feedback(self, question, response):
        if not self.score(question, response):
            return question.columns["solution"].partition("=")[0] + "=|"
