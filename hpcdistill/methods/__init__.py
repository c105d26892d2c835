"""One file a method. A new method is a file here and a line in METHODS."""

from hpcdistill.methods.base import Method
from hpcdistill.methods.cyclegan import CycleGAN
from hpcdistill.methods.distilled_gan import DistilledGAN
from hpcdistill.methods.pix2pix import Pix2Pix
from hpcdistill.methods.plain_sr import PlainSR
from hpcdistill.methods.privileged_student import PrivilegedStudent
from hpcdistill.methods.privileged_teacher import PrivilegedTeacherTraining

METHODS: dict[str, type[Method]] = {
    "plain_sr": PlainSR,
    "privileged_teacher": PrivilegedTeacherTraining,
    "privileged_student": PrivilegedStudent,
    "cyclegan": CycleGAN,
    "pix2pix": Pix2Pix,
    "distilled_gan": DistilledGAN,
}
