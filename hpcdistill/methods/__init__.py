"""One file a method. A new method is a file here and a line in METHODS; docs/add-a-method.md."""

from hpcdistill.registry import Registry

# An entry is a `MethodConfig` or, where both stand in one file, the `Method` with its `Config`: see `config_class`.
METHODS = Registry(
    "method",
    {
        "plain_sr": "hpcdistill.methods.sr_settings:PlainSRConfig",
        "privileged_teacher": "hpcdistill.methods.sr_settings:PrivilegedTeacherConfig",
        "privileged_student": "hpcdistill.methods.sr_settings:PrivilegedStudentConfig",
        "output_distillation": "hpcdistill.methods.output_distillation:OutputDistillation",
        "cyclegan": "hpcdistill.methods.gan_settings:CycleGANConfig",
        "pix2pix": "hpcdistill.methods.gan_settings:Pix2PixConfig",
        "distilled_gan": "hpcdistill.methods.distillation_settings:DistilledGANConfig",
        "image_distillation": "hpcdistill.methods.image_distillation_settings:ImageDistillationConfig",
        "omgd": "hpcdistill.methods.omgd_settings:OMGDConfig",
        "wavelet_kd": "hpcdistill.methods.wavelet_kd_settings:WaveletKDConfig",
    },
    open=True,
)
