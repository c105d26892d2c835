"""Wavelet KD (Zhang et al., CVPR 2022): a small GAN whose fine detail follows that of a finished one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn, no_grad

from hpcdistill import losses
from hpcdistill.errors import UserError
from hpcdistill.methods.base import NO_TEACHERS, Batch, Carry, Part, Progress, Teachers, Terms
from hpcdistill.methods.cyclegan import cycle_terms
from hpcdistill.methods.gan_settings import FAMILIES, Direction
from hpcdistill.methods.pix2pix import paired_terms
from hpcdistill.methods.settings import role_key
from hpcdistill.methods.translation_gan import TranslationGAN
from hpcdistill.methods.wavelet_kd_settings import ROLES, WaveletKDConfig
from hpcdistill.models.image_generator import ImageGenerator


class WaveletKD(TranslationGAN):
    """L = the family's terms + lambda * [W(G(a), T_ab(a)) + W(F(b), T_ba(b))], W on Haar's detail bands alone.

    Student and discriminator are trained from new as an Original is; the low band is left to the family's terms. The
    teachers T are frozen, in eval mode, and asked once a step.
    """

    Config = WaveletKDConfig

    def __init__(self, config: WaveletKDConfig, teachers: Teachers = NO_TEACHERS) -> None:
        super().__init__(config, FAMILIES[config.family], "student", config.student, pool=config.pool)
        if config.family == "cyclegan":
            self.add_weights(cycle=config.weight_cycle, identity=config.weight_identity)
        else:
            self.add_weights(reconstruction=config.weight_reconstruction)
        self.add_weights(wavelet=config.weight_wavelet)
        if config.taught and self.crop % 2**config.levels:
            raise UserError(
                f"method.levels: {config.levels} levels of wavelets take crops that 2^{config.levels} divides, not "
                f"{self.crop}; use fewer levels or another data.crop"
            )
        self.teachers = nn.ModuleDict({one.name: self._teacher(one, teachers) for one in config.taught})

    def generator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms | Sequence[Part]:
        """The student's terms, all that there are."""
        if self.config.family == "cyclegan":
            return cycle_terms(self, batch, carry)
        return paired_terms(self, batch, carry)

    def image_terms(self, direction: Direction, batch: Batch, image: Tensor) -> Terms:
        """lambda * W of a translation and the teacher's of the same source, where there is a teacher."""
        if direction.name not in self.teachers:
            return {}
        with no_grad():
            taught = self.teachers[direction.name](batch[direction.source])
        distance = losses.wavelet(image, taught, self.config.levels, self.config.power)
        return {f"wavelet{direction.suffix}": self.weighted("wavelet", distance)}

    def _teacher(self, direction: Direction, teachers: Teachers) -> nn.Module:
        """The network in the direction's role; UserError for one that is missing, or translates no such images."""
        role = ROLES[direction.name]
        network = self.config.roles()[role].filled(role, teachers)
        if not isinstance(network, ImageGenerator) or (network.channels_in, network.channels_out) != (3, 3):
            raise UserError(
                f"{role_key(role)}: a {type(network).__name__} translates no images of three channels; name a "
                f"generator, {role_key(role)}.network says which of a run"
            )
        try:
            network.check_size(self.crop, self.crop)
        except UserError as error:
            raise UserError(f"{role_key(role)}: {error}") from None
        return network
