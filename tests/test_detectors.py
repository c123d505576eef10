"""Every detector of MMDetection with a Swin backbone, in both scopes."""
import importlib.util
from pathlib import Path

import pytest
from mmdet.models.layers.transformer.grounding_dino_layers import \
    GroundingDinoTransformerDecoder
from mmdet.models.layers.transformer.utils import MLP
from mmengine.config import config
from yapf.yapflib import yapf_api

from benchmarks.detectors import HEADER, Trials, table
from benchmarks.small import swin_configs, write_language_model
from isvit_det.engine.configs import load_config

DOCS = Path(__file__).parents[1] / 'docs/detectors.md'
has_transformers = importlib.util.find_spec('transformers') is not None
needs_transformers = pytest.mark.skipif(
    not has_transformers, reason='the package transformers is not installed')
VIDEO = ('mask2former_vis/'
         'mask2former_swin-l-p4-w12-384-in21k_8xb2-8e_youtubevis2021')
# Detectors of each kind that are quick, and the scopes they are tried in.
FEW = (
    ('dyhead/atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco', 'detector'),
    ('mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco-panoptic',
     'detector'),
    ('rtmdet/rtmdet_l_swin_b_p6_4xb16-100e_coco', 'backbone'),
    ('v3det/dino-4scale_swin_16xb1_sample1e-3_v3det_36e', 'detector'),
)
READING = (
    'glip/glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365',
    'grounding_dino/lvis/grounding_dino_swin-t_pretrain_zeroshot_lvis',
    'mm_grounding_dino/grounding_dino_swin-t_pretrain_obj365',
)


@pytest.fixture(scope='module', autouse=True)
def offline():
    """Nothing is downloaded, and configs are written without formatting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_HUB_OFFLINE', '1')
        for module in (yapf_api, config):
            patch.setattr(
                module,
                'FormatCode',
                lambda text, **_: (text, True),
                raising=False)
        yield


@pytest.fixture(scope='module')
def trials(tmp_path_factory):
    words = tmp_path_factory.mktemp('words')
    if has_transformers:
        write_language_model(str(words))
    return Trials(str(words))


def read(name):
    return load_config(f'mmdet::{name}.py', None)


@pytest.fixture
def fitting_decoder(monkeypatch):
    """Grounding DINO's decoder of as many inputs as its encodings have.

    Some releases of MMDetection have half of them, and cannot predict.
    """
    make = GroundingDinoTransformerDecoder._init_layers

    def fit(self):
        make(self)
        coordinates = 4 if _encodes_wide() else 2
        self.ref_point_head = MLP(self.embed_dims * coordinates,
                                  self.embed_dims, self.embed_dims, 2)

    monkeypatch.setattr(GroundingDinoTransformerDecoder, '_init_layers', fit)


def _encodes_wide():
    parent = GroundingDinoTransformerDecoder.__mro__[1]
    text = Path(importlib.util.find_spec(parent.__module__).origin).read_text()
    return 'num_feats=query.shape[2]' in text


@pytest.mark.parametrize('name, scope', FEW)
def test_a_detector_predicts_the_same_when_loaded(trials, name, scope):
    trial = trials.of(read(name), scope)
    assert trial.refusal == '' and trial.same and trial.num_found > 0


@needs_transformers
@pytest.mark.parametrize('name', READING)
def test_a_detector_that_reads_text_is_quantized_around_its_language_model(
        trials, fitting_decoder, name):
    trial = trials.of(read(name), 'detector')
    assert trial.refusal == '' and trial.same and trial.num_found > 0
    assert trial.in_float['BertModel'] == 1


def test_a_detector_of_videos_is_refused(trials):
    trial = trials.of(read(VIDEO), 'detector')
    assert 'Mask2FormerVideo' in trial.refusal and 'videos' in trial.refusal


@needs_transformers
@pytest.mark.slow
def test_the_table_of_all_is_as_it_says(trials):
    configs = swin_configs()
    assert len(configs) >= 80
    found = table(trials, configs)
    assert 'predict something else' not in found
    assert DOCS.read_text() == f'{HEADER}\n\n{found}\n'
