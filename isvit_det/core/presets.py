"""Presets: the settings that each method starts from.

This is the only table of defaults that depend on the method or on the kind of
model. Every other default stands with its field in ``settings``.
"""
from typing import Any, Mapping, NamedTuple

# Learning rate and iterations of the paper's runs (section 4.1).
PAPER_LR = 4e-5
PAPER_ITERS = 1000
# Iterations in the paper from 6 bits up.
PAPER_ITERS_6_BITS = 200
# Released code of I&S-ViT: its grid of SULQ's shift, and its percentiles.
PAPER_SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.)
PAPER_PERCENTILES = (.999, .9999, .99999)
WIDE_PERCENTILES = (.95, .97, .98, .99, .995, .999, .9995, .9999, .99999)

KINDS = ('detector', 'classifier')


class Preset(NamedTuple):
    """Settings of a method that differ from the defaults of their fields.

    Attributes:
        quant: values of ``QuantConfig``.
        sos: values of ``SOSConfig``.
        classifier_sos: values of ``SOSConfig`` that replace those of ``sos``
            when the model is a classifier.
    """
    quant: Mapping[str, Any]
    sos: Mapping[str, Any]
    classifier_sos: Mapping[str, Any] = {}

    def sos_of(self, kind: str) -> Mapping[str, Any]:
        """Values of ``SOSConfig`` for a model of one of ``KINDS``."""
        more = self.classifier_sos if kind == 'classifier' else {}
        return {**self.sos, **more}


METHODS: Mapping[str, Preset] = {
    'minmax':
    Preset(
        quant=dict(
            softmax='uniform',
            percentiles=(1., ),
            activation_tables=(),
            channelwise=False),
        sos=dict(iters=0)),
    'repq':
    Preset(
        quant=dict(
            softmax='log_sqrt2',
            percentiles=PAPER_PERCENTILES,
            activation_tables=()),
        sos=dict(iters=0)),
    'isvit_paper':
    Preset(
        quant=dict(
            exponent='integer',
            shift_error='attention',
            percentiles=PAPER_PERCENTILES,
            activation_tables=()),
        sos=dict()),
    'isvit':
    Preset(
        quant=dict(),
        sos=dict(
            stage_one_inputs='quantized',
            closed_form_start=True,
            weigh_tokens=True,
            correct_heads=True,
            weigh_locations=True,
            proportional_lr=True,
            other_lr_ratio=3.,
            freeze_single_layers=True,
            roll_back=True,
            leave_out_padding=True),
        # The output of a classifier depends on few tokens of an image, that
        # of a detector on all of them. Rotations lower the error of a ViT's
        # attention, but not that of a Swin detector.
        classifier_sos=dict(mirror_images=True, rotate_heads=True)),
}


def optimises(method: str) -> bool:
    """Whether a method has iterations of reconstruction.

    >>> optimises('isvit_paper'), optimises('repq')
    (True, False)
    """
    return METHODS[method].sos.get('iters') != 0
