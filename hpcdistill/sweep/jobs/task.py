"""The names that submitit pickled into the jobs of sweeps up to December 2026: such a job may still be in the queue."""

from hpcdistill.sweep.task import Command as Command
from hpcdistill.sweep.task import Task as Task
