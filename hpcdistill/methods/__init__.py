"""One file a method. A new method is a file here and a line in METHODS."""

from hpcdistill.methods.base import Method
from hpcdistill.methods.plain_sr import PlainSR
from hpcdistill.methods.privileged_student import PrivilegedStudent
from hpcdistill.methods.privileged_teacher import PrivilegedTeacherTraining

METHODS: dict[str, type[Method]] = {
    "plain_sr": PlainSR,
    "privileged_teacher": PrivilegedTeacherTraining,
    "privileged_student": PrivilegedStudent,
}
