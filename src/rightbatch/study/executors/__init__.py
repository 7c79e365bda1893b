"""Where the trainings of a study run: in this process, in several, or on a Ray cluster."""

from rightbatch.study.executors.executor import Executor as Executor
from rightbatch.study.executors.executor import ExecutorName as ExecutorName
from rightbatch.study.executors.executor import Failure as Failure
from rightbatch.study.executors.executor import GroupTask as GroupTask
from rightbatch.study.executors.executor import Outcome as Outcome
from rightbatch.study.executors.make import make_executor as make_executor
